"""Asking a server over HTTP: JSON in, JSON or a stream of events out, and whatever goes wrong in one line.

A server is a stranger too: how much is read of it is bounded, redirects are not followed, proxies of the environment
are not used for addresses of this machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.units import MIB

KEY_VARIABLE = "OPENAI_API_KEY"
_LARGEST = 256 * MIB  # a whole vocabulary of 262,144 log-probabilities takes some 30 MB
_LARGEST_EVENT = 64 * MIB


class HttpFailed(RuntimeFailed):
    """status: of the answer, None where there was none. retry_after: seconds, where the server says so."""

    def __init__(self, what: str, *, status: int | None = None, retry_after: float | None = None, **more: Any) -> None:
        super().__init__(what, **more)
        self.status, self.retry_after = status, retry_after


class Http:
    """One server. A context manager; close() lets go of its connections. Any thread may use it.

    root:    'http://127.0.0.1:8080', without a slash at the end; paths begin with one
    key:     sent as a bearer token
    timeout: seconds to wait for an answer, or for the next piece of a stream
    """

    def __init__(self, root: str, *, key: str | None = None, timeout: float = 600.0) -> None:
        self.root = root
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx2.Client(
                headers=headers,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 15.0)),
                follow_redirects=False,
                trust_env=not is_loopback(root),
            )
            self._client.build_request("GET", root)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError) as error:
            raise BadOption("not a URL that can be asked", where=root, found=error) from None

    def close(self) -> None:
        self._client.close()

    @property
    def closed(self) -> bool:
        return bool(self._client.is_closed)

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON of a GET. Raises HttpFailed."""
        return self._whole("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Any:
        """The JSON of a POST of JSON. Raises HttpFailed."""
        return self._whole("POST", path, body, timeout)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a POST that is answered by a stream, up to [DONE].

        Raises HttpFailed, also where an event is an error or no JSON object, and where the stream ends without [DONE].
        """
        with self._asked("POST", path, body, None) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                self._failed(path, "the server sends no stream", found=_head(_read(response, path, self)))
            for event in self._events(response, path):
                if event == "[DONE]":
                    return
                found = self._object(path, event)
                if isinstance(found.get("error"), dict | str):
                    self._failed(path, "the server broke off", found=_message(found))
                yield found
            self._failed(path, "the stream ended in the middle", expected="[DONE] at its end")

    def _whole(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None) -> Any:
        with self._asked(method, path, body, timeout) as response:
            raw = _read(response, path, self)
        if not raw.strip():
            self._failed(path, "the server answered nothing", status=response.status_code)
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            self._failed(path, "the server's answer is no JSON", found=_head(raw), status=response.status_code)

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None
    ) -> Iterator[httpx2.Response]:
        if self.closed:
            raise RuntimeFailed("this connection was closed", where=self.root)
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            with self._client.stream(method, self.root + path, json=body, **options) as response:
                if not response.is_success:
                    self._refused(path, response)
                yield response
        except httpx2.ConnectError as error:
            hint = "Is it running, and is the address right?"
            self._failed(path, "the server cannot be reached", found=_head(str(error)), hint=hint)
        except httpx2.TimeoutException:
            self._failed(path, "the server took too long", hint="Give it a longer timeout, or a smaller request")
        except (httpx2.TransportError, httpx2.DecodingError, httpx2.StreamError) as error:
            self._failed(path, "the server broke off", found=f"{type(error).__name__}: {_head(str(error))}")

    def _refused(self, path: str, response: httpx2.Response) -> None:
        status = response.status_code
        said = _read(response, path, self)
        try:
            message = _message(json.loads(said))
        except (ValueError, RecursionError):
            message = _head(said)
        hint = None
        if status in (401, 403):
            hint = f"Give the API key in the environment variable {KEY_VARIABLE}, or name another one"
        wait = response.headers.get("retry-after", "")
        found = f"{status} {message}".strip()
        retry_after = float(wait) if wait.isdigit() else None
        what = "the server refuses" if status < 500 else "the server failed"
        self._failed(path, what, found=found, hint=hint, status=status, retry_after=retry_after)

    def _events(self, response: httpx2.Response, path: str) -> Iterator[str]:
        """The data of server-sent events (HTML Living Standard, 9.2)."""
        data: list[bytes] = []
        rest, size = b"", 0
        for piece in response.iter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            size += len(piece)
            if size > _LARGEST_EVENT:
                self._failed(path, "an event of the stream has no end", found=f"{size} bytes")
            for line in lines:
                line = line.rstrip(b"\r")
                if line.startswith(b"data:"):
                    data.append(line[5:].removeprefix(b" "))
                elif not line and data:
                    yield b"\n".join(data).decode("utf-8", "replace")
                    data, size = [], len(rest)
        if rest.startswith(b"data:"):
            data.append(rest[5:].strip())
        if data:
            yield b"\n".join(data).decode("utf-8", "replace")

    def _object(self, path: str, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self._failed(path, "an event of the stream is no JSON object", found=_head(text))
        return found

    def _failed(self, path: str, what: str, **more: Any) -> Any:
        raise HttpFailed(what, where=self.root + path, **more)


def is_loopback(url: str) -> bool:
    """Whether a URL means this machine by its loopback address or name."""
    try:
        host = httpx2.URL(url).host
    except (httpx2.InvalidURL, ValueError):
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def key_for(url: str, variable: str | None = None) -> str | None:
    """The API key from the environment.

    variable: its name; None means OPENAI_API_KEY, whose value is not sent in clear text to another machine.
    Raises BadOption where a variable that is named is not set.
    """
    if variable is not None:
        if not (key := os.environ.get(variable)):
            raise BadOption("the environment variable with the API key is not set", found=variable)
        return key
    safe = url.lower().startswith("https://") or is_loopback(url)
    return (os.environ.get(KEY_VARIABLE) or None) if safe else None


def _read(response: httpx2.Response, path: str, http: Http) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > _LARGEST:
            http._failed(path, "the server's answer has no end", found=f"more than {_LARGEST} bytes")
    return b"".join(parts)


def _message(found: Any) -> str:
    """What an error object says: {"error": {"message"}}, {"error": "..."}, {"message"} or {"detail"}."""
    if isinstance(found, dict):
        error = found.get("error", found)
        if isinstance(error, dict):
            error = error.get("message", error.get("detail", error))
        found = error
    return _head(found if isinstance(found, str) else json.dumps(found))


def _head(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text[:400].decode("utf-8", "replace")
    return " ".join(text.split())[:200]
