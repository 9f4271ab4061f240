"""An OpenAI-compatible server whose answers depend on the request alone, for what is about the batch and not the model.

The first words of the user's say what it does: "crash" ends its process, "hang" never answers, "status 500" answers so,
"bad json" breaks the schema, "slow 0.1" takes so long. In a process of its own, ``python batch_server.py PORT LOG``, it
writes a line for each answer that it sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web


class BatchServer:
    """A context manager. asked: the users' first messages, in order. most: of them under way at once. down: whether it
    answers 503. bare: whether it has no /v1/models. busy: how many 429s are left to give. model: its name. slots: what
    /props tells."""

    def __init__(self, delay: float = 0.0, log: Path | None = None) -> None:
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most = self.busy = 0
        self.delay, self.down, self.bare, self._log = delay, False, False, log
        self.url, self.model, self.slots = "", "m", 0

    # In a thread

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(begun,), daemon=True)
        self._thread.start()
        assert begun.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, begun: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        runner = self._loop.run_until_complete(self.start(0))
        begun.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def start(self, port: int) -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/props", self._props)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    # What it says

    async def _models(self, request: web.Request) -> web.Response:
        if self.down or self.bare:
            return web.json_response({"error": {"message": "Loading model"}}, status=503 if self.down else 404)
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _props(self, request: web.Request) -> web.Response:
        """As llama-server's, where ``slots`` says how many it has."""
        return web.json_response({"total_slots": self.slots}) if self.slots else web.json_response({}, status=404)

    async def _text(self, request: web.Request) -> web.Response:
        body = await request.json()
        said = answer(body["prompt"])
        self.asked.append(body["prompt"])
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        choice = {"index": 0, "text": said, "finish_reason": "stop"}
        return web.json_response({"id": "t", "object": "text_completion", "choices": [choice], "usage": usage})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        said = next(message["content"] for message in body["messages"] if message["role"] == "user")
        self.asked.append(said)
        self.bodies.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self._answer(body, said)
        finally:
            self.now -= 1

    async def _answer(self, body: dict[str, Any], said: str) -> web.StreamResponse:
        if self.down or self.busy:
            self.busy = max(0, self.busy - 1)
            return web.json_response({"error": {"message": "busy"}}, status=503 if self.down else 429)
        if said.startswith("crash"):
            os._exit(9)
        if said.startswith("hang"):
            await asyncio.sleep(3600)
        if found := re.match(r"status (\d+)", said):
            return web.json_response({"error": {"message": "as it was asked"}}, status=int(found[1]))
        if (delay := float(found[1]) if (found := re.match(r"slow ([\d.]+)", said)) else self.delay) > 0:
            await asyncio.sleep(delay)
        schema = body.get("response_format")
        content = json.dumps(value_of(said)) if schema and not said.startswith("bad json") else answer(said)
        usage = {"prompt_tokens": len(said.split()), "completion_tokens": 5, "total_tokens": len(said.split()) + 5}
        found = {
            "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        }  # fmt: skip
        if self._log is not None:
            with open(self._log, "a") as handle:
                handle.write(said.partition("\n")[0] + "\n")
        return web.json_response(found)


def answer(said: str) -> str:
    return f"answer {hashlib.sha256(said.encode()).hexdigest()[:12]}"


def value_of(said: str) -> dict[str, Any]:
    number = int(hashlib.sha256(said.encode()).hexdigest()[:4], 16)
    return {"label": ("good", "bad")[number % 2], "score": number}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _serve(port: int, log: Path) -> None:
    await BatchServer(float(os.environ.get("DELAY", "0")), log).start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), Path(sys.argv[2])))
