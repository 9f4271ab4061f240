"""A day's requests through lowbit serve: ``python benchmarks/soak.py [--requests 100000]``.

A server of this process answers at once; the endpoint runs in a process of its own, and its resident memory, open files
and threads are read as the requests go by: whole, streamed, with a schema, with a broken tool call, failing, and left
in the middle. Prints the memory after each tenth, and the growth over the second half by a straight line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from typing import Any

import aiohttp
import numpy as np
import psutil
from aiohttp import web

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


async def upstream(request: web.Request) -> web.StreamResponse:
    """What is asked for says what is answered: see KINDS."""
    body = await request.json()
    kind = body.get("user")
    if kind == "failing":
        return web.json_response({"error": {"message": "busy"}}, status=400)
    message: dict[str, Any] = {"role": "assistant", "content": "All is well. " * 8}
    if kind == "schema":
        message["content"] = '```json\n{"a": 1}\n```'
    if kind == "tool":
        call = {"id": "c", "type": "function", "function": {"name": "Look", "arguments": "{'x': 1}"}}
        message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    base = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    if not body.get("stream"):
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response(
            base | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        )
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        for word in message["content"].split():
            chunk = base | {"choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            if kind == "left":
                await asyncio.sleep(0.01)
        end = base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        await response.write(b"data: " + json.dumps(end).encode() + b"\n\ndata: [DONE]\n\n")
    return response


KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "streamed": {"stream": True},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "tool": {"tools": [TOOL]},
    "failing": {},
    "left": {"stream": True},
}
EXPECTED = {"failing": 400}


async def ask(session: aiohttp.ClientSession, url: str, kind: str) -> None:
    body = {"messages": HELLO, "user": kind, **KINDS[kind]}
    async with session.post(f"{url}/chat/completions", json=body) as response:
        assert response.status == EXPECTED.get(kind, 200), (kind, response.status, await response.text())
        if kind == "left":
            await response.content.readline()
            response.close()
        else:
            await response.read()


async def soak(requests: int, at_once: int) -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    own = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    command = [sys.executable, "-m", "lowbit", "serve", "--upstream", own, "--port", "0"]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        line = (await process.stderr.readline()).decode()
        url = line.split()[2].rstrip(".")
        served, kinds = psutil.Process(process.pid), list(KINDS)
        seen: list[tuple[int, int, int, int]] = []
        begun, done = time.monotonic(), 0
        connector = aiohttp.TCPConnector(limit=at_once)
        async with aiohttp.ClientSession(connector=connector) as session:
            while done < requests:
                batch = min(500, requests - done)
                gate = asyncio.Semaphore(at_once)

                async def one(i: int, gate: asyncio.Semaphore = gate) -> None:
                    async with gate:
                        await ask(session, url, kinds[i % len(kinds)])

                await asyncio.gather(*(one(done + i) for i in range(batch)))
                done += batch
                seen.append((done, served.memory_info().rss, served.num_fds(), served.num_threads()))
                if len(seen) % max(1, requests // 5000) == 0:
                    n, memory, files, threads = seen[-1]
                    rate = n / (time.monotonic() - begun)
                    print(
                        f"{n:>8,} requests, {memory / 2**20:6.1f} MiB, {files} files, {threads} threads, {rate:.0f}/s",
                        flush=True,
                    )
        await asyncio.sleep(1)
        files = served.num_fds()
        half = np.array(seen[len(seen) // 2 :], dtype=float)
        slope = np.polyfit(half[:, 0], half[:, 1], 1)[0] if len(half) > 2 else float("nan")
        print(f"over the second half: {slope * 1e5 / 2**20:+.2f} MiB for 100,000 requests; files at rest: {files}")
    finally:
        process.terminate()
        await process.wait()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--at-once", type=int, default=16)
    given = parser.parse_args()
    asyncio.run(soak(given.requests, given.at_once))
