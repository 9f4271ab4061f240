"""The process on a node of a Ray cluster that has a model's server there and answers requests: a Ray actor.

It knows no journal and decides nothing. What crosses the network are requests, responses and, as plain values, what
went wrong; exceptions would come out as Ray's.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lowbit
from lowbit.batch.engines import _shipping as shipping
from lowbit.batch.engines._shipping import Needed
from lowbit.batch.engines._vllm import Vllm
from lowbit.batch.engines.base import Engine, EngineOptions, Lost, NotReached
from lowbit.batch.engines.local import Local
from lowbit.batch.items import Item
from lowbit.errors import LowbitError
from lowbit.harness import HarnessError, Trace
from lowbit.model_server import files_of

CONCURRENCY = 5000  # calls of a worker at once: as many slots as there may be, and those that look after it


@dataclass(frozen=True)
class Work:
    """What a worker serves. options: as the batch's, with paths of the one who sent it. files: that they name; those of
    a checkpoint's folder have names below it. folder: that folder, or None. longest: bytes of the longest request.
    vllm: whether by vLLM, and not llama.cpp."""

    options: EngineOptions
    files: tuple[Needed, ...]
    folder: str | None
    longest: int
    vllm: bool


class Worker:
    """The actor. Ray makes and ends it; every method may be called at the same time as any other."""

    def __init__(self) -> None:
        self._coming: dict[str, shipping.Receiving] = {}  # files on their way, by their hashes
        self._engine: Engine | None = None
        self._checks: dict[bytes, Any] = {}

    async def version(self) -> str:
        return lowbit.__version__

    async def lacks(self, files: tuple[Needed, ...]) -> list[int]:
        """Which of them this machine does not have by their paths."""
        here = await asyncio.to_thread(lambda: [needed.here() for needed in files])
        return [i for i, is_here in enumerate(here) if not is_here]

    async def wants(self, needed: Needed, digest: str) -> bool:
        """Whether the cache does not have it: it is then to be sent, piece by piece. Raises CannotWrite."""
        if await asyncio.to_thread(shipping.cached, needed, digest):
            return False
        self._coming[digest] = shipping.Receiving(needed, digest)
        return True

    async def take(self, digest: str, piece: bytes) -> None:
        """Raises CannotWrite."""
        await asyncio.to_thread(self._coming[digest].write, piece)

    async def whole(self, digest: str) -> None:
        """All pieces of it came. Raises BadFile, CannotWrite."""
        await asyncio.to_thread(self._coming.pop(digest).finish)

    async def serve(self, work: Work, digests: dict[str, str], cores: int) -> dict[str, Any]:
        """Starts the server. digests: by their paths, of the files that are in the cache. cores: that Ray gave it.
        What it has: {"slots", "pid"}. {"failed": in a line} where it does not come up."""
        try:
            options = await asyncio.to_thread(placed, work, digests)
            if options.server.threads is None:
                options = replace(options, server=replace(options.server, threads=max(1, cores)))
            engine: Engine = Vllm(options) if work.vllm else Local(options)
            engine.expect(work.longest)
            await engine.__aenter__()
        except LowbitError as error:
            return {"failed": str(error)}
        self._engine = engine
        return {"slots": engine.slots, "pid": os.getpid()}

    async def pulse(self) -> dict[str, Any]:
        """{"ready": whether the model answers just now, "ended": why it never will again, or None}."""
        assert self._engine is not None
        ended = self._engine.ended
        return {"ready": ended is None and await self._engine.ready(), "ended": ended}

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One of {"body"}, {"failed"}, {"not_reached"}, {"lost"}, {"refused"}; ``answer`` turns it into what Engine.ask
        does."""
        assert self._engine is not None
        try:
            item = Item(**request | {"check": self._check(request["check"])})
        except ImportError as error:
            return {"refused": f"a node of the cluster does not have what --schema names: {error}"}
        try:
            return {"body": await self._engine.ask(item)}
        except NotReached as error:
            return {"not_reached": {"message": str(error), "after": error.after, "final": error.final}}
        except Lost as error:
            return {"lost": {"message": str(error), "machine": error.machine}}
        except HarnessError as error:
            found = {"message": error.message, "status": error.status, "code": error.code, "param": error.param}
            return {"failed": found, "trace": None if error.trace is None else vars(error.trace)}

    async def close(self) -> None:
        for coming in self._coming.values():
            coming.drop()
        self._coming.clear()
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.__aexit__(None, None, None)

    def _check(self, pickled: bytes | None) -> Any:
        """The same function for all items of a batch."""
        if pickled is None:
            return None
        if pickled not in self._checks:
            import ray.cloudpickle as cloudpickle

            self._checks = {pickled: cloudpickle.loads(pickled)}
        return self._checks[pickled]


class Refused(NotReached):
    """No worker will take the batch's requests. Waiting does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, final=True)


def request(item: Item) -> dict[str, Any]:
    """An item as ``Worker.ask`` takes it."""
    check = item.check
    if check is not None:
        import ray.cloudpickle as cloudpickle

        check = cloudpickle.dumps(check)
    return {"custom_id": item.custom_id, "url": item.url, "body": item.body, "check": check, "shared": item.shared}


def answer(found: dict[str, Any]) -> dict[str, Any]:
    """The body of what ``Worker.ask`` gave. Raises HarnessError, NotReached, Refused, Lost."""
    if "refused" in found:
        raise Refused(found["refused"])
    if "not_reached" in found:
        raise NotReached(**found["not_reached"])
    if "lost" in found:
        raise Lost(**found["lost"])
    if "failed" in found:
        trace = found["trace"]
        raise HarnessError(**found["failed"], trace=None if trace is None else Trace(**trace))
    body: dict[str, Any] = found["body"]
    return body


def placed(work: Work, digests: dict[str, str]) -> EngineOptions:
    """The options with the paths that its files have on this machine."""
    at = {
        needed.path: shipping.place(needed, digests[needed.path]) if needed.path in digests else Path(needed.path)
        for needed in work.files
    }
    moved: Any = {name: at[str(path)] for name, path in files_of(work.options.server).items()}
    server = replace(work.options.server, **moved)
    model = work.options.model
    assert model is not None
    if work.folder is None:
        model = str(at[model])
    elif any(path.startswith(work.folder + os.sep) for path in digests):
        inside = [needed for needed in work.files if needed.path.startswith(work.folder + os.sep)]
        model = str(shipping.as_folder((needed.name, at[needed.path]) for needed in inside))
    return replace(work.options, model=model, server=server)
