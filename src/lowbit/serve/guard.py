"""Who may ask, and how much: hosts, keys, sizes, times, and URLs that would make the server fetch something.

A server on loopback is reached by every page that a browser has open. So a request must name a host that is served
here (else a name that was re-pointed at 127.0.0.1 would do), and a body must say that it is JSON, which a page of
another origin cannot say without asking first.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web

from lowbit.harness import BadRequest, HarnessError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OPEN = ("/health", "/v1/health")  # asked by those who have no key: supervisors, containers
_URL_KEYS = ("url", "file_url", "image_url", "video_url", "audio_url", "server_url")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host.strip("[]").casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def middleware(*, hosts: Collection[str], key: str | None) -> Any:
    """hosts: that the Host header may name, without ports; empty means any (the server has a key then)."""
    allowed = {host.casefold() for host in hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if allowed and _host(request.host) not in allowed:
                raise HarnessError("this host name is not served here", status=403, code="forbidden_host")
            if key is not None and request.path not in _OPEN and not _has_key(request, key):
                raise HarnessError("the API key is missing or wrong", status=401, code="invalid_api_key")
            return await handler(request)
        except HarnessError as error:
            return json_response(error.as_json(), status=error.status)
        except web.HTTPRequestEntityTooLarge:
            large = HarnessError("the body is too large", status=413, code="body_too_large")
            return json_response(large.as_json(), status=413)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            found = HarnessError(error.reason, status=error.status, code="not_found" if error.status == 404 else "http")
            return json_response(found.as_json(), status=error.status)

    return check


async def body_of(request: web.Request, seconds: float) -> dict[str, Any]:
    """The JSON object of a request. Raises HarnessError: 415 (not said to be JSON), 400, 408 (too slow)."""
    if request.content_type != "application/json":
        raise HarnessError("the Content-Type must be application/json", status=415, code="unsupported_media_type")
    try:
        async with asyncio.timeout(seconds):
            raw = await request.read()
    except TimeoutError:
        raise HarnessError("the body did not come in time", status=408, code="body_timeout") from None
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def refuse_urls(body: dict[str, Any]) -> None:
    """Images and the like must come inside the request (data:), never from an address that the server would fetch.

    Raises BadRequest naming the message.
    """
    messages = body.get("messages", body.get("input"))
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            for url in _urls(part):
                if not url.startswith("data:"):
                    raise BadRequest(
                        "a URL in a message must be a data: URL: nothing is fetched for a request",
                        param=f"messages[{i}]",
                    )


def json_response(found: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    text = json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")
    return web.Response(body=text, status=status, content_type="application/json", headers=headers)


def _urls(part: Any) -> list[str]:
    found, todo = [], [part]
    while todo:
        node = todo.pop()
        for name, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str) and name in _URL_KEYS:
                found.append(value)
            elif isinstance(value, dict):
                todo.append(value)
    return found


def _host(header: str) -> str:
    host = header.casefold()
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.rpartition(":")[0] or host


def _has_key(request: web.Request, key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    found = given.strip() if scheme.casefold() == "bearer" else request.headers.get("X-Api-Key", "")
    return hmac.compare_digest(found.encode("utf-8", "replace"), key.encode())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
