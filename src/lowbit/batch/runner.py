"""The loop: lease, ask, commit. Never more under way than the engine has slots for, and nothing held beside."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit import console
from lowbit.batch.engines.base import Engine, Lost, NotReached
from lowbit.batch.intake import Intake
from lowbit.batch.items import Item
from lowbit.batch.job import Job
from lowbit.batch.journal import NO_REQUEST, Lease, Result
from lowbit.batch.options import BatchOptions
from lowbit.errors import RuntimeFailed
from lowbit.harness import HarnessError, Trace
from lowbit.units import format_duration

_TICK = 1.0  # seconds between two looks at what others want
_BEAT = 10.0  # seconds between two signs of life
_GROUP = 0.02  # seconds within which results are committed together
_TURNED_AWAY = 30  # times that a server is too busy for an item before that counts as its fault
_CRASHES = 10  # of the server, with no answer in between: it is not the items
_SAY_AFTER = 3.0  # seconds without a server
_NO_PLACE = 3  # answers of 404 or 405, and no other: the URL is wrong, not the items


class Stop(enum.Enum):
    """Why a runner came to its end."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    ASKED = "asked"
    BUDGET = "budget"


@dataclass
class _Staged:
    """What goes into the next transaction."""

    results: list[Result] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    struck: list[int] = field(default_factory=list)
    died: list[int] = field(default_factory=list)
    orphaned: list[int] = field(default_factory=list)

    def any(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class _Ended:
    """One of the two: the result, or which list of _Staged the item goes to."""

    result: Result | None = None
    fate: str = "back"


class Runner:
    """Works on a job until nothing of it is left, or it is told to stop.

    on_tick: called about once a second
    """

    def __init__(
        self, job: Job, engine: Engine, options: BatchOptions, *, on_tick: Callable[[], Any] | None = None
    ) -> None:
        self._job, self._journal, self._engine, self._options = job, job.journal, engine, options
        self._on_tick = on_tick
        self._under_way: dict[asyncio.Task[_Ended], Lease] = {}
        self._staged = _Staged()
        self._asked = asyncio.Event()
        self._begun = self._heard = time.monotonic()
        self._ticked = self._beaten = self._committed = 0.0
        self._rest_until = self._rest = 0.0
        self._turned_away: Counter[int] = Counter()
        self._crashes = self._no_place = 0
        self._answered = False

    def stop(self) -> None:
        """Asks it to come to an end; for the thread of its loop."""
        self._asked.set()

    async def run(self) -> Stop:
        """Raises LowbitError: the engine does not come up or has no model any more, the disk is full, IN changed."""
        self._journal.enter()
        self._journal.take_over()
        self._condemn()
        while True:
            stop = self._wanted() or (None if self._journal.waiting() else await self._idle())
            if stop is None:
                stop = await self._with_engine()
            if stop is Stop.PAUSED:
                stop = await self._paused()
            if stop is Stop.CANCELLED:
                self._journal.cancel()
            if stop is not None:
                return stop

    async def _with_engine(self) -> Stop | None:
        """None: there is nothing for the engine to do, but others are at work."""
        entering = asyncio.ensure_future(self._engine.__aenter__())
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            # Loading a model takes long: others must not take this process for dead, nor its user wait for the end.
            while not entering.done() and not asked.done():
                await asyncio.wait((entering, asked), timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
                self._tick()
            if not entering.done():
                entering.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await entering
                return Stop.ASKED
            await entering
            self._intake = Intake(self._job, self._engine, self._no_item)
            try:
                return await self._work(asked)
            finally:
                try:
                    await self._abort()
                    self._tell()
                finally:
                    await self._engine.__aexit__(None, None, None)
        finally:
            asked.cancel()

    async def _work(self, asked: asyncio.Future[Any]) -> Stop | None:
        self._heard = time.monotonic()
        while True:
            self._tick()
            if stop := self._wanted():
                await self._wind_up(stop)
                return stop
            await self._back_from_rest()
            self._start_some()
            if not self._under_way and not self._resting():
                self._flush()
                return None if self._journal.unfinished() else Stop.COMPLETED
            timeout = _GROUP if self._staged.any() else 0.2 if self._resting() else _TICK
            await asyncio.wait((*self._under_way, asked), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._settle()

    # Other processes, and people

    async def _idle(self) -> Stop | None:
        """Until an item waits (None), or none is left; another process has them."""
        while self._journal.unfinished():
            self._tick()
            if stop := self._wanted():
                return stop
            if self._journal.take_over():
                self._condemn()
            if self._journal.waiting():
                return None
            await self._sleep(_TICK)
        return Stop.COMPLETED

    async def _paused(self) -> Stop | None:
        """The engine is gone and its memory free, until somebody says how to go on."""
        while (stop := self._wanted()) is Stop.PAUSED:
            self._tick()
            await self._sleep(_TICK)
        return stop

    def _wanted(self) -> Stop | None:
        if self._asked.is_set():
            return Stop.ASKED
        minutes = self._options.minutes
        if minutes is not None and time.monotonic() - self._begun >= 60 * minutes:
            return Stop.BUDGET
        return {"paused": Stop.PAUSED, "cancelled": Stop.CANCELLED}.get(self._state)

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked < _TICK:
            return
        self._ticked = now
        self._state = self._journal.get("state")
        if now - self._beaten >= _BEAT:
            self._beaten = now
            self._journal.beat()
            if self._journal.take_over():
                self._condemn()
            self._tell()
        if self._on_tick is not None:
            self._on_tick()

    def _tell(self) -> None:
        """Notes how the engine's servers do."""
        if (told := self._engine.told()) != self._told:
            self._told = told
            self._journal.set("servers", told)

    _told: list[dict[str, Any]] | None = None
    _state: str = "running"

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), seconds)

    # Items

    def _start_some(self) -> None:
        starting: list[tuple[Lease, Item]] = []
        alone = any(lease.suspect for lease in self._under_way.values())
        while not alone and not self._resting() and len(self._under_way) + len(starting) < self._intake.slots:
            first = self._intake.first()
            if first is None or (first.suspect and (self._under_way or starting)):
                break
            starting.append(self._intake.take())
            self._staged.sent.append(first.number)
            alone = first.suspect
        if self._staged.any() and time.monotonic() - self._committed >= _GROUP:
            self._flush()  # before the requests go out: who kills this process is known by it
        for lease, item in starting:
            self._under_way[asyncio.ensure_future(self._one(lease, item))] = lease

    def _no_item(self, lease: Lease, problem: str) -> None:
        self._staged.results.append(_no_request(lease, problem))

    async def _one(self, lease: Lease, item: Item) -> _Ended:
        begun = time.monotonic()
        try:
            body = await self._engine.ask(item)
        except NotReached as error:
            return self._not_reached(lease, error)
        except Lost as error:
            if error.machine:  # the engine has others, or is not ready
                return _Ended(fate="orphaned")
            self._crashes += 1
            self._rest_for(0.5)
            return _Ended(fate="died")
        except HarnessError as error:
            return self._failed(lease, error, time.monotonic() - begun)
        self._went_well()
        self._intake.answered(body)
        return _Ended(_result(lease, 200, None, body, time.monotonic() - begun))

    def _not_reached(self, lease: Lease, error: NotReached) -> _Ended:
        if error.final:
            raise RuntimeFailed(str(error), where=self._engine.name, hint="The same command goes on from here")
        self._rest_for(max(error.after, min(30.0, max(0.5, 2 * self._rest))), str(error))
        self._turned_away[lease.number] += 1
        if self._turned_away[lease.number] < _TURNED_AWAY:
            return _Ended(fate="back")
        return self._failed(lease, HarnessError(str(error), status=503, code="upstream_busy"), 0.0)

    def _failed(self, lease: Lease, error: HarnessError, seconds: float) -> _Ended:
        if error.status in (404, 405) and not self._answered:
            self._no_place += 1
            if self._no_place >= _NO_PLACE:
                raise RuntimeFailed(error.message, where=self._engine.name,
                                    hint="Is the URL up to and with /v1, and the model's name right?")  # fmt: skip
            if lease.strikes + 1 < self._options.tries:
                return _Ended(fate="struck")
        self._heard = time.monotonic()
        if error.status >= 500 and lease.strikes + 1 < self._options.tries:
            return _Ended(fate="struck")
        return _Ended(_result(lease, error.status, error.code, error.as_json(), seconds, error.trace))

    def _went_well(self) -> None:
        self._heard, self._rest, self._crashes, self._answered = time.monotonic(), 0.0, 0, True

    def _settle(self) -> None:
        """Takes in what has ended. Raises what ended the batch."""
        for task in [task for task in self._under_way if task.done()]:
            lease = self._under_way.pop(task)
            ended = task.result()
            if ended.result is not None:
                self._staged.results.append(ended.result)
            else:
                getattr(self._staged, ended.fate).append(lease.number)
        if self._staged.died or self._staged.orphaned:
            self._flush()
            self._condemn()
        if self._crashes >= _CRASHES * self._engine.slots:
            raise RuntimeFailed("the model's server ended again and again, and answered nothing in between",
                                where=self._engine.name, hint="The same command goes on from here")  # fmt: skip

    def _condemn(self) -> None:
        for number, tries in self._journal.condemned():
            said = "the model's server, or this process, ended each time that it had this request"
            error = HarnessError(said, status=502, code="server_crashed")
            body = json.dumps(error.as_json()).encode()
            self._staged.results.append(Result(number=number, status=502, kind=error.code, body=body, tries=tries))
        self._flush()

    def _flush(self) -> None:
        if not self._staged.any():
            return
        staged, self._staged = self._staged, _Staged()
        self._journal.commit(**vars(staged))
        self._committed = time.monotonic()

    # A server that does not answer

    def _rest_for(self, seconds: float, why: str = "the model's server went away") -> None:
        if not self._resting():
            self._rest, self._why, self._rested_at = seconds, why, time.monotonic()
        self._rest_until = max(self._rest_until, time.monotonic() + seconds)

    _why: str = ""
    _rested_at: float = 0.0
    _said: bool = False

    def _resting(self) -> bool:
        return self._rest_until > 0

    async def _back_from_rest(self) -> None:
        """Goes on where the server answers again. Raises RuntimeFailed where patience is at its end."""
        if not self._resting() or time.monotonic() < self._rest_until:
            return
        if await self._engine.ready():
            self._rest_until = 0.0
            if self._said:
                console.log("The server answers again")
            self._said = False
            return
        if not self._said and time.monotonic() - self._rested_at > _SAY_AFTER:
            self._said, limit = True, format_duration(self._options.patience)
            console.log(f"Waiting for a server, up to {limit} (--patience): {self._why}")
        if time.monotonic() - self._heard > self._options.patience:
            raise RuntimeFailed("no answer any more", where=self._engine.name, found=self._why,
                                hint="The same command goes on from here, when there is a server again")  # fmt: skip
        self._rest_until = time.monotonic() + min(10.0, max(0.5, self._rest))

    # The end

    async def _wind_up(self, stop: Stop) -> None:
        """Lets what is under way end: in full before a pause, for a moment before a person who waits."""
        deadline = time.monotonic() + (self._options.grace if stop is Stop.ASKED else 3600.0)
        while self._under_way and stop is not Stop.CANCELLED and time.monotonic() < deadline:
            await asyncio.wait(self._under_way, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            self._settle()
            self._tick()
            if stop is not Stop.ASKED and self._asked.is_set():
                stop, deadline = Stop.ASKED, time.monotonic() + self._options.grace
        await self._abort()

    async def _abort(self) -> None:
        """Gives back what is left; what has ended meanwhile is kept."""
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=5.0)
        for task, lease in self._under_way.items():
            whole = task.done() and not task.cancelled() and task.exception() is None
            result = task.result().result if whole else None
            if result is not None:
                self._staged.results.append(result)
            else:
                self._staged.back.append(lease.number)
        self._staged.back += self._intake.give_back()
        self._under_way.clear()
        self._flush()


def _result(
    lease: Lease, status: int, kind: str | None, body: dict[str, Any], seconds: float, trace: Trace | None = None
) -> Result:
    told = trace.as_json() if trace is not None else body.get("lowbit")
    told = told if isinstance(told, dict) else {}
    usage = told.get("usage") or body.get("usage") or {}
    tokens = {name: usage.get(name) or usage.get(other) or 0 for name, other in _TOKENS.items()}
    return Result(
        number=lease.number, status=status, kind=kind, body=_as_json(body), seconds=seconds,
        tries=lease.tries + max(1, told.get("tries") or 1), **tokens,
    )  # fmt: skip


def _as_json(body: dict[str, Any]) -> bytes:
    """Half a surrogate pair is something that JSON can spell and UTF-8 cannot; NaN is something that servers send."""
    try:
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(body), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TOKENS = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}


def _no_request(lease: Lease, problem: str) -> Result:
    said = f"line {lease.place.line}: {problem}"
    error = {"message": said, "type": "invalid_request_error", "param": None, "code": NO_REQUEST}
    body = json.dumps({"error": error | {"line": lease.place.line}}).encode()
    return Result(number=lease.number, status=0, kind=NO_REQUEST, body=body, tries=lease.tries)
