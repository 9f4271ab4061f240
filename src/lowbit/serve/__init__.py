"""An OpenAI-compatible endpoint that makes a small model reliable: ``lowbit.serve(...)``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit import console, verbs
from lowbit.errors import BadOption, CannotWrite
from lowbit.harness import Fallback, Harness, HarnessOptions, HttpUpstream

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """host, port:    where to listen; a host that others reach needs a key. Port 0 takes a free one
    key:           what callers must send as a bearer token; None asks for none
    upstream_key:  what is sent to the model's server
    model:         the model's name at the upstream, put into every request; None leaves what the caller wrote
    harness:       bounds and layers
    fallbacks:     models to ask when the tries are spent, in order; none unless they are named here
    body_bytes, open_requests: of the endpoint (see app.Limits)
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    upstream_key: str | None = None
    model: str | None = None
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    fallbacks: tuple[Fallback, ...] = ()
    body_bytes: int = 32 << 20
    open_requests: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise BadOption("impossible port", found=self.port, expected="0 to 65535")
        for name in ("body_bytes", "open_requests"):
            if getattr(self, name) < 1:
                raise BadOption(f"impossible {name}", found=getattr(self, name), expected="at least 1")


@contextlib.asynccontextmanager
async def running(upstream_url: str, options: ServeOptions) -> AsyncIterator[str]:
    """The endpoint in front of a server that runs already; gives its URL, up to and with /v1."""
    from aiohttp import web

    from lowbit.serve import guard
    from lowbit.serve.app import Limits, Service
    from lowbit.serve.metrics import Metrics

    local = guard.is_loopback(options.host)
    if not local and not options.key:
        raise BadOption(
            "a host that others reach needs a key", found=options.host, expected="--api-key, or LOWBIT_API_KEY",
            hint="Without --host only this machine is served",
        )  # fmt: skip
    metrics = Metrics()
    upstream = HttpUpstream(upstream_url, key=options.upstream_key, model=options.model)
    harness = Harness(upstream, options.harness, fallbacks=options.fallbacks, on_answer=metrics.answer)
    limits = Limits(body_bytes=options.body_bytes, open_requests=options.open_requests)
    app = Service(harness, upstream, metrics, limits).app(hosts=_LOOPBACK if local else (), key=options.key)
    # handler_cancellation: who leaves before the answer frees the model's slot.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, keepalive_timeout=75.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as error:
            raise CannotWrite(
                "cannot listen there", where=f"{options.host}:{options.port}", found=error.strerror,
                hint="Another --port may be free; --port 0 takes one that is",
            ) from None  # fmt: skip
        port = runner.addresses[0][1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        yield f"http://{shown}:{port}/v1"
    finally:
        await runner.cleanup()
        for fallback in options.fallbacks:
            await fallback.close()


def serve(
    upstream: str,
    *,
    options: ServeOptions | None = None,
    ready: Callable[[str], Any] | None = None,
) -> None:
    """Serves until the process is asked to end (SIGINT, SIGTERM).

    upstream: the URL of an OpenAI-compatible server, up to and with /v1
    ready:    called with the endpoint's own URL once it answers

    Raises BadOption, CannotWrite (the port is taken).
    """
    logging.basicConfig(level=os.environ.get("LOWBIT_LOG", "WARNING").upper(), format="%(levelname)s %(message)s")
    asyncio.run(_serve(upstream, options or ServeOptions(), ready or _say))


async def _serve(upstream: str, options: ServeOptions, ready: Callable[[str], Any]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    async with running(upstream, options) as url:
        ready(url)
        await stop.wait()


def _say(url: str) -> None:
    console.log(f"Serving on {url}. Ctrl-C ends it.")


verbs.make_callable(__name__)
