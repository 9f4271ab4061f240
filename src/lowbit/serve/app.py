"""The endpoint: OpenAI's paths, each answered through the harness."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lowbit.harness import BadRequest, Harness, HarnessError, HttpUpstream, text, urls
from lowbit.harness.responses import Responses
from lowbit.serve import connections, guard, openapi, sse
from lowbit.serve.batch_worker import BatchWorker
from lowbit.serve.batches import Batches
from lowbit.serve.files import Files
from lowbit.serve.metrics import Metrics
from lowbit.serve.page import Page
from lowbit.serve.store import Store

log = logging.getLogger("lowbit.serve")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """body_bytes: of a request. open_requests: answered at a time, the rest get 429. body_seconds: for a body to come
    in. log_bodies: whether bodies of requests are shown on standard error. file_bytes: of an upload; kept_bytes: of all
    files together."""

    body_bytes: int = 32 << 20
    open_requests: int = 512
    body_seconds: float = 30.0
    log_bodies: bool = False
    file_bytes: int = 200 << 20  # as OpenAI's batch
    kept_bytes: int = 10 << 30


class Service:
    """What the routes share.

    page:   whether the model's server has a web page of its own that is passed on
    store, worker: of files and batches; without them the endpoint has neither
    """

    def __init__(
        self, harness: Harness, upstream: HttpUpstream, metrics: Metrics, limits: Limits, *, page: bool = False,
        store: Store | None = None, worker: BatchWorker | None = None,
    ) -> None:  # fmt: skip
        self._store, self._worker = store, worker
        self.harness, self.upstream, self.metrics, self.limits, self.page = harness, upstream, metrics, limits, page
        self._responses = Responses(harness)

    def app(self, *, hosts: tuple[str, ...], key: str | None, origins: Collection[str] = ()) -> web.Application:
        """hosts, key, origins: see guard.middleware."""
        origins = frozenset(origin.casefold().rstrip("/") for origin in origins)
        guarded = guard.middleware(hosts=hosts, key=key, origins=origins, page=self.page)
        app = web.Application(middlewares=[self._counted(), guarded], client_max_size=self.limits.body_bytes)
        app.on_response_prepare.append(guard.cors(origins))
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/responses", self.create_response)
        app.router.add_get("/v1/responses/{id}", self.get_response)
        app.router.add_delete("/v1/responses/{id}", self.delete_response)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        if self._store is not None and self._worker is not None:
            limits = self.limits
            Files(self._store, file_bytes=limits.file_bytes, kept_bytes=limits.kept_bytes).add_to(app)
            Batches(self._store, self._worker, limits.body_seconds).add_to(app)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        described = openapi.document(needs_key=key is not None, files=self._store is not None)

        async def describe(request: web.Request) -> web.StreamResponse:
            return guard.json_response(described)

        app.router.add_get("/openapi.json", describe)
        if self.page:
            Page(self.upstream).add_to(app)
        app.on_cleanup.append(self._close)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        streamed, options = body.pop("stream", None), body.pop("stream_options", None)
        if streamed:
            usage = bool(isinstance(options, dict) and options.get("include_usage"))
            return await sse.send(request, _without_usage(self.harness.stream(body), keep=usage))
        return guard.json_response(await self.harness.complete(body))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Text as it is: no template, no tools; what the harness adds is that silence and endless text are failures."""
        body = await self._body(request)
        body.pop("stream_options", None)
        if body.pop("stream", None):
            return await sse.send(request, text.stream(self.harness, self.upstream, body))
        return guard.json_response(await text.complete(self.harness, self.upstream, body))

    async def create_response(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if body.get("stream"):
            return await sse.send(request, self._responses.stream(body), named=True, done=False)
        return guard.json_response(await self._responses.create(body))

    async def get_response(self, request: web.Request) -> web.StreamResponse:
        return guard.json_response(self._responses.get(request.match_info["id"]))

    async def delete_response(self, request: web.Request) -> web.StreamResponse:
        return guard.json_response(self._responses.forget(request.match_info["id"]))

    async def models(self, request: web.Request) -> web.StreamResponse:
        return guard.json_response(await self.upstream.get("/models"))

    async def model(self, request: web.Request) -> web.StreamResponse:
        wanted, listed = request.match_info["model"], await self.upstream.get("/models")
        for entry in listed.get("data") or []:
            if isinstance(entry, dict) and entry.get("id") == wanted:
                return guard.json_response(entry)
        raise HarnessError(f"there is no model {wanted[:100]}", status=404, code="model_not_found")

    async def health(self, request: web.Request) -> web.StreamResponse:
        """200 where the model's server answers, 503 where it does not."""
        try:
            await self.upstream.get("/models", seconds=5.0)
        except HarnessError as error:
            return guard.json_response({"status": "error", "error": error.message}, status=503)
        return guard.json_response({"status": "ok"})

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        page, kind = self.metrics.render()
        return web.Response(body=page, headers={"Content-Type": kind})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        body = await guard.body_of(request, self.limits.body_seconds, log=self.limits.log_bodies)
        if body.get("stream") not in (None, True, False) or type(body.get("stream")) is int:
            raise BadRequest("stream must be true or false", param="stream")
        urls.refuse(body)
        return body

    def _counted(self) -> Any:
        """The outermost layer: counts, bounds what is open, and turns a fault of our own into an answer."""

        @web.middleware
        async def counted(request: web.Request, handler: guard.Handler) -> web.StreamResponse:
            route = request.match_info.route.resource
            path = route.canonical if route is not None else "other"
            begun, status = time.monotonic(), 500
            connections.begun(request)
            if self.metrics.open._value.get() >= self.limits.open_requests:
                error = HarnessError("too many requests are open", status=429, code="overloaded")
                self.metrics.request(path, 429, 0.0)
                return guard.json_response(error.as_json(), status=429, headers={"Retry-After": "1"})
            with self.metrics.open.track_inprogress():
                try:
                    response = await handler(request)
                    status = response.status
                    return response
                except asyncio.CancelledError:
                    status = 499  # the caller left
                    raise
                except Exception as fault:
                    # Where it happened and of what kind, and never its words: they may quote the body.
                    frames = "".join(traceback.format_tb(fault.__traceback__))
                    log.error("a fault of lowbit's own on %s: %s\n%s", path, type(fault).__name__, frames)
                    error = HarnessError("a fault of lowbit's own", status=500, code="internal_error")
                    return guard.json_response(error.as_json(), status=500)
                finally:
                    connections.ended(request)
                    self.metrics.request(path, status, time.monotonic() - begun)

        return counted

    async def _close(self, app: web.Application) -> None:
        await self.upstream.close()


async def _without_usage(chunks: Any, *, keep: bool) -> Any:
    """Clients that did not ask for usage do not expect a chunk without choices: there, what was done goes with the
    chunk that ends the answer."""
    ending = None
    async for chunk in chunks:
        if keep:
            yield chunk
        elif chunk.get("choices") and chunk["choices"][0].get("finish_reason"):
            ending = chunk
        elif ending is not None and not chunk.get("choices"):
            yield ending | {"lowbit": chunk.get("lowbit")}
            ending = None
        else:
            yield chunk
    if ending is not None:
        yield ending
