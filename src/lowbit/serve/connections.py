"""The door before aiohttp: how many connections may be open, and how long a request's head may take to come in.

Who opens connections and says nothing (or a byte now and then) takes no place from others: when all places are taken,
the connection that has been idle for longest makes room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


def quiet_logger() -> logging.Logger:
    """For aiohttp's own words: what it says of a malformed request quotes it, and that may be the body of one."""
    logger = logging.getLogger("lowbit.serve.http")
    if not logger.filters:
        logger.addFilter(_without_words)
    return logger


class Connections:
    """A factory of protocols for loop.create_server.

    inner:        makes aiohttp's protocols
    most:         connections open at a time
    head_seconds: from the first byte of a request (or from the connection) to the end of its head
    """

    def __init__(self, inner: Callable[[], asyncio.Protocol], *, most: int, head_seconds: float) -> None:
        self._inner, self.most, self.head_seconds = inner, most, head_seconds
        self.open: dict[_Connection, None] = {}  # in the order in which they were last at work

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self, self._inner())

    def has_room(self) -> bool:
        """Whether one more may come in; the one that has been idle for longest is closed for it."""
        if len(self.open) < self.most:
            return True
        idle = next((one for one in self.open if not one.requests), None)
        if idle is not None:
            idle.drop()
        return idle is not None


class _Connection(asyncio.Protocol):
    """Between the socket and aiohttp. requests: that are being answered."""

    def __init__(self, door: Connections, inner: asyncio.Protocol) -> None:
        self._door, self._inner, self.requests = door, inner, 0
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._door.has_room():
            transport.write(_FULL)
            transport.close()
            return
        self._transport = transport
        self._door.open[self] = None
        self._wait_for_head()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        if not self.requests and self._timer is None:
            self._wait_for_head()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._transport is not None else None

    def connection_lost(self, error: Exception | None) -> None:
        self._forget_timer()
        if self._transport is not None:
            self._door.open.pop(self, None)
            self._transport = None
            self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def begun(self) -> None:
        """A request's head is whole."""
        self.requests += 1
        self._forget_timer()

    def ended(self) -> None:
        self.requests -= 1
        if self in self._door.open:
            self._door.open.pop(self)
            self._door.open[self] = None

    def drop(self) -> None:
        self._door.open.pop(self, None)
        if self._transport is not None:
            self._transport.abort()

    def _wait_for_head(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._door.head_seconds, self.drop)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_CONNECTION = web.RequestKey("connection", _Connection)


def begun(request: web.Request) -> None:
    """To be called when a request's head is whole, and ended() when it was answered."""
    if (connection := _of(request)) is not None:
        connection.begun()
        request[_CONNECTION] = connection


def ended(request: web.Request) -> None:
    if (connection := request.get(_CONNECTION)) is not None:
        connection.ended()


def _of(request: web.Request) -> _Connection | None:
    protocol: Any = request.transport.get_protocol() if request.transport is not None else None
    return protocol if isinstance(protocol, _Connection) else None


def _without_words(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True
