"""Thousands of bounded jobs, durable and resumable: ``lowbit.batch.run("IN.jsonl", "OUT.jsonl", model=...)``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import console, files
from lowbit.errors import BadOption
from lowbit.units import format_duration

if TYPE_CHECKING:
    from lowbit.batch.agreement import Agreement
    from lowbit.batch.checking import CheckOptions
    from lowbit.batch.costs import Cost, Machine
    from lowbit.batch.engines import Engine
    from lowbit.batch.estimation import Estimate
    from lowbit.batch.job import Job
    from lowbit.batch.options import BatchOptions
    from lowbit.batch.progress import Status
    from lowbit.batch.runner import Runner, Stop
    from lowbit.batch.table import TableOptions
    from lowbit.harness import HarnessOptions
    from lowbit.model_server import ModelOptions

Path_ = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a run ended. stop: completed, cancelled, budget or asked. signal: that asked for it, or None. status: of the
    job by then. source, folder: of the job, also where IN was standard input. out, errors: files that were written,
    None where it is not done."""

    stop: str
    status: Status
    source: Path
    folder: Path
    signal: int | None = None
    out: Path | None = None
    errors: Path | None = None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal is not None else 0


def run(
    source: Path_,
    out: Path_ | None = None,
    *,
    model: str | None = None,
    endpoint: str | Sequence[str] | None = None,
    endpoint_model: str | None = None,
    engine: str | None = None,
    ray_address: str | None = None,
    table: TableOptions | None = None,
    form: str | None = None,
    options: BatchOptions | None = None,
    model_options: ModelOptions | None = None,
    journal: Path_ | None = None,
) -> Ran:
    """Runs a batch, or goes on with it, until it is done or told to stop (SIGINT, SIGTERM, pause, cancel).

    source:         IN: OpenAI's Batch JSONL, or with ``table`` rows of CSV, JSONL or Parquet; "-" is standard input
    out:            OUT: Batch JSONL or .parquet, written when the batch is done; "-" is standard output
    table:          how a row becomes a request
    form:           jsonl, csv or parquet, where IN's name does not tell
    model:          a GGUF, a run folder, a packaged name: llama.cpp's server is started for it
    endpoint:       or URLs of OpenAI-compatible servers, up to and with /v1; LOWBIT_UPSTREAM_KEY is their key
    endpoint_model: the model's name there, put into every request
    engine:         a name of engines.engines(), where another than the default is to do it
    ray_address:    of the cluster, for the engine "ray"; None is RAY_ADDRESS, or the one that this machine belongs to
    journal:        the folder for what was done, instead of IN.lowbit-batch

    Raises BadFile, BadOption, NotFound, CannotWrite, RuntimeFailed. Whatever it raises, the same call goes on.
    """
    from lowbit.batch import sources
    from lowbit.batch.engines import EngineOptions, open_engine
    from lowbit.batch.job import Job, restart
    from lowbit.batch.options import BatchOptions
    from lowbit.model_server import ModelOptions

    options = options or BatchOptions()
    if out is not None and os.fspath(out) != sources.STDIN:
        files.check_writable(out)
    engine_options = EngineOptions(
        model=model, endpoints=(endpoint,) if isinstance(endpoint, str) else tuple(endpoint or ()),
        endpoint_model=endpoint_model, key=os.environ.get("LOWBIT_UPSTREAM_KEY"), ray_address=ray_address,
        slots=options.slots, server=model_options or ModelOptions(), harness=options.harness,
    )  # fmt: skip
    answering = open_engine(engine_options, engine)
    kept = None if journal is None else Path(journal)
    path, folder = sources.named(source, out, kept, anew=options.restart)
    opened = sources.open_source(path, folder, table, form)
    if options.restart:
        restart(path, folder)
    with Job(path, folder, opened.reader, grows=opened.grows) as job:
        if out is not None and os.fspath(out) != sources.STDIN:
            job.journal.set("out", str(Path(out).absolute()))
        stop, number = asyncio.run(_run(job, answering, options, table, opened.reading))
        ran = _ended(job, stop, number, None if out is None else Path(out))
    if folder.parent == sources.cache() and ran.out is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return ran


def status(source: Path_, *, journal: Path_ | None = None) -> Status:
    """How far a batch is. Raises NotFound, BadFile."""
    from lowbit.batch.progress import status as found

    with _existing(source, journal) as job:
        return found(job)


def pause(source: Path_, *, journal: Path_ | None = None) -> Status:
    """Has the processes at work end what is under way and wait, without a model in memory."""
    return _told(source, journal, "paused")


def resume(source: Path_, *, journal: Path_ | None = None) -> Status:
    """Has them go on; of a batch that was cancelled, takes up what had not been done."""
    return _told(source, journal, "running")


def cancel(source: Path_, *, journal: Path_ | None = None) -> Status:
    """Ends a batch: what is not done by now ends as cancelled, and OUT is written."""
    return _told(source, journal, "cancelled")


def write_results(source: Path_, out: Path_, *, journal: Path_ | None = None) -> int:
    """Writes what there is so far; how many errors are in it."""
    from lowbit.batch.results import write
    from lowbit.batch.sources import check_apart

    check_apart(Path(source), Path(out))
    with _existing(source, journal) as job:
        return write(job.journal, Path(out), job.journal.get("schema"))


def estimate(
    source: Path_, *, model: str | None = None, endpoint: str | Sequence[str] | None = None,
    endpoint_model: str | None = None, probe: int = 0, seed: int = 0, table: TableOptions | None = None,
    form: str | None = None, options: BatchOptions | None = None, model_options: ModelOptions | None = None,
) -> Estimate:  # fmt: skip
    """What a batch will take: items, and tokens by the model's own tokenizer; with a probe of so many items, drawn at
    random, time and the length of answers too. Nothing of it is kept.

    Raises BadFile, BadOption, NotFound, RuntimeFailed.
    """
    from lowbit.batch import sources
    from lowbit.batch.engines import EngineOptions, open_engine
    from lowbit.batch.estimation import estimate as found
    from lowbit.batch.options import BatchOptions
    from lowbit.model_server import ModelOptions

    if probe < 0:
        raise BadOption("impossible probe", found=probe, expected="a number of items")
    options, engine = options or BatchOptions(), None
    if probe:
        engine = open_engine(EngineOptions(
            model=model, endpoints=(endpoint,) if isinstance(endpoint, str) else tuple(endpoint or ()),
            endpoint_model=endpoint_model, key=os.environ.get("LOWBIT_UPSTREAM_KEY"), slots=options.slots,
            server=model_options or ModelOptions(), harness=options.harness,
        ))  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lowbit-estimate-") as folder:
        path, place = sources.named(source, None, Path(folder))
        reader = sources.open_source(path, place, table, form).reader
        return found(reader, model=model, engine=engine, probe=probe, seed=seed)


def check(
    source: Path_, options: CheckOptions, *, harness: HarnessOptions | None = None, journal: Path_ | None = None
) -> Agreement | None:
    """Asks a stronger model for some of the items that were answered, and says how often the two agree. Run again, it
    goes on; None where the reference answered nothing. Raises NotFound, BadFile, BadOption, RuntimeFailed."""
    from lowbit.batch import checking

    with _existing(source, journal) as job:
        return checking.check(job, options, harness)


def cost(
    source: Path_, machine: Machine, *, prices: Path_ | None = None, hosted: Sequence[str] = (),
    journal: Path_ | None = None,
) -> tuple[Cost, Agreement | None]:  # fmt: skip
    """What a batch cost so far against hosted models, and what its last check found.

    machine: what it costs. prices: a dated file; the one that comes with lowbit where there is none. hosted: names of
    models in it to compare with, all of them where there are none

    Raises NotFound, BadFile.
    """
    from lowbit.batch import checking, meter
    from lowbit.batch.costs import cost as found
    from lowbit.harness.prices import PriceFile, bundled

    with _existing(source, journal) as job:
        work = meter.work(job.journal)
        return found(work, machine, PriceFile.read(prices or bundled()), hosted), checking.found(job)


@contextlib.contextmanager
def _existing(source: Path_, journal: Path_ | None) -> Iterator[Job]:
    from lowbit.batch.job import Job

    with Job.existing(Path(source), None if journal is None else Path(journal)) as job:
        yield job


def _told(source: Path_, journal: Path_ | None, state: str) -> Status:
    from lowbit.batch.job import take_up
    from lowbit.batch.progress import status as found
    from lowbit.batch.results import write

    with _existing(source, journal) as job:
        before = found(job)
        if before.state == "completed":
            raise BadOption("this batch is done", where=source, expected="one that is not")
        if before.state == "cancelled" and state == "paused":
            raise BadOption("this batch was cancelled", where=source, hint=f"lowbit batch resume {source}")
        job.journal.set("state", state)
        if state == "running" and before.state == "cancelled":
            take_up(job)
        if state == "cancelled":
            job.journal.take_over()
            job.journal.cancel()
            out = job.journal.get("out")
            if out is not None and not before.runners:
                write(job.journal, Path(out), job.journal.get("schema"))
        return found(job)


async def _run(
    job: Job, engine: Engine, options: BatchOptions, table: TableOptions | None, reading: dict[str, Any]
) -> tuple[Stop, int | None]:
    from lowbit.batch.job import retry_failed
    from lowbit.batch.meter import Meter
    from lowbit.batch.progress import Counter
    from lowbit.batch.runner import Runner

    again = job.journal.get("settings") is not None
    settings = ({} if table is None else table.deciding()) | options.deciding() | await engine.deciding()
    job.begin(settings, strict=options.strict, reading=reading)
    if options.retry_failed and (count := retry_failed(job)):
        console.log(f"{count:,} items that had failed are asked again")
    engine.expect(job.journal.longest())
    counter = Counter(job.journal)
    if again and (done := counter.done()):
        console.log(f"{done:,} of {counter.total:,} items are done; going on")
    meter = Meter(job.journal)
    with console.progress("batch", counter.total, unit="items") as bar:

        def tick() -> None:
            meter.tick(working=job.journal.get("state") != "paused")
            done = counter.done()
            speed, left = counter.note(done)
            said = f"{done:,} of {counter.total:,}"
            bar.update(done, said if speed is None else f"{said}, {speed:.3g}/s, {format_duration(left or 0)} left")

        runner = Runner(job, engine, options, on_tick=tick)
        with _signals(runner) as caught:
            stop = await runner.run()
        tick()
    return stop, caught[0] if caught else None


@contextlib.contextmanager
def _signals(runner: Runner) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask the runner to stop; a second one ends the process as if there were no handler."""
    loop, caught = asyncio.get_running_loop(), list[int]()

    def asked(number: int) -> None:
        caught.append(number)
        console.log("Stopping; what is under way has a few seconds. Once more ends at once")
        runner.stop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)

    installed = False
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # Windows; not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked, number)
        installed = True
    try:
        yield caught
    finally:
        if installed:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _ended(job: Job, stop: Stop, number: int | None, out: Path | None) -> Ran:
    from lowbit.batch.progress import status as found
    from lowbit.batch.results import errors_path, write
    from lowbit.batch.runner import Stop

    now = found(job)
    if stop in (Stop.COMPLETED, Stop.CANCELLED) and out is not None:
        errors = job.folder / "errors.jsonl" if str(out) == "-" else errors_path(out)
        count = write(job.journal, out, job.journal.get("schema"), errors)
        return Ran(
            stop=stop.value, status=now, source=job.source, folder=job.folder, out=out,
            errors=errors if count else None,
        )  # fmt: skip
    return Ran(stop=stop.value, status=now, source=job.source, folder=job.folder, signal=number)
