"""The model's server: any OpenAI-compatible one, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from lowbit.errors import BadOption
from lowbit.harness.failures import UpstreamFailed

_LONGEST_LINE = 4 << 20  # bytes of one event of a stream
_LARGEST = 64 << 20  # bytes of a whole answer


class Upstream(Protocol):
    """name: for people. holds: what it is known to do: "grammar" (what it generates under a schema follows it).
    refused: what it was found not to do: "grammar", "required" (tool_choice), "tools" (its template has none).
    dialect: how the model writes tool calls, where that is known."""

    name: str
    dialect: str | None
    holds: set[str]
    refused: set[str]

    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]: ...

    def stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]: ...


class HttpUpstream:
    """url: up to and with /v1. key: sent as a bearer token. model: put into every request, where it is given.

    A context manager; one connection pool for all requests. Raises BadOption where the URL is none.
    """

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None, connections: int = 256) -> None:
        if not url.startswith(("http://", "https://")):
            raise BadOption("not the URL of a server", found=url[:100], expected="http://HOST:PORT/v1")
        self.url, self.model = url.rstrip("/"), model
        self.name = model or shown(self.url)
        self.dialect: str | None = None
        self.holds: set[str] = set()
        self.refused: set[str] = set()
        self.key = key
        self._connections = connections
        self._session: Any = None

    async def __aenter__(self) -> HttpUpstream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """A whole chat completion. Raises UpstreamFailed."""
        return await self.ask("/chat/completions", body, seconds)

    def stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a chat completion. Raises UpstreamFailed, also where the stream ends before it is whole."""
        return self.chunks("/chat/completions", body, seconds)

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.url.removesuffix("/v1")

    async def get(self, path: str, seconds: float = 30.0, *, root: str | None = None) -> dict[str, Any]:
        """What a GET of ``path`` gives, a JSON object. Raises UpstreamFailed."""
        async with _Exchange(
            self._client(), "GET", (root or self.url) + path, None, self._headers, seconds
        ) as response:
            return await self._object(response)

    async def ask(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What a POST of a request gives, a JSON object. Raises UpstreamFailed."""
        return await self.post(path, self._body(body, stream=False), seconds)

    async def post(self, path: str, body: dict[str, Any], seconds: float, *, root: str | None = None) -> dict[str, Any]:
        """What a POST of any JSON object gives, a JSON object. Raises UpstreamFailed."""
        url = (root or self.url) + path
        async with _Exchange(self._client(), "POST", url, body, self._headers, seconds) as response:
            return await self._object(response)

    async def chunks(self, path: str, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        """The events of a POST that is answered by a stream, up to [DONE]. Raises UpstreamFailed."""
        body = self._body(body, stream=True)
        body.setdefault("stream_options", {"include_usage": True})
        async with _Exchange(self._client(), "POST", self.url + path, body, self._headers, seconds) as response:
            if response.status >= 400:
                raw = await _read(response, _LARGEST)
                raise self._refused(response.status, _json(raw), raw, response.headers.get("Retry-After"))
            finished = False
            async for data in events(response.content):
                if data == b"[DONE]":
                    return
                chunk = _json(data)
                if not isinstance(chunk, dict):
                    raise UpstreamFailed("the model's server sent a broken event", code="upstream_malformed")
                if "error" in chunk and "choices" not in chunk:
                    raise self._refused(502, chunk, data)
                finished = finished or _finish_of(chunk) is not None
                yield chunk
            if not finished:
                raise UpstreamFailed("the stream broke off", code="upstream_broken_stream")

    async def _object(self, response: Any) -> dict[str, Any]:
        raw = await _read(response, _LARGEST)
        found = _json(raw)
        if response.status >= 400:
            raise self._refused(response.status, found, raw, response.headers.get("Retry-After"))
        if not isinstance(found, dict):
            raise UpstreamFailed("the model's server sent no JSON object", code="upstream_malformed")
        if "error" in found and "choices" not in found:
            raise self._refused(502, found, raw)
        return found

    def _refused(self, status: int, found: Any, raw: bytes, retry_after: str | None = None) -> UpstreamFailed:
        error = found.get("error") if isinstance(found, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        said = message if isinstance(message, str) else raw[:200].decode("utf-8", "replace")
        if self.key:
            said = said.replace(self.key, "...")  # some servers quote the key that they refuse
        # 4xx is about the request and goes to the caller as it is; but for "too many" and "took too long", and for a
        # key that is refused: it is ours, and the caller's may be right.
        final = 400 <= status < 500 and status not in (408, 425, 429)
        text = f"the model's server answered {status}: {' '.join(said.split())[:500]}"
        as_it_is = (final and status not in (401, 403)) or status == 429
        failed = UpstreamFailed(text, status=status if as_it_is else 502, again=not final)
        failed.after, failed.answered = _seconds(retry_after), status
        return failed

    def _body(self, body: dict[str, Any], *, stream: bool) -> dict[str, Any]:
        body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")} | {"stream": stream}
        return body | ({"model": self.model} if self.model else {})

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def _client(self) -> Any:
        if self._session is None:
            import aiohttp

            connector = aiohttp.TCPConnector(limit=self._connections)
            # Redirects could lead anywhere: the caller named one server.
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True, trust_env=False)
        return self._session


class _Exchange:
    """One request, with every way in which it can fail turned into UpstreamFailed."""

    def __init__(
        self,
        client: Any,
        method: str,
        url: str,
        body: dict[str, Any] | None,
        headers: dict[str, str],
        seconds: float,
    ) -> None:
        self._client, self._method, self._url, self._seconds = client, method, url, seconds
        self._headers = headers | ({"Content-Type": "application/json"} if body is not None else {})
        self._data = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        self._response: Any = None
        self._timeout: Any = None

    async def __aenter__(self) -> Any:
        self._timeout = asyncio.timeout(self._seconds)
        await self._timeout.__aenter__()
        try:
            self._response = await self._client.request(
                self._method, self._url, data=self._data, headers=self._headers, allow_redirects=False, timeout=None
            )
            if 300 <= self._response.status < 400:
                raise UpstreamFailed("the model's server redirects, which is not followed", again=False)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._response

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._response is not None:
            if error is None:
                self._response.release()
            else:
                self._response.close()  # half-read: the connection cannot be used again
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            message = f"the model's server took more than {self._seconds:.0f} s"
            raise UpstreamFailed(message, status=504, code="upstream_timeout") from None
        if error is not None and _is_network(error):
            raise UpstreamFailed(f"the model's server: {_said(error)}", code="upstream_unreachable") from error


async def events(content: Any) -> AsyncIterator[bytes]:
    """The data of a stream of server-sent events (HTML Living Standard, 9.2), one event at a time."""
    pending: list[bytes] = []
    buffer, size = b"", 0
    async for piece in content.iter_any():
        buffer += piece
        if b"\r" in buffer:  # a line may end in CR LF, LF or CR; a last CR may be the half of CR LF
            last = b"\r" if buffer.endswith(b"\r") else b""
            whole = buffer[:-1] if last else buffer
            buffer = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + last
        if len(buffer) > _LONGEST_LINE:
            raise UpstreamFailed("the model's server sent an endless line", code="upstream_malformed")
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                pending.append(line[5:].removeprefix(b" "))
                size += len(line)
                if size > _LONGEST_LINE:
                    raise UpstreamFailed("the model's server sent an endless event", code="upstream_malformed")
            elif not line and pending:
                yield b"\n".join(pending)
                pending, size = [], 0
    if buffer.startswith(b"data:"):
        pending.append(buffer[5:].strip())
    if pending:
        yield b"\n".join(pending)


async def _read(response: Any, most: int) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > most:
            raise UpstreamFailed("the model's server sent an endless answer", code="upstream_malformed")
        parts.append(part)
    return b"".join(parts)


def shown(url: str) -> str:
    """A URL for people: without the user and password that it may have."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for: seconds, or a date (RFC 9110, 10.2.3); 0 where it asks for nothing."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(int(retry_after)))
    except (ValueError, OverflowError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _finish_of(chunk: dict[str, Any]) -> str | None:
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice.get("finish_reason") if isinstance(choice, dict) else None


def _is_network(error: BaseException) -> bool:
    import aiohttp

    return isinstance(error, aiohttp.ClientError | OSError | asyncio.IncompleteReadError)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
