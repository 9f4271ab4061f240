"""A small server with vLLM's command line, for machines without a GPU: what lowbit starts in vLLM's place in tests.

It is up after a moment, answers /health without a body, wants the key of VLLM_API_KEY, and knows one model.
The user's first words say more: "crash" ends it with exit code 3. STANDIN_VLLM=refuses: it does not come up.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web


def answer(said: str) -> str:
    return f"answer {hashlib.sha256(said.encode()).hexdigest()[:12]}"


async def serve(given: argparse.Namespace) -> None:
    begun = time.monotonic()

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=200 if time.monotonic() - begun > 0.7 else 503)

    async def chat(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        body: dict[str, Any] = await request.json()
        if body["model"] != given.served_model_name:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        said = next(m["content"] for m in body["messages"] if m["role"] == "user")
        if said.startswith("crash"):
            print("RuntimeError: CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
            os._exit(3)
        await asyncio.sleep(0.02)
        message = {"role": "assistant", "content": answer(said)}
        return web.json_response({
            "id": "c", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        })  # fmt: skip

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": given.served_model_name}]})

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await asyncio.sleep(0.3)  # nothing listens while it loads
    await web.TCPSite(runner, given.host, given.port).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    for name in ("--host", "--served-model-name", "--chat-template", "--kv-cache-dtype"):
        parser.add_argument(name)
    for name in ("--port", "--max-num-seqs", "--max-model-len"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    if os.environ.get("STANDIN_VLLM") == "refuses" or not (given.model / "config.json").is_file():
        print("ValueError: no such model", file=sys.stderr, flush=True)
        sys.exit(1)
    if log := os.environ.get("STANDIN_VLLM_LOG"):
        with open(log, "a") as handle:
            handle.write(json.dumps({"pid": os.getpid(), "words": sys.argv[1:]}) + "\n")
    asyncio.run(serve(given))


def install(folder: Path) -> Path:
    """Puts it into a folder for the PATH, called vllm."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    program.chmod(0o755)
    return folder


if __name__ == "__main__":
    main()
