"""Who may ask, and how much: hosts, keys, sizes and times.

A server on loopback is reached by every page that a browser has open. So a request must name a host that is served
here (else a name that was re-pointed at 127.0.0.1 would do), must not say that it comes from a page of elsewhere, and
a body must say that it is JSON, which such a page cannot say without asking first.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web

from lowbit import console
from lowbit.harness import BadRequest, HarnessError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OPEN = ("/health", "/openapi.json")  # asked by those who have no key: supervisors, containers, makers of clients
PAGE = "page"  # the name of routes that give files of the web page
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",  # the star does not stand for Authorization
    "Access-Control-Max-Age": "600",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host.strip("[]").casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def middleware(*, hosts: Collection[str], key: str | None, origins: Collection[str] = (), page: bool = False) -> Any:
    """hosts: that the Host header may name, without ports; empty means any (the server has a key then)
    origins: of pages elsewhere that may ask, as browsers spell them; "*" is any
    page: whether GETs outside /v1 are files of a web page, which a browser cannot send a key for
    """
    allowed = {host.casefold() for host in hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if allowed and _host(request.host) not in allowed:
                raise HarnessError("this host name is not served here", status=403, code="forbidden_host")
            origin = request.headers.get("Origin")
            known = origin is not None and is_origin_of(origins, origin)
            # Who has a key is no page that was merely open in a browser.
            if origin is not None and key is None and not known and not _is_own(origin, request.host):
                raise HarnessError("pages of this origin may not ask", status=403, code="forbidden_origin")
            if known and request.method == "OPTIONS":
                return web.Response(status=204, headers=_PREFLIGHT)
            if key is not None and not _is_open(request, page) and not _has_key(request, key):
                raise HarnessError("the API key is missing or wrong", status=401, code="invalid_api_key")
            return await handler(request)
        except HarnessError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            if error.after:
                headers["Retry-After"] = str(math.ceil(error.after))
            return json_response(error.as_json(), status=error.status, headers=headers)
        except web.HTTPRequestEntityTooLarge:
            large = HarnessError("the body is too large", status=413, code="body_too_large")
            return json_response(large.as_json(), status=413)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status, "http")
            found = HarnessError(error.reason, status=error.status, code=code)
            headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            return json_response(found.as_json(), status=error.status, headers=headers)

    return check


def cors(origins: Collection[str]) -> Any:
    """For on_response_prepare: what tells a browser that a page of these origins may read the answer."""

    async def tell(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "lowbit"  # and not which version of what
        origin = request.headers.get("Origin")
        if origin is not None and is_origin_of(origins, origin):
            response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
            response.headers["Vary"] = "Origin"

    return tell


def is_origin_of(origins: Collection[str], origin: str) -> bool:
    return "*" in origins or origin.casefold() in origins


async def body_of(request: web.Request, seconds: float, *, log: bool = False) -> dict[str, Any]:
    """The JSON object of a request. Raises HarnessError: 415 (not said to be JSON), 400, 408 (too slow).

    log: whether it is shown on standard error, as one line
    """
    if request.content_type != "application/json":
        raise HarnessError("the Content-Type must be application/json", status=415, code="unsupported_media_type")
    try:
        async with asyncio.timeout(seconds):
            raw = await request.read()
    except TimeoutError:
        raise HarnessError("the body did not come in time", status=408, code="body_timeout") from None
    except web.RequestPayloadError:
        raise BadRequest("the body is broken") from None
    if log:
        console.log(f"{request.method} {request.path} {' '.join(raw.decode('utf-8', 'replace').split())}")
    try:
        body = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def json_response(found: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")
    return web.Response(body=text, status=status, content_type="application/json", headers=headers)


def _is_open(request: web.Request, page: bool) -> bool:
    return request.path in _OPEN or (page and request.method in ("GET", "HEAD") and _is_page(request))


def _is_page(request: web.Request) -> bool:
    """Whether the route is one of the web page's files: never a path that answers anything else."""
    resource = request.match_info.route.resource
    return resource is not None and (resource.name or "").startswith(PAGE)


def _is_own(origin: str, host: str) -> bool:
    """Whether a page came from this very endpoint."""
    return origin.casefold().partition("://")[2] == host.casefold()


def _host(header: str) -> str:
    host = header.casefold()
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.rpartition(":")[0] or host


def _has_key(request: web.Request, key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    found = given.strip() if scheme.casefold() == "bearer" else request.headers.get("X-Api-Key", "")
    return hmac.compare_digest(found.encode("utf-8", "replace"), key.encode())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """1e999 is JSON, and infinity is not."""
    if math.isinf(value := float(text)):
        raise ValueError("a number out of range")
    return value
