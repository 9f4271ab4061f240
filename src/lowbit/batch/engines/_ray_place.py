"""One worker's place on the cluster, as the engine ``ray`` sees it: filled, watched, and filled again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import lowbit
from lowbit import console
from lowbit import ray_cluster as cluster
from lowbit.batch.engines._ray_worker import CONCURRENCY, Refused, Work, Worker, answer, request
from lowbit.batch.engines._shipping import Sending
from lowbit.batch.engines.base import Lost, NotReached
from lowbit.batch.items import Item

_PULSE, _PATIENCE = 1.0, 30.0  # seconds between two questions to a worker, and for an answer
_REST, _LONGEST = 1.0, 60.0  # seconds before a new worker, doubled each time that none comes up
_MAKE, _CLOSE = 60.0, 20.0  # seconds for the cluster to take note of a worker, and for one to end its server


class _Gone(Exception):
    """The worker is no more; the text says why."""


class Place:
    """A node's, or one GPU's of it. ``care`` keeps a worker there.

    name: for people. slots: of the worker that is there. answered, under_way: requests. alive: whether the node is.
    failed: why no worker came up yet, None where one did. why: it does not answer just now, for people
    """

    def __init__(
        self, node: cluster.Node, number: int, work: Work, sending: dict[str, Sending],
        on_change: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.name = node.address + (f", GPU {number}" if work.vllm else "")
        self.slots = self.under_way = self.answered = 0
        self.alive = True
        self.failed: str | None = None
        self.why: str | None = "a worker is to come"
        self._node, self._work, self._sending, self._on_change = node, work, sending, on_change
        self._ready, self._state = False, "starts"
        self._handle: Any = None
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def room(self) -> int:
        """Requests that it may have under way now."""
        return self.slots if self._ready else 0

    def told(self) -> dict[str, Any]:
        """For status."""
        return {
            "url": f"node {self.name}", "slots": self.slots, "answered": self.answered, "state": self._state,
            "why": self.why,
        }  # fmt: skip

    async def care(self) -> None:
        """Until the node is gone."""
        rest = _REST
        while self.alive:
            came = False
            try:
                await self._fill()
                came = True
                await self._watch()
            except Exception as error:  # of Ray, of the network, of the worker: people are told, and another is made
                self._lost(cluster.said(error))
            await self._on_change()
            rest = _REST if came else min(_LONGEST, 2 * rest)
            await asyncio.sleep(rest)
        self._state, self.why = "gone", "the node is gone"
        await self._on_change()

    def node_is(self, alive: bool) -> None:
        """What the cluster says of the node."""
        if self.alive and not alive:
            self.alive = False
            self._end(self._gone, "the node is gone")

    async def ask(self, item: Item) -> dict[str, Any]:
        """Raises HarnessError; NotReached where its server is away; Lost."""
        self.under_way += 1
        handle, gone = self._handle, self._gone
        reference = None
        try:
            reference = handle.ask.remote(request(item))
            body = answer(await self._or_gone(reference, gone))
        except asyncio.CancelledError:
            if reference is not None:
                cluster.later(functools.partial(cluster.library().cancel, reference))
            raise
        except cluster.library().exceptions.RayError as error:
            self._end(gone, cluster.said(error))
            raise Lost(f"{self.name}: {cluster.said(error)}", machine=True) from error
        except _Gone as error:
            raise Lost(f"{self.name}: {error}", machine=True) from error
        except Refused:
            raise
        except (NotReached, Lost) as error:
            self._pause(str(error))
            raise
        finally:
            self.under_way -= 1
        self.answered += 1
        return body

    async def close(self) -> None:
        """Has the worker end its server, and ends it."""
        handle, self._handle, self._ready = self._handle, None, False
        if handle is None:
            return
        if self.alive:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(_got(handle.close.remote()), _CLOSE)
        with contextlib.suppress(Exception):
            await cluster.aside(functools.partial(cluster.library().kill, handle), _CLOSE)

    # The worker

    async def _fill(self) -> None:
        """Starts a worker and its server. Raises RayError, OSError, _Gone."""
        self._gone = asyncio.get_running_loop().create_future()
        self._state = "starts"
        if self.failed is None:  # else that is what people want to know
            self.why = "waits for a GPU" if self._work.vllm else "waits for the node's cores"
        self._handle = await cluster.aside(self._made, _MAKE)
        found = await self._call(self._handle.version.remote())
        if found != lowbit.__version__:
            raise _Gone(f"lowbit {found} is on this node, {lowbit.__version__} where the batch runs")
        digests = await self._send()
        self.why = "loads the model"
        told = await self._call(self._handle.serve.remote(self._work, digests, int(self._node.cpus)))
        if "failed" in told:
            raise _Gone(told["failed"])
        self.slots, self.failed, self.why, self._state, self._ready = told["slots"], None, None, "answers", True
        console.log(f"Worker on {self.name}: {self.slots} requests at a time")
        await self._on_change()

    def _made(self) -> Any:
        ray = cluster.library()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        wanted = {"num_gpus": 1, "num_cpus": 0} if self._work.vllm else {"num_cpus": int(self._node.cpus)}
        return ray.remote(Worker).options(
            max_restarts=0, max_task_retries=0, max_concurrency=CONCURRENCY, **wanted,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self._node.id, soft=False),
        ).remote()  # fmt: skip

    async def _send(self) -> dict[str, str]:
        """Sees that the node has the files; the hashes, by path, of those that are in its cache."""
        digests: dict[str, str] = {}
        files = self._work.files
        for i in await self._call(self._handle.lacks.remote(files)):
            needed, sending = files[i], self._sending[files[i].path]
            digests[needed.path] = digest = await sending.digest()
            if await self._call(self._handle.wants.remote(needed, digest)):
                self.why = f"gets {needed.name}"
                console.log(f"Sending {needed.name} to {self.name} ...")
                await sending.to(functools.partial(self._give, digest))
                await self._call(self._handle.whole.remote(digest))
        return digests

    async def _give(self, digest: str, piece: Any) -> None:
        await self._call(self._handle.take.remote(digest, piece))

    async def _watch(self) -> None:
        """Returns never: raises where the worker is gone, or its server is for good."""
        while True:
            pulse = asyncio.wait_for(self._call(self._handle.pulse.remote()), _PATIENCE)
            try:
                found = await pulse
            except TimeoutError:
                raise _Gone(f"no sign of life for {_PATIENCE:.0f} s") from None
            if found["ended"] is not None:
                raise _Gone(found["ended"])
            if found["ready"] != self._ready:
                self._ready = found["ready"]
                self._state = "answers" if self._ready else "rests"
                self.why = None if self._ready else self.why or "its server is away"
                await self._on_change()
            with contextlib.suppress(TimeoutError):
                raise _Gone(await asyncio.wait_for(asyncio.shield(self._gone), _PULSE))

    def _pause(self, why: str) -> None:
        """Its server is away; the next pulse tells whether it is back."""
        self._ready, self._state, self.why = False, "rests", why

    def _lost(self, why: str) -> None:
        """What it had goes back. A new worker will be made."""
        if self._state in ("answers", "rests"):
            console.log(f"The worker on {self.name} is gone: {why}")
        else:
            self.failed = why
        self._ready, self._state, self.why = False, "failed", why
        self._end(self._gone, why)
        handle, self._handle = self._handle, None
        if handle is not None:
            cluster.later(functools.partial(cluster.library().kill, handle))

    @staticmethod
    def _end(gone: asyncio.Future[str], why: str) -> None:
        if not gone.done():
            gone.set_result(why)

    async def _call(self, reference: Any) -> Any:
        return await self._or_gone(reference, self._gone)

    async def _or_gone(self, reference: Any, gone: asyncio.Future[str]) -> Any:
        """What a call gives. Raises RayError, and _Gone as soon as it is known that nothing will come."""
        reply = asyncio.ensure_future(_got(reference))
        try:
            await asyncio.wait((reply, gone), return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise _Gone(gone.result())
            return reply.result()
        finally:
            reply.cancel()


async def _got(reference: Any) -> Any:
    return await reference
