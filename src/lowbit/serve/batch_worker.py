"""Runs the batches of /v1/batches one after the other, in a thread of its own, through the journal and the runner of
``lowbit batch``: what is answered stays answered over a restart of the endpoint, and over kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lowbit import console
from lowbit.batch.engines.base import Caller, CarefulUpstream, Engine, EngineOptions
from lowbit.batch.items import BatchLines, Item, NoItem, loads, read_place
from lowbit.batch.job import Job
from lowbit.batch.journal import CANCELLED, DONE, FAILED
from lowbit.batch.options import BatchOptions
from lowbit.batch.results import line as as_line
from lowbit.batch.results import rows
from lowbit.batch.runner import Runner, Stop
from lowbit.errors import BadOption, LowbitError
from lowbit.harness import Harness, HarnessOptions, HttpUpstream, Trace
from lowbit.serve.store import Json, Store, new_id

log = logging.getLogger("lowbit.serve")
_WAIT = 5.0  # seconds after a failure that may pass
_MOST_ITEMS, _MOST_ERRORS = 100_000, 100


class Served(Engine):
    """The endpoint's own model, with a connection of this thread's. It never falls back to another model."""

    name = "served"

    def __init__(
        self, upstream: HttpUpstream, harness: HarnessOptions, *, slots: int, special: Sequence[str] = (),
        model: str | None = None, on_answer: Callable[[Trace, str | None], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(EngineOptions(slots=slots, harness=harness))
        self._upstream, self._special, self._model, self._on_answer = upstream, special, model, on_answer
        self._caller: Caller | None = None

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return False

    async def deciding(self) -> dict[str, Any]:
        return {"model": self._model} if self._model else {}

    async def __aenter__(self) -> Served:
        own = CarefulUpstream(self._upstream.url, key=self._upstream.key, model=self._upstream.model)
        own.name, own.dialect = self._upstream.name, self._upstream.dialect
        own.holds, own.refused = self._upstream.holds, self._upstream.refused
        harness = Harness(own, self.options.harness, special=self._special, on_answer=self._on_answer)
        self._caller = Caller(own, harness, here=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._caller is not None:
            await self._caller.upstream.close()

    async def ask(self, item: Item) -> Json:
        return await self._following().ask(item)

    async def ready(self) -> bool:
        return await self._following().ready()

    def _following(self) -> Caller:
        """A model's server that is started again has another address."""
        assert self._caller is not None
        self._caller.upstream.url = self._upstream.url
        return self._caller


class BatchWorker:
    """engine: makes what answers, for each batch anew. Started with ``start``; ``wake`` says that there is work."""

    def __init__(self, store: Store, engine: Callable[[], Engine], harness: HarnessOptions) -> None:
        self._store, self._engine = store, engine
        self._options = BatchOptions(harness=harness, patience=1e6, grace=2.0)
        self._changed, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._told: set[str] = set()
        self._stop: Callable[[], Any] = lambda: None

    def start(self) -> None:
        """Goes on with what an earlier process had begun."""
        if self._store.exists:
            self._store.open()
            self.wake()

    def wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """Ends after what is under way, or two seconds; what is left goes on with the next start."""
        self._ending.set()
        self._changed.set()
        self._stop()
        if self._thread is not None:
            self._thread.join(20.0)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._changed.clear()
            try:
                if not self._some():
                    self._changed.wait(_WAIT if self._told else None)
            except LowbitError as error:  # the disk is full, the model's server is gone: it may pass
                self._tell("-", str(error))
                self._changed.wait(_WAIT)
            except Exception:
                log.exception("a fault of lowbit's own in a batch")
                self._changed.wait(_WAIT)

    def _some(self) -> bool:
        """Works on the oldest batch that can be; whether there was one."""
        for status in ("finalizing", "cancelling", "in_progress", "validating"):
            for record in self._store.listed("batches", after=None, limit=100, oldest_first=True, status=status)[0]:
                if self._ending.is_set():
                    return True
                if self._work(record):
                    return True
        return False

    def _work(self, record: Json) -> bool:
        source = self._store.path(record["input_file_id"])
        if record["status"] == "validating":
            if errors := _problems(source, record["endpoint"]):
                self._change(record, "failed", errors={"object": "list", "data": errors})
                return True
            record = self._change(record, "in_progress")
        with Job(source, self._store.batch_folder(record["id"])) as job:
            if record["status"] == "finalizing":
                self._finish(job, record)
                return True
            return self._go_on(job, record)

    def _go_on(self, job: Job, record: Json) -> bool:
        engine = self._engine()
        try:
            asyncio.run(self._ask_all(job, record, engine))
        except BadOption as error:  # another model is served than it was begun with
            self._tell(record["id"], f"{record['id']} waits: {error}")
            return False
        record = self._store.get("batches", record["id"])
        if job.journal.unfinished() and not _is_over(record):
            return True  # the endpoint ends
        job.journal.cancel()
        self._finish(job, record)
        return True

    async def _ask_all(self, job: Job, record: Json, engine: Engine) -> Stop | None:
        if _is_over(record):
            return None
        job.begin(self._options.deciding() | await engine.deciding())
        runner = Runner(job, engine, self._options, on_tick=lambda: self._tick(job, record["id"]))
        loop = asyncio.get_running_loop()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(runner.stop)

        self._stop = stop
        if self._ending.is_set():
            return None
        self._tick(job, record["id"])
        return await runner.run()

    def _tick(self, job: Job, id: str) -> None:
        """Tells how far it is, and hears whether it is to end."""
        counts = job.journal.counts()
        record = self._store.change("batches", id, request_counts=_counts(counts))
        if _is_over(record):
            job.journal.set("state", "cancelled")

    def _finish(self, job: Job, record: Json) -> None:
        """The two files; done again with the same names where it was cut off."""
        counts = job.journal.counts()
        if record["status"] != "finalizing":
            over = "expired" if counts[CANCELLED] else "completed"
            ends = "cancelled" if record["status"] == "cancelling" else over
            plan = {"ends": ends, "output": new_id("file-"), "errors": new_id("file-")}
            record = self._change(record, "finalizing", _plan=plan)
        told, made = record["_plan"], dict[str, str]()
        ends = told["ends"]
        for key, states in (("output", (DONE,)), ("errors", (FAILED, CANCELLED))):
            if any(counts[state] for state in states):
                self._write(job, told[key], states, ends)
                self._store.add_file(told[key], f"{record['id']}_{key}.jsonl", "batch_output")
                made[key] = told[key]
        self._change(
            record, ends, output_file_id=made.get("output"), error_file_id=made.get("errors"),
            request_counts=_counts(counts),
        )  # fmt: skip

    def _write(self, job: Job, id: str, states: tuple[int, ...], ends: str) -> None:
        from lowbit.files import replacing

        with replacing(self._store.path(id)) as partial, open(partial, "wb") as handle:
            for row in rows(job.journal):
                if row.state in states and row.custom_id is not None:
                    line = as_line(row)
                    if ends == "expired" and row.state == CANCELLED:
                        line = line.replace(b'"code": "batch_cancelled"', b'"code": "batch_expired"', 1)
                    handle.write(line)

    def _change(self, record: Json, status: str, **keys: Any) -> Json:
        return self._store.change("batches", record["id"], status=status, **{f"{status}_at": int(time.time())}, **keys)

    def _tell(self, id: str, text: str) -> None:
        """Each once, and not every few seconds."""
        if id not in self._told:
            self._told.add(id)
            console.log(text)


def _is_over(record: Json) -> bool:
    return record["status"] == "cancelling" or time.time() >= record["expires_at"]


def _counts(counts: dict[int, int]) -> dict[str, int]:
    return {"total": sum(counts.values()), "completed": counts[DONE], "failed": counts[FAILED] + counts[CANCELLED]}


def _problems(source: Any, endpoint: str) -> list[Json]:
    """What is wrong with the lines of an input, as OpenAI's batch tells it; at most a hundred."""
    found: list[Json] = []
    ids: set[str] = set()
    reader, count = BatchLines(source), 0

    def add(code: str, message: str, line: int | None, param: str | None = None) -> None:
        found.append({"code": code, "message": message, "line": line, "param": param})

    try:
        for place in reader.places():
            count += 1
            if place.problem is not None:
                add("invalid_json_line" if "JSON" in place.problem else "invalid_request", place.problem, place.line)
            elif place.custom_id in ids:
                add("duplicate_custom_id", f"{str(place.custom_id)[:60]!r} is there twice", place.line, "custom_id")
            else:
                ids.add(place.custom_id or "")
                url = loads(read_place(source, place.offset, place.length)).get("url")
                if url != endpoint:
                    add("mismatched_endpoint", f"url is {url}, and the batch's endpoint {endpoint}", place.line, "url")
            if count > _MOST_ITEMS:
                add("too_many_requests", f"a batch may have {_MOST_ITEMS:,} requests", None)
            if len(found) >= _MOST_ERRORS or count > _MOST_ITEMS:
                break
    except (LowbitError, NoItem) as error:
        add("invalid_file", str(error), None)
    if not count and not found:
        add("empty_file", "there is no request in it", None)
    return found
