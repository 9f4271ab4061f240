"""What answers a batch's requests: the contract of the files in this folder, and the way of a request through the
harness that they share."""

from __future__ import annotations

import abc
import hashlib
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.batch.items import Item
from lowbit.harness import BadRequest, Harness, HarnessOptions, HttpUpstream, UpstreamFailed, text, urls
from lowbit.harness.responses import Responses
from lowbit.model_server import ModelOptions
from lowbit.threads import available_cores
from lowbit.units import MIB


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """model: an artifact that is served here. endpoints: URLs up to and with /v1, instead. endpoint_model: the model's
    name there, put into every request. key: what they are sent as a bearer token. ray_address: of a Ray cluster whose
    nodes are to serve the model. slots: requests at a time, of each server; None is the engine's to find. server: how
    llama.cpp's server is started. harness: bounds and layers of each answer."""

    model: str | None = None
    endpoints: tuple[str, ...] = ()
    endpoint_model: str | None = None
    key: str | None = None
    ray_address: str | None = None
    slots: int | None = None
    server: ModelOptions = field(default_factory=ModelOptions)
    harness: HarnessOptions = field(default_factory=HarnessOptions)


class NotReached(Exception):
    """The request never came to a model: no fault of the item's. after: seconds that the server asks to wait. final:
    waiting will not help (a key that is refused, a server that does not come up)."""

    def __init__(self, message: str, *, after: float = 0.0, final: bool = False) -> None:
        super().__init__(message)
        self.after, self.final = after, final


class Lost(Exception):
    """The model's server went away while it had the request, which may be why. machine: whether the whole machine did,
    or the process that looked after the server: then the request is seldom why."""

    def __init__(self, message: str, *, machine: bool = False) -> None:
        super().__init__(message)
        self.machine = machine


class Engine(abc.ABC):
    """An async context manager: entered, it can answer; left, what it started has ended."""

    name: ClassVar[str]

    def __init__(self, options: EngineOptions) -> None:
        self.options = options

    @property
    def slots(self) -> int:
        """Requests that it can have under way, at any moment; at least 1."""
        return self.options.slots or 1

    @property
    def probed(self) -> bool:
        """Whether fewer may be faster, which only a probe can tell."""
        return False

    def told(self) -> list[dict[str, Any]]:
        """Of each of its servers where it has several: "url", "slots", "answered", "state" and "why", for status."""
        return []

    def expect(self, longest: int) -> None:  # noqa: B027 (most engines have no use for it)
        """Before it is entered: the bytes of the longest request."""

    def place(self) -> str:
        """What its speed depends on beside the model: what a probe found is of there."""
        return f"{self.name} on {platform.node()}, {available_cores()} cores"

    @classmethod
    @abc.abstractmethod
    def suits(cls, options: EngineOptions) -> bool:
        """Whether it is the one for these options where no name is given."""

    @abc.abstractmethod
    async def deciding(self) -> dict[str, Any]:
        """What of it the answers depend on, as JSON: a batch goes on only with the same."""

    @abc.abstractmethod
    async def __aenter__(self) -> Self:
        """Raises LowbitError where it does not come up."""

    @abc.abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abc.abstractmethod
    async def ask(self, item: Item) -> dict[str, Any]:
        """The response's body in OpenAI's form. Raises HarnessError (the item's failure), NotReached, Lost."""

    @abc.abstractmethod
    async def ready(self) -> bool:
        """Whether a model answers just now."""

    @property
    def ended(self) -> str | None:
        """Why no model will answer any more, whatever one waits for; None while there is hope."""
        return None


class CarefulUpstream(HttpUpstream):
    """A server whose failures the batch deals with, not the harness: it can wait for minutes, and knows what else was
    under way."""

    async def ask(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises UpstreamFailed, of which nothing is asked again; NotReached, Lost."""
        try:
            return await super().ask(path, body, seconds)
        except UpstreamFailed as error:
            raise self._told(error) from error

    def _told(self, error: UpstreamFailed) -> Exception:
        import aiohttp

        if error.code == "upstream_unreachable":
            never = isinstance(error.__cause__, aiohttp.ClientConnectorError)
            return NotReached(error.message) if never else Lost(error.message)
        if error.answered in (429, 503):
            return NotReached(error.message, after=error.after)
        if error.answered in (401, 403):
            return NotReached(error.message, final=True)
        error.again = False
        return error


class Caller:
    """The way of an item through the harness to one server. here: whether the server is on this machine and would
    fetch what a request's URL names."""

    def __init__(self, upstream: HttpUpstream, harness: Harness, *, here: bool) -> None:
        self.upstream, self.harness, self._here = upstream, harness, here
        self._responses = Responses(harness)

    async def ask(self, item: Item) -> dict[str, Any]:
        """Raises HarnessError, NotReached, Lost."""
        body = {key: value for key, value in item.body.items() if key not in ("stream", "stream_options")}
        if self._here:
            urls.refuse(body)
        if item.url == "/v1/completions":
            return await text.complete(self.harness, self.upstream, body)
        if item.url == "/v1/responses":
            if body.get("previous_response_id"):
                raise BadRequest("items of a batch do not follow each other", param="previous_response_id")
            return await self._responses.create(body | {"store": False})
        return await self.harness.complete(body, check=item.check)

    async def ready(self) -> bool:
        try:
            await self.upstream.get("/models", seconds=10.0)
        except UpstreamFailed as error:  # one without this path answers too
            return error.answered is not None and error.answered < 500 and error.answered != 429
        return True


def identity(path: Path) -> str:
    """A file's name, size and the hash of its ends: a model of many GB is not read at every start."""
    return f"{path.name}, {path.stat().st_size} bytes, {ends(path)[:12]}"


def ends(path: Path) -> str:
    """SHA-256 of a file's first and last MiB."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as handle:
        digest.update(handle.read(MIB))
        handle.seek(max(0, size - MIB))
        digest.update(handle.read(MIB))
    return digest.hexdigest()
