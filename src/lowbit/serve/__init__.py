"""An OpenAI-compatible endpoint that makes a small model reliable: ``lowbit.serve(...)``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import console, verbs
from lowbit.errors import BadOption, CannotWrite
from lowbit.harness import Fallback, Harness, HarnessError, HarnessOptions, HttpUpstream

if TYPE_CHECKING:
    from lowbit.model_server import ModelOptions
    from lowbit.serve.batch_worker import BatchWorker
    from lowbit.serve.metrics import Metrics

_SLOTS = 4  # of a batch, at a server whose slots are not known
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """host, port:    where to listen; a host that others reach needs a key. Port 0 takes a free one
    key:           what callers must send as a bearer token; None asks for none
    upstream_key:  what is sent to the model's server
    model:         the model's name at the upstream, put into every request; None leaves what the caller wrote
    harness:       bounds and layers
    fallbacks:     models to ask when the tries are spent, in order; none unless they are named here
    body_bytes, open_requests, log_bodies: of the endpoint (see app.Limits)
    open_connections: at a time; the one that has been idle for longest makes room
    head_seconds:  for the head of a request to come in
    origins:       of web pages elsewhere that may ask, "https://app.example"; "*" is any
    page:          whether llama-server's own web page is passed on, where that server is started here
    files:         the folder of /v1/files and /v1/batches, made with the first upload; None has neither
    batch_slots:   requests of a batch at a time; None is all slots of a model that is served here, else 4
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
    log_bodies: bool = False
    open_connections: int = 640  # with those to the model's server below the usual 1,024 files of a process
    head_seconds: float = 20.0
    origins: tuple[str, ...] = ()
    page: bool = True
    files: Path | None = Path("lowbit-files")
    batch_slots: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise BadOption("impossible port", found=self.port, expected="0 to 65535")
        for name in ("body_bytes", "open_requests", "open_connections"):
            if getattr(self, name) < 1:
                raise BadOption(f"impossible {name}", found=getattr(self, name), expected="at least 1")


@contextlib.asynccontextmanager
async def running(upstream_url: str, options: ServeOptions) -> AsyncIterator[str]:
    """The endpoint in front of a server that runs already; gives its URL, up to and with /v1."""
    from lowbit.serve.metrics import Metrics

    metrics = Metrics()
    upstream = HttpUpstream(upstream_url, key=options.upstream_key, model=options.model)
    harness = Harness(upstream, options.harness, fallbacks=options.fallbacks, on_answer=metrics.answer)
    batching = _Batching(slots=options.batch_slots or _SLOTS, model=options.model)
    async with _listening(harness, upstream, metrics, options, batching) as url:
        yield url


@contextlib.asynccontextmanager
async def running_model(
    model: str | os.PathLike[str], options: ServeOptions, model_options: ModelOptions | None = None
) -> AsyncIterator[str]:
    """A model's server, started for this, and the endpoint in front of it."""
    from lowbit import model_server
    from lowbit.serve.metrics import Metrics

    path = model_server.artifact(os.fspath(model))
    settled = model_server.settled(path, model_options or model_server.ModelOptions())
    metrics = Metrics()
    upstream, server, special = model_server.prepared(path, settled, page=options.page)
    harness = Harness(upstream, options.harness, fallbacks=options.fallbacks, special=special, on_answer=metrics.answer)
    # Who asks before the model is loaded hears so (503), and a port that is taken is found out before the wait.
    batching = _Batching(
        slots=options.batch_slots or settled.slots or _SLOTS, model=f"{path.name}, {path.stat().st_size} bytes",
        special=tuple(special),
    )  # fmt: skip
    async with _listening(harness, upstream, metrics, options, batching, page=options.page) as url:
        console.log(f"Loading {path.name} with a context of {settled.context:,} for {settled.slots} slots ...")
        try:
            await server.start()
            yield url
        finally:
            await server.close()


@dataclass(frozen=True, kw_only=True)
class _Batching:
    """slots: requests of a batch at a time. model: what a batch must go on with. special: spellings of the model's
    control tokens."""

    slots: int
    model: str | None = None
    special: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def _listening(
    harness: Harness, upstream: HttpUpstream, metrics: Metrics, options: ServeOptions, batching: _Batching, *,
    page: bool = False,
) -> AsyncIterator[str]:  # fmt: skip
    from aiohttp import web

    from lowbit.serve import connections, guard
    from lowbit.serve.app import Limits, Service
    from lowbit.serve.batch_worker import BatchWorker, Served
    from lowbit.serve.store import Store

    local = guard.is_loopback(options.host)
    if not local and not options.key:
        raise BadOption(
            "a host that others reach needs a key", found=options.host, expected="--api-key, or LOWBIT_API_KEY",
            hint="Without --host only this machine is served",
        )  # fmt: skip
    limits = Limits(body_bytes=options.body_bytes, open_requests=options.open_requests, log_bodies=options.log_bodies)
    store = worker = None
    if options.files is not None:
        store = Store(options.files)
        worker = BatchWorker(
            store, lambda: Served(upstream, options.harness, slots=batching.slots, special=batching.special,
                                  model=batching.model, on_answer=metrics.answer), options.harness,
        )  # fmt: skip
    service = Service(harness, upstream, metrics, limits, page=page, store=store, worker=worker)
    app = service.app(hosts=_LOOPBACK if local else (), key=options.key, origins=options.origins)
    # handler_cancellation: who leaves before the answer frees the model's slot.
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=75.0,
        lingering_time=2.0,
        logger=connections.quiet_logger(),
    )
    await runner.setup()
    assert runner.server is not None
    door = connections.Connections(runner.server, most=options.open_connections, head_seconds=options.head_seconds)
    server = None
    try:
        try:
            server = await asyncio.get_running_loop().create_server(door, options.host, options.port, backlog=128)
        except OSError as error:
            raise CannotWrite(
                "cannot listen there", where=f"{options.host}:{options.port}", found=error.strerror,
                hint="Another --port may be free; --port 0 takes one that is",
            ) from None  # fmt: skip
        if worker is not None:
            _go_on(worker)
        port = server.sockets[0].getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        yield f"http://{shown}:{port}/v1"
    finally:
        if server is not None:
            server.close()
        if worker is not None and store is not None:
            await asyncio.to_thread(worker.close)
            store.close()
        await runner.cleanup()
        for fallback in options.fallbacks:
            await fallback.close()


def _go_on(worker: BatchWorker) -> None:
    """With the batches of an earlier process; where another has them, this one still answers everything else."""
    try:
        worker.start()
    except HarnessError as error:
        console.log(f"/v1/files and /v1/batches: {error.message}")


def serve(
    model: str | os.PathLike[str] | None = None,
    *,
    upstream: str | None = None,
    options: ServeOptions | None = None,
    model_options: ModelOptions | None = None,
    ready: Callable[[str], Any] | None = None,
) -> None:
    """Serves until the process is asked to end (SIGINT, SIGTERM).

    model:         a GGUF, a run folder, a packaged name: llama.cpp's server is started for it
    upstream:      or the URL of an OpenAI-compatible server, up to and with /v1
    model_options: how llama.cpp's server is started
    ready:         called with the endpoint's own URL once it answers

    Raises BadOption, NotFound, BadFile, RuntimeFailed, CannotWrite (the port is taken).
    """
    if (model is None) == (upstream is None):
        raise BadOption("what is to be served?", expected="a model, or the URL of an upstream, and not both")
    logging.basicConfig(level=os.environ.get("LOWBIT_LOG", "WARNING").upper(), format="%(levelname)s %(message)s")
    options = options or ServeOptions()
    served = running(upstream, options) if upstream is not None else running_model(model, options, model_options)  # type: ignore[arg-type]
    asyncio.run(_until_stopped(served, ready or _say))


async def _until_stopped(served: contextlib.AbstractAsyncContextManager[str], ready: Callable[[str], Any]) -> None:
    asked = asyncio.ensure_future(_asked_to_end())
    entering = asyncio.ensure_future(served.__aenter__())
    # Loading can take minutes: who asks to end meanwhile does not wait for it.
    await asyncio.wait((asked, entering), return_when=asyncio.FIRST_COMPLETED)
    if not entering.done():
        entering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await entering
        return
    try:
        ready(entering.result())
        await asked
    finally:
        asked.cancel()
        if entering.exception() is None:
            await served.__aexit__(None, None, None)


async def _asked_to_end() -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, stop.set)
    await stop.wait()


def _say(url: str) -> None:
    console.log(f"Serving on {url}. Ctrl-C ends it.")


verbs.make_callable(__name__)
