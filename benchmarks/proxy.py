"""What lowbit serve costs in front of a bare llama.cpp server: ``python benchmarks/proxy.py [--model M]``.

Paired: each request goes to the bare server and through the endpoint, in alternating order. Prints the median of the
difference of a request's time (one token after a prompt that is cached), and the ratio of the throughput of 16 streams
at once, each with its 95% interval by bootstrap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time

import aiohttp
import numpy as np

from lowbit import model_server
from lowbit.run.llama_server import LlamaServer

MESSAGES = [{"role": "user", "content": "Say hello in one short sentence."}]


async def one(session: aiohttp.ClientSession, url: str, tokens: int) -> float:
    """Seconds of a whole request."""
    body = {"messages": MESSAGES, "max_tokens": tokens, "temperature": 0, "cache_prompt": True}
    begun = time.perf_counter()
    async with session.post(f"{url}/chat/completions", json=body) as response:
        found = await response.json()
    assert response.status == 200 and found["choices"], found
    return time.perf_counter() - begun


async def stream(session: aiohttp.ClientSession, url: str, tokens: int, seed: int) -> int:
    """Tokens of a streamed answer, as its usage says."""
    body = {
        "messages": MESSAGES, "max_tokens": tokens, "temperature": 1.0, "seed": seed, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    used = 0
    async with session.post(f"{url}/chat/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {") and b'"usage"' in line:
                used = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens") or used
    return used


async def streams(session: aiohttp.ClientSession, url: str, n: int, tokens: int) -> float:
    """Tokens a second of ``n`` streams at once."""
    begun = time.perf_counter()
    counts = await asyncio.gather(*(stream(session, url, tokens, seed) for seed in range(n)))
    assert all(counts)
    return sum(counts) / (time.perf_counter() - begun)


def interval(values: np.ndarray, statistic: type | object) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(2000)]  # type: ignore[operator]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


async def measure(bare: str, proxied: str, requests: int, rounds: int, n: int, tokens: int) -> None:
    async with aiohttp.ClientSession() as session:
        for url in (bare, proxied):
            for _ in range(5):
                await one(session, url, 1)
        differences = []
        for i in range(requests):
            urls = [bare, proxied] if i % 2 else [proxied, bare]
            seconds = {url: await one(session, url, 1) for url in urls}
            differences.append(1000 * (seconds[proxied] - seconds[bare]))
        found = np.array(differences)
        low, high = interval(found, np.median)
        print(f"added per request, median: {np.median(found):.2f} ms [{low:.2f}, {high:.2f}], {requests} pairs")
        for url in (bare, proxied):  # every slot reads the prompt once, which the first round would pay for
            await streams(session, url, n, 4)
        ratios = []
        for i in range(rounds):
            urls = [bare, proxied] if i % 2 else [proxied, bare]
            speed = {url: await streams(session, url, n, tokens) for url in urls}
            ratios.append(speed[proxied] / speed[bare])
            print(f"  {n} streams: bare {speed[bare]:.1f}, served {speed[proxied]:.1f} tokens/s", file=sys.stderr)
        logs = np.log(ratios)
        low, high = (float(np.exp(x)) for x in interval(logs, np.mean))
        mean = float(np.exp(logs.mean()))
        print(f"throughput of {n} streams, served / bare: {mean:.3f} [{low:.3f}, {high:.3f}], {rounds} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    random.seed(0)
    path = model_server.artifact(given.model)
    with LlamaServer(path, context=256 * given.streams, slots=given.streams) as server:
        command = [sys.executable, "-m", "lowbit", "serve", "--upstream", server.url, "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                line = next(line for line in process.stderr if line.startswith("Serving on "))
                url = line.split()[2].rstrip(".")
                asyncio.run(measure(server.url, url, given.requests, given.rounds, given.streams, given.tokens))
            finally:
                process.terminate()


if __name__ == "__main__":
    main()
