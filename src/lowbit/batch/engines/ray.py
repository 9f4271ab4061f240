"""A model on the nodes of a Ray cluster: llama.cpp's server on each, or vLLM's on each GPU.

The journal stays where the batch runs, the one place that says what is done. A worker, a Ray actor, is put on each node
that has cores to give; it starts the server there as the engine ``local`` does, and gets each request, when it has a
free slot, from here. Nothing is queued on the cluster, so what a node takes along when it dies is what was under way.

Actors, and not Ray Data: that runs a pipeline of its own, with its own retries of whole blocks. It cannot tell which
items of a block were answered when a node died, asks them all again, and hands results over in blocks. Here what was
committed is never asked again, a request that kills servers is found, and a batch goes on after its own process was
killed. Ray does not restart workers either (max_restarts=0): only who starts a new one knows what the old one had.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit import console, model_server
from lowbit import ray_cluster as cluster
from lowbit.batch.engines import _vllm
from lowbit.batch.engines._ray_place import Place
from lowbit.batch.engines._ray_worker import Refused, Work
from lowbit.batch.engines._shipping import Needed, Sending
from lowbit.batch.engines.base import Engine, EngineOptions, NotReached, identity
from lowbit.batch.engines.local import Local
from lowbit.batch.items import Item
from lowbit.checkpoint import resolve
from lowbit.errors import BadOption, RuntimeFailed

_EVERY = 1.0  # seconds between two looks at the cluster's nodes
_SAY_AFTER = 10.0  # seconds without any worker
_HEADLESS, _PARTING = 30.0, 20.0  # seconds without the head until the batch is given up, and for the end of a session


class Ray(Engine):
    name: ClassVar[str] = "ray"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        if options.model is None or options.endpoints:
            raise BadOption("a cluster serves a model of its own", where="--engine ray",
                            found=f"--endpoint {options.endpoints[0]}" if options.endpoints else "no model",
                            expected="--model MODEL, and no --endpoint")  # fmt: skip
        cluster.library()
        self._folder = _checkpoint(options.model)
        if self._folder is not None:
            _vllm.check(options)
            self.options = replace(options, model=str(self._folder.absolute()))
        else:
            path = model_server.artifact(options.model).absolute()
            self.options = replace(options, model=str(path), server=model_server.companions(path, options.server))
        self._longest, self._joined = 0, False
        self._places: dict[tuple[str, int], Place] = {}
        self._caring: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._no_head: str | None = None
        self._changed = asyncio.Condition()

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return False  # only where it is named

    @property
    def address(self) -> str:
        return cluster.address_of(self.options.ray_address)

    @property
    def slots(self) -> int:
        return max(1, sum(place.room for place in self._places.values()))

    def expect(self, longest: int) -> None:
        self._longest = longest

    def place(self) -> str:
        return f"ray at {self.address}"

    def told(self) -> list[dict[str, Any]]:
        return [place.told() for place in self._places.values()]

    async def deciding(self) -> dict[str, Any]:
        """As of the engine ``local``: a batch may go on on one machine, and the other way round."""
        if self._folder is None:
            return await Local(self.options).deciding()
        digest = hashlib.sha256()
        for path in _files_of(self._folder):
            digest.update(f"{path.relative_to(self._folder)}\0{identity(path)}\n".encode())
        template = self.options.server.template
        named = {} if template is None else {"chat_template": identity(template)}
        found = f"{self._folder.name}, {digest.hexdigest()[:12]}"
        return {"model": found, "kv": self.options.server.kv_type, **named}

    async def __aenter__(self) -> Self:
        self._joined = await asyncio.to_thread(cluster.connect, self.address)
        cluster.keep_signals()
        self._places, self._no_head, self._nodes = {}, None, 0
        try:
            work = await asyncio.to_thread(self._work)
            put = cluster.library().put
            sending = {needed.path: Sending(needed, put) for needed in work.files}
            self._tasks = [asyncio.create_task(self._look_after(work, sending)), asyncio.create_task(self._heed_head())]
            await self._first()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *self._caring.values()]
        while pending := [task for task in tasks if not task.done()]:
            for task in pending:  # again: Python 3.11's wait_for may swallow one
                task.cancel()
            await asyncio.wait(pending, timeout=1.0)
        await asyncio.gather(*(place.close() for place in self._places.values()), return_exceptions=True)
        self._tasks, self._caring = [], {}
        if self._joined:
            self._joined = False
            with contextlib.suppress(TimeoutError):
                await cluster.aside(cluster.library().shutdown, _PARTING)

    async def ask(self, item: Item) -> dict[str, Any]:
        tried: NotReached | None = None
        while True:
            if self._no_head is not None:
                raise NotReached(self._no_head, final=True)
            place = await self._free(tried)
            try:
                return await place.ask(item)
            except Refused:
                raise
            except NotReached as error:  # its server is being started again
                tried = error
            finally:
                await self._tell()

    async def ready(self) -> bool:
        return self._no_head is not None or any(place.room for place in self._places.values())  # ask() says why

    @property
    def ended(self) -> str | None:
        return self._no_head

    # Nodes

    def _work(self) -> Work:
        if self._folder is not None:
            files = [Needed.of(path, str(path.relative_to(self._folder))) for path in _files_of(self._folder)]
        else:
            files = [Needed.of(Path(str(self.options.model)))]
        server = self.options.server
        absolute: Any = {name: path.absolute() for name, path in model_server.files_of(server).items()}
        files += [Needed.of(path) for path in absolute.values()]
        options = replace(self.options, server=replace(server, **absolute), ray_address=None, key=None)
        folder = None if self._folder is None else str(self._folder.absolute())
        return Work(options, tuple(files), folder, self._longest, vllm=self._folder is not None)

    async def _look_after(self, work: Work, sending: dict[str, Sending]) -> None:
        """Gives every node its workers, those that come later too, for as long as the batch runs."""
        while True:
            with contextlib.suppress(Exception):  # of Ray and the network; the next look may go better
                alive = {node.id: node for node in await cluster.aside(cluster.nodes, _HEADLESS)}
                for node in alive.values():
                    for number in range(_workers(node, work)):
                        key = (node.id, number)
                        if key not in self._places:
                            self._places[key] = Place(node, number, work, sending, self._tell)
                            self._caring[key] = asyncio.create_task(self._places[key].care())
                for (node_id, _), place in self._places.items():
                    place.node_is(node_id in alive)
                self._nodes = len(alive)
            await self._tell()
            await asyncio.sleep(_EVERY)

    _nodes = 0  # that are alive

    async def _heed_head(self) -> None:
        """Ends the batch for now where the head is gone: Ray would end the whole process, after a minute."""
        heard = time.monotonic()
        while self._no_head is None:
            if await asyncio.to_thread(cluster.head_answers):
                heard = time.monotonic()
            elif time.monotonic() - heard > _HEADLESS:
                self._no_head = f"the head of the cluster did not answer for {_HEADLESS:.0f} seconds"
                for place in self._places.values():
                    place.node_is(False)
            await asyncio.sleep(_EVERY)

    async def _first(self) -> None:
        """Returns when one worker answers. Raises RuntimeFailed where none will."""
        begun, told = time.monotonic(), False
        while not any(place.room for place in self._places.values()):
            if self._no_head is not None:
                raise RuntimeFailed(self._no_head, where=self.place())
            failed = [place.failed for place in self._places.values() if place.failed is not None]
            if failed and len(failed) == len(self._places):
                raise RuntimeFailed("no worker comes up", where=self.place(), found=failed[0])
            if self._nodes and not self._places:
                wanted = "a GPU: vLLM serves checkpoints" if self._folder else "a core that Ray may give away"
                raise RuntimeFailed("no node can serve it", where=self.place(), found=f"{self._nodes} nodes",
                                    expected=f"one with {wanted}")  # fmt: skip
            if not told and time.monotonic() - begun > _SAY_AFTER:
                told = True
                said = "; ".join(f"{place.name}: {place.why}" for place in self._places.values())
                console.log(f"Waiting for workers on the cluster: {said or 'no node yet'}")
            await self._wait_for_change()

    async def _free(self, tried: NotReached | None) -> Place:
        """The worker with the most free slots. Raises NotReached where none answers."""
        while True:
            awake = [place for place in self._places.values() if place.room]
            if not awake:
                known = next((place.why for place in self._places.values() if place.why), None)
                why = str(tried) if tried is not None else known or "no worker on the cluster answers"
                raise NotReached(why, after=0.5)
            best = max(awake, key=lambda place: place.room - place.under_way)
            if best.under_way < best.room:
                return best
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _workers(node: cluster.Node, work: Work) -> int:
    """One with all cores of a node; vLLM's, one for each GPU."""
    return int(node.gpus) if work.vllm else int(node.cpus >= 1)


def _checkpoint(model: str) -> Path | None:
    """The folder of safetensors that ``model`` is, or None where it means a GGUF. Raises NotFound."""
    folder = Path(model).expanduser()
    path = folder if folder.is_dir() else resolve(model)
    if not path.is_dir() or any(path.glob("*.gguf")) or not (path / "config.json").is_file():
        return None
    return path if any(path.glob("*.safetensors")) else None


def _files_of(folder: Path) -> list[Path]:
    """What vLLM may read of a checkpoint: no hidden files, and nothing that a pickle may be in."""
    suffixes = (".safetensors", ".json", ".jinja", ".model", ".txt")
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in suffixes and not p.name.startswith("."))


ENGINE = Ray
