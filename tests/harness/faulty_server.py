"""A model's server that misbehaves to the byte: each reply is a script of bytes, pauses and broken connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

RESET, CLOSE = "reset", "close"
Step = bytes | float | str  # bytes to send, seconds to wait, RESET or CLOSE


@dataclass(frozen=True)
class Reply:
    """steps: of one answer; after the last the connection stays open for another request."""

    steps: tuple[Step, ...]


@dataclass
class FaultyServer:
    """replies: one a request, the last again and again; a whole and a streamed form of each may differ."""

    whole: Sequence[Reply]
    streamed: Sequence[Reply]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: int = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                length = next((int(v) for k, v in fields.items() if k.lower() == "content-length"), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                self.bodies.append(body)
                replies = self.streamed if body.get("stream") else self.whole
                for step in replies[min(len(self.bodies), len(replies)) - 1].steps:
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    elif step == RESET:
                        writer.transport.abort()
                        return
                    elif step == CLOSE:
                        return
                    else:
                        writer.write(step)
                        await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultyServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()


# What a server that behaves sends


def http(body: bytes, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n" if data else b""


END = b"0\r\n\r\n"


def completion(message: Any, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": message} if isinstance(message, str) else message
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, **more,
    }  # fmt: skip


def delta(change: Any, finish: Any = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": change, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def event(chunk: Any) -> bytes:
    return b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n"


def as_whole(message: Any, finish: Any = "stop", **more: Any) -> Reply:
    return Reply((http(json.dumps(completion(message, finish, **more)).encode()),))


def as_stream(message: Any, finish: Any = "stop", piece: int = 5) -> Reply:
    """The same message in pieces."""
    message = {"role": "assistant", "content": message} if isinstance(message, str) else message
    chunks = [delta({"role": "assistant"})]
    for key in ("reasoning_content", "content"):
        text = message.get(key) if isinstance(message.get(key), str) else ""
        chunks += [delta({key: text[i : i + piece]}) for i in range(0, len(text), piece)]
    for i, call in enumerate(message.get("tool_calls") or []):
        chunks.append(delta({"tool_calls": [{"index": i} | call]}))
    chunks.append(delta({}, finish))
    return Reply((STREAM_HEAD, *(chunked(event(chunk)) for chunk in [*chunks, b"[DONE]"]), END))


def events(*chunks: Any, done: bool = True) -> Reply:
    return Reply((STREAM_HEAD, *(chunked(event(c)) for c in [*chunks, *([b"[DONE]"] if done else [])]), END))


def raw_events(*data: bytes) -> Reply:
    return Reply((STREAM_HEAD, *(chunked(d) for d in data), END))
