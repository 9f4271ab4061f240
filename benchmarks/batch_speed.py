"""The throughput of `lowbit batch` beside the bare server: ``python benchmarks/batch_speed.py [--model M]``.

Short classifications with a shared prefix of about 300 tokens. Two servers with the same settings are loaded: one is
driven by a minimal asyncio client, at the number of requests at a time that was best for it; the other answers
`lowbit batch`. They take turns on the same items, a chunk at a time, every other chunk in the other order, and so does
the bare server with one request at a time and no prefix reused. Prints the ratios with 95% intervals over the chunks,
and what the journal took of the batch's time. Last, a whole batch whose probe finds the slots, its loading left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from lowbit import console, model_server
from lowbit.batch.engines import EngineOptions
from lowbit.batch.engines.local import Local
from lowbit.batch.job import Job
from lowbit.batch.options import BatchOptions
from lowbit.batch.runner import Runner, Stop
from lowbit.measure.record import machine, repeated
from lowbit.model_server import ModelOptions
from lowbit.run.llama_server import LlamaServer

WORDS = (
    "garden", "storm", "bright", "music", "child", "market", "silent", "river", "laughs", "broken", "wonderful", "late",
    "terrible", "service", "waited", "hours", "friendly", "staff", "cold", "soup", "refund", "battery", "slow",
)  # fmt: skip
CONTEXT = 2048  # tokens of a slot, as the batch takes for requests of this length
SLOTS = (1, 2, 4, 8, 16)


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rules = (f"Rule {i}: when {rng.choice(WORDS)} or {rng.choice(WORDS)} is said, weigh it." for i in range(19))
    system = f"You sort reviews. Answer with one word: positive, negative or neutral. {' '.join(rules)}"
    rng = random.Random(f"{seed}")
    texts = (" ".join(rng.choice(WORDS) for _ in range(rng.randint(8, 24))) for _ in range(count))
    return [
        {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": f"Review: {text}"}],
            "max_tokens": 4, "temperature": 0,
        }
        for text in texts
    ]  # fmt: skip


async def bare(url: str, bodies: Sequence[dict[str, Any]], at_a_time: int, **more: Any) -> float:
    """Items a second of the minimal client."""
    left = iter(bodies)
    async with aiohttp.ClientSession() as session:

        async def worker() -> None:
            for body in left:
                async with session.post(f"{url}/chat/completions", json=body | more) as response:
                    found = await response.json()
                    assert response.status == 200 and found["choices"], found

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_a_time)))
    return len(bodies) / (time.perf_counter() - begun)


class Kept(Local):
    """The batch's engine, whose server stays while one batch follows another. began, ended: when it was at work."""

    began = ended = 0.0

    async def __aenter__(self) -> Self:
        if self._server is None:
            await super().__aenter__()
        self.began = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ended = time.perf_counter()

    async def close(self) -> None:
        await super().__aexit__()


async def batch(engine: Kept, bodies: Sequence[dict[str, Any]], folder: Path) -> tuple[float, float, Any]:
    """Items a second, the share of the time that went to the journal, and what a probe found."""
    source = Path(tempfile.mkdtemp(dir=folder)) / "in.jsonl"
    lines = ({"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
             for i, body in enumerate(bodies))  # fmt: skip
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Job(source, source.with_name("journal")) as job:
        options = BatchOptions()
        job.begin(options.deciding() | await engine.deciding())
        engine.expect(job.journal.longest())
        before = job.journal.seconds
        stop = await Runner(job, engine, options).run()
        assert stop is Stop.COMPLETED and job.journal.counts()[2] == len(bodies), job.journal.counts()
        seconds = engine.ended - engine.began
        return len(bodies) / seconds, (job.journal.seconds - before) / seconds, job.journal.get("slots")


async def best_slots(url: str, count: int) -> int:
    """Of SLOTS, the one at which the bare server is fastest; tried up and down."""
    speeds: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    for i, slots in enumerate((*SLOTS, *reversed(SLOTS))):
        speeds[slots].append(await bare(url, requests(count, -2 - i), slots))
    told = ", ".join(f"{sum(found) / len(found):.2f} with {slots}" for slots, found in speeds.items())
    best = max(speeds, key=lambda slots: sum(speeds[slots]))
    print(f"bare server, items/s at so many at a time: {told}; best {best}", flush=True)
    return best


async def measure(given: argparse.Namespace, url: str, engine_options: ModelOptions, folder: Path) -> None:
    await bare(url, requests(2 * max(SLOTS), -1), max(SLOTS))  # every slot reads the prefix once
    slots = given.slots or await best_slots(url, given.sweep)
    engine = Kept(EngineOptions(model=given.model, slots=slots, server=engine_options))
    await batch(engine, requests(2 * slots, -1), folder)
    rows: list[tuple[float, float, float, float]] = []
    for chunk in range(given.chunks):
        bodies = requests(given.items, chunk)
        turns = ["bare", "batch", "alone"] if chunk % 2 == 0 else ["alone", "batch", "bare"]
        found: dict[str, float] = {}
        for turn in turns:
            if turn == "bare":
                found[turn] = await bare(url, bodies, slots)
            elif turn == "alone":
                found[turn] = await bare(url, bodies[: given.alone], 1, cache_prompt=False)
            else:
                found[turn], found["journal"], _ = await batch(engine, bodies, folder)
        rows.append((found["bare"], found["batch"], found["alone"], found["journal"]))
        print("  items/s: bare {:.2f}, batch {:.2f}, alone {:.2f}; journal {:.2%}".format(*rows[-1]), file=sys.stderr)
    await engine.close()
    told = f"{given.chunks} chunks of {given.items} items, {slots} at a time"
    ratios = {
        "batch / bare": [row[1] / row[0] for row in rows],
        "batch / alone": [row[1] / row[2] for row in rows],
        "journal's share of the time": [row[3] for row in rows],
    }
    for name, values in ratios.items():
        figure = repeated(values, "")
        print(f"{given.model}: {name}: {figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}], {told}", flush=True)
    if given.whole:
        bodies = requests(given.whole, 10_000)
        first = await bare(url, bodies, slots)
        engine = Kept(EngineOptions(model=given.model, server=engine_options))
        speed, _, probed = await batch(engine, bodies, folder)
        await engine.close()
        second = await bare(url, bodies, slots)
        ratio = 2 * speed / (first + second)
        said = f"{speed:.2f} items/s; bare before and after {first:.2f}, {second:.2f}; ratio {ratio:.3f}"
        print(f"{given.model}: a whole batch of {given.whole} items, probe and all: {said}; the probe: {probed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--items", type=int, default=100, help="of a chunk")
    parser.add_argument("--alone", type=int, default=10, help="of a chunk's items, asked one at a time, nothing reused")
    parser.add_argument("--sweep", type=int, default=48, help="items at each number of slots, twice")
    parser.add_argument("--slots", type=int, help="instead of the sweep")
    parser.add_argument("--whole", type=int, default=1000, help="items of the batch whose probe finds the slots")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    console.set_quiet(True)
    path, most = model_server.artifact(given.model), max(SLOTS)
    with (
        tempfile.TemporaryDirectory() as folder,
        LlamaServer(path, slots=most, context=CONTEXT * most, threads=given.threads, swa_full=True, idle_cache=False)
        as server,
    ):  # fmt: skip
        print(machine(), flush=True)
        asyncio.run(measure(given, server.url, ModelOptions(threads=given.threads), Path(folder)))


if __name__ == "__main__":
    main()
