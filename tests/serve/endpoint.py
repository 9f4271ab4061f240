"""A model's server over real HTTP, whose answers a test writes down, and the endpoint in front of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

from lowbit.serve import ServeOptions, running


class Endpoint:
    """What a test asks. url: up to and with /v1."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session
        self.root = url.removesuffix("/v1")

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body, **more) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        async with self.session.post(self.url + path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            text = await response.text()
        return [block.removeprefix("data: ") for block in text.split("\n\n") if block.startswith("data: ")]


@contextlib.asynccontextmanager
async def served(upstream: Any, options: ServeOptions | None = None) -> AsyncIterator[Endpoint]:
    """upstream: has chat(body, seconds) and stream(body, seconds), as scripted.Scripted."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.pop("stream"):
            return web.json_response(await upstream.chat(body, 9))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for chunk in upstream.stream(body, 9):
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with running(url, options or ServeOptions(port=0)) as own, aiohttp.ClientSession() as session:
            yield Endpoint(own, session)
    finally:
        await runner.cleanup()
