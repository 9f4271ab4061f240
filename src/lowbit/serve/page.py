"""llama-server's own web page, passed on: its files, and what it asks about the model. Nothing else of that server is
reachable: no slots, no adapters, no tools, and nothing that could be changed.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import aiohttp
from aiohttp import web

from lowbit.harness import HarnessError, HttpUpstream
from lowbit.serve import guard

_KINDS = "css|html|ico|js|json|mjs|png|svg|webmanifest|woff2"
_ABOUT = ("default_generation_settings", "total_slots", "model_alias", "modalities", "chat_template", "build_info")
_LARGEST, _MOST = 32 << 20, 256  # bytes of a file, and files
_SECONDS = 30.0
_PASSED_ON = ("Content-Type", "Cache-Control", "ETag")
# The page talks to this endpoint and to nobody else. Its scripts stand inline, and it makes workers of its own text.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Page:
    """The files are asked for once, with GET, without what the caller sent, and kept."""

    def __init__(self, upstream: HttpUpstream) -> None:
        self._upstream = upstream
        self._files: dict[str, tuple[bytes, dict[str, str]]] = {}
        self._session: aiohttp.ClientSession | None = None

    def add_to(self, app: web.Application) -> None:
        names = rf"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.(?:{_KINDS})"
        below = rf"/_app/{{file:(?:[A-Za-z0-9_-]+/){{0,4}}{names}}}"
        for name, path in (("", "/"), ("-file", f"/{{file:{names}}}"), ("-app", below)):
            app.router.add_get(path, self.file, name=guard.PAGE + name)  # and HEAD
        app.router.add_get("/props", self.about)
        app.on_cleanup.append(self._close)

    async def file(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path == "/sw.js":
            # It would outlive this endpoint in the browser, and answer for whatever is served on this port next.
            raise web.HTTPNotFound
        if path not in self._files:
            self._files[path] = await self._fetched(path)
        body, headers = self._files[path]
        if request.headers.get("If-None-Match") == headers.get("ETag", ""):
            return web.Response(status=304, headers=_HEADERS)
        if headers.get("Content-Encoding") == "gzip" and "gzip" not in request.headers.get("Accept-Encoding", ""):
            body, headers = _unpacked(body), {k: v for k, v in headers.items() if k != "Content-Encoding"}
        return web.Response(body=body, headers=headers | _HEADERS)

    async def about(self, request: web.Request) -> web.StreamResponse:
        """What the page must know of the model; no paths."""
        found = await self._upstream.get("/props", _SECONDS, root=self._upstream.root)
        return guard.json_response({key: found[key] for key in _ABOUT if key in found} | {"model_path": ""})

    async def _fetched(self, path: str) -> tuple[bytes, dict[str, str]]:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, trust_env=False)
        url = self._upstream.root + path
        headers = {"Accept-Encoding": "gzip", "Authorization": f"Bearer {self._upstream.key}"}
        try:
            async with asyncio.timeout(_SECONDS), self._session.get(url, headers=headers, allow_redirects=False) as got:
                if got.status != 200 or len(self._files) >= _MOST:
                    raise web.HTTPNotFound
                body = await got.content.read(_LARGEST + 1)
                while len(body) <= _LARGEST and (more := await got.content.read(_LARGEST)):
                    body += more
        except (aiohttp.ClientError, OSError, TimeoutError):
            message = "the model is not loaded yet, and its server has the page"
            raise HarnessError(message, status=503, code="not_ready") from None
        if len(body) > _LARGEST:
            raise web.HTTPNotFound
        passed = {name: got.headers[name] for name in (*_PASSED_ON, "Content-Encoding") if name in got.headers}
        return body, passed

    async def _close(self, app: web.Application) -> None:
        if self._session is not None:
            await self._session.close()


def _unpacked(body: bytes) -> bytes:
    unpacker: Any = zlib.decompressobj(31)
    found: bytes = unpacker.decompress(body, _LARGEST)
    return found
