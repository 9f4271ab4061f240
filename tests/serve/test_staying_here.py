"""No byte leaves the machine, but for an endpoint that was named: every connection of the process is watched."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from endpoint import Endpoint, served
from scripted import Scripted, call

from lowbit.harness import Fallback, HttpUpstream, Ledger, Price
from lowbit.serve import ServeOptions

OUTSIDE = "192.0.2.1"  # RFC 5737: nobody's
HEARD = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 1}}, "required": ["a"]}
BODY = {
    "messages": [{"role": "user", "content": f"Read http://{OUTSIDE}/page and answer."}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}, "max_tokens": 20,
}  # fmt: skip


class Watch:
    """on: whether connections are recorded, and those to elsewhere refused. ports: that were connected to."""

    def __init__(self) -> None:
        self.on, self.ports, self.outside = False, set[int](), list[Any]()
        sys.addaudithook(self._heard)  # hears the C library's calls too, and can never be taken out

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in (
            "socket.connect",
            "socket.sendto",
            "socket.getaddrinfo",
            "socket.gethostbyname",
        ):
            return
        address = arguments[0] if event.startswith("socket.get") else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if event == "socket.connect" and isinstance(address, tuple):
            self.ports.add(address[1])
        if host not in ("127.0.0.1", "::1", "localhost", None):
            self.outside.append((event, host))
            raise PermissionError(f"{event} to {host}")


WATCH = Watch()


@pytest.fixture
def watch() -> Iterator[Watch]:
    WATCH.ports.clear()
    WATCH.outside.clear()
    WATCH.on = True
    try:
        yield WATCH
    finally:
        WATCH.on = False


def test_the_watch_sees_what_leaves(watch: Watch) -> None:
    for attempt in (
        lambda: socket.create_connection((OUTSIDE, 80), 1),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (OUTSIDE, 53)),
        lambda: socket.getaddrinfo("example.org", 80),
    ):
        with pytest.raises(PermissionError):
            attempt()
    assert len(watch.outside) == 3


async def asked_of(endpoint: Endpoint, body: dict[str, Any], streamed: bool) -> tuple[int, str]:
    """Status and text of the answer, whatever it is."""
    sent = body | ({"stream": True} if streamed else {})
    async with endpoint.session.post(endpoint.url + "/chat/completions", json=sent) as response:
        return response.status, await response.text()


@contextlib.asynccontextmanager
async def another(handler: Any) -> Any:
    """A server of another model, and its port."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("streamed", [False, True])
def test_without_a_named_fallback_nothing_leaves(watch: Watch, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, f"http://{OUTSIDE}:9/v1")
    own = {"base_url": f"http://{OUTSIDE}/v1", "api_base": f"http://{OUTSIDE}/v1", "fallbacks": ["gpt"]}
    tools = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
    replies = Scripted("words", {"content": None, "tool_calls": [call("get", f'{{"url": "http://{OUTSIDE}/"}}')]})

    async def go() -> None:
        async with served(replies) as endpoint:
            for body in (BODY, BODY | own, {**BODY, "response_format": None, "tools": tools}):
                await asked_of(endpoint, body, streamed)
            image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"http://{OUTSIDE}/a"}}]}]
            assert (await endpoint.post("/chat/completions", {"messages": image}))[0] == 400

    asyncio.run(go())
    assert not watch.outside and len(watch.ports) == 2  # the endpoint's and the upstream's


@pytest.mark.parametrize("streamed", [False, True])
def test_a_named_fallback_is_all_that_is_asked(watch: Watch, streamed: bool, tmp_path: Path) -> None:
    asked: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response(await Scripted('{"a": 7}').chat({}, 1))

    async def go() -> None:
        async with another(answer) as port:
            ledger = Ledger(tmp_path / "spend", 1.0)
            hosted = HttpUpstream(f"http://127.0.0.1:{port}/v1", model="big", key="k")
            fallback = Fallback(hosted, price=Price(prompt=1, completion=1), ledger=ledger, log=tmp_path / "log")
            async with served(Scripted("words"), ServeOptions(port=0, fallbacks=(fallback,))) as endpoint:
                off = BODY | {"lowbit": {"layers": ["repair", "retry"]}}
                assert (await asked_of(endpoint, off, streamed))[0] == 422
                assert not asked and port not in watch.ports
                status, said = await asked_of(endpoint, BODY, streamed)
                assert status == 200 and '{\\"a\\": 7}' in said and "big" in said
                assert len(asked) == 1 and asked[0]["model"] == "big" and port in watch.ports
            assert ledger.spent == pytest.approx(15e-6)

    asyncio.run(go())
    assert not watch.outside and len(watch.ports) == 3


def test_a_fallback_does_not_lead_elsewhere(watch: Watch) -> None:
    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(f"http://{OUTSIDE}/v1/chat/completions")

    async def go() -> None:
        async with another(redirect) as port:
            fallback = Fallback(HttpUpstream(f"http://127.0.0.1:{port}/v1"))
            async with served(Scripted("words"), ServeOptions(port=0, fallbacks=(fallback,))) as endpoint:
                status, found = await endpoint.post("/chat/completions", BODY)
                assert status == 502 and "redirects" in found["error"]["message"]

    asyncio.run(go())
    assert not watch.outside


@pytest.mark.parametrize("streamed", [False, True])
def test_a_spent_cap_says_so(streamed: bool, tmp_path: Path) -> None:
    async def go() -> None:
        other = Scripted('{"a": 7}')
        fallback = Fallback(other, price=Price(prompt=1, completion=1), ledger=Ledger(tmp_path / "spend", 0.0))  # type: ignore[arg-type]
        async with served(Scripted("words"), ServeOptions(port=0, fallbacks=(fallback,))) as endpoint:
            status, said = await asked_of(endpoint, BODY, streamed)
            assert status == 402 and "spend_cap" in said and "$0.00" in said and not other.sent

    asyncio.run(go())
