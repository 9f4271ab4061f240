"""Whatever happens to a batch, running it again gives what an undisturbed run gives, and asks nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from batch_server import BatchServer
from jobs import command, contents, expected, lowbit, read, write
from kills import Trial, run, small_disk

from lowbit import batch
from lowbit.batch.job import Job
from lowbit.batch.options import BatchOptions
from lowbit.errors import BadFile, BadOption, CannotWrite

SAID = [f"slow 0.05 {i}" for i in range(60)]


@pytest.mark.parametrize(
    ("kind", "faults", "seed"), [("runner", 4, 1), ("runner", 4, 2), ("server", 2, 3), ("server", 4, 5), ("two", 3, 4)]
)
def test_killed_at_any_moment(kind: str, faults: int, seed: int, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with Trial(tmp_path / "job", seed) as trial:
        run(trial, kind, faults=faults)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("NOT TESTED HERE: a really full disk wants the right to mount a tmpfs (root)")
        with Trial(disk, 5) as trial:
            run(trial, "disk", faults=3)


def test_a_limit_on_file_sizes_is_told_in_one_line(server: BatchServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [f"word {i} " + "x" * 2000 for i in range(100)])
    words = command("run", source, "-o", tmp_path / "out.jsonl", "--endpoint", server.url, "--quiet")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(words, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "in.jsonl.lowbit-batch" in done.stderr and "cannot write" in done.stderr
    assert subprocess.run(words, timeout=60).returncode == 0
    assert len(contents(tmp_path / "out.jsonl")) == 100


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(number: int, code: int, server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    words = command("run", source, "-o", out, "--endpoint", server.url, "--slots", 2)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while len(server.asked) < 5:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and "the same command goes on from here" in said
    assert not out.exists()
    found = batch.status(source)
    assert found.state == "stopped" and found.in_flight == 0 and found.completed >= 5
    asked = len(server.asked)
    assert asked == found.completed  # what was under way was let end
    batch.run(source, out, endpoint=server.url)
    assert contents(out) == expected(SAID) and len(server.asked) == len(SAID)


def test_asked_to_stop_while_something_hangs(server: BatchServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["hang", *SAID])
    words = command("run", source, "--endpoint", server.url, "--slots", 2)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while len(server.asked) < 5 or "hang" not in server.asked:  # like goes with like: it need not be the first
        time.sleep(0.01)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and 4 < time.monotonic() - begun < 12
    assert process.stderr is not None
    process.stderr.close()
    with Job.existing(source) as job:  # nothing is held against it
        assert next(job.journal.query("SELECT state, points, strikes FROM items WHERE number = 0")) == (0, 0, 0)


def test_pause_resume_and_cancel(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    process = subprocess.Popen(command("run", source, "-o", out, "--endpoint", server.url, "--slots", 2, "--quiet"))
    while len(server.asked) < 5:
        time.sleep(0.01)
    assert batch.pause(source).state == "paused"
    while server.now or batch.status(source).in_flight:
        time.sleep(0.05)
    asked = len(server.asked)
    time.sleep(1.5)
    assert len(server.asked) == asked < len(SAID) and process.poll() is None
    assert json.loads(lowbit("status", source, "--json", "-").stdout)["state"] == "paused"
    assert batch.resume(source).state == "running"
    while len(server.asked) < asked + 5:
        time.sleep(0.01)
    batch.cancel(source)
    assert process.wait(30) == 0
    found = batch.status(source)
    assert found.state == "cancelled" and found.cancelled > 0
    assert found.completed + found.cancelled == len(SAID) == len(read(out))
    codes = [line["error"]["code"] for line in read(out).values() if line["error"]]
    assert codes == ["batch_cancelled"] * found.cancelled
    with pytest.raises(BadOption, match=r"was cancelled.*resume"):
        batch.run(source, out, endpoint=server.url)
    batch.resume(source)
    batch.run(source, out, endpoint=server.url)
    assert contents(out) == expected(SAID)
    with pytest.raises(BadOption, match="this batch is done"):
        batch.pause(source)


def test_requests_that_kill_the_server_end_and_the_others_do_not(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with Trial(tmp_path / "job", 6) as trial:
        trial.said = ["word a", "crash 1", *(f"word {i}" for i in range(10))]
        write(trial.source, trial.said)
        process = trial.runner()
        while process.poll() is None:
            if trial.server.poll() is not None:
                trial.start_server()
            time.sleep(0.02)
        _, said = process.communicate()
        assert process.returncode == 0, said
    found = read(trial.out)
    assert {i for i, line in found.items() if line["error"]} == {"1"}
    assert found["1"]["error"]["code"] == "server_crashed"
    assert "word a" in trial.answered()


def test_a_server_that_others_kill_condemns_nobody_beside_the_request_that_kills_it(tmp_path: Path) -> None:
    """The innocent one is there at two deaths in company, and then alone at two more, which were not its doing."""
    (tmp_path / "job").mkdir()
    kills = 0
    with Trial(tmp_path / "job", 7) as trial:
        trial.said = ["crash 1", "slow 0.6 innocent", *(f"word {i}" for i in range(10))]
        write(trial.source, trial.said)
        process = trial.runner()
        while process.poll() is None:
            if trial.server.poll() is None and kills < 2 and _alone(trial, 1):
                trial.server.kill()
                trial.server.wait()
                kills += 1
            if trial.server.poll() is not None:
                trial.start_server()
            time.sleep(0.02)
        _, said = process.communicate()
        assert process.returncode == 0, said
    found = read(trial.out)
    assert kills == 2 and {i for i, line in found.items() if line["error"]} == {"0"}
    assert found["0"]["error"]["code"] == "server_crashed"
    with Job.existing(trial.source) as job:
        tries = dict(job.journal.query("SELECT number, tries FROM items"))
    assert tries[0] == 5, "bounded, whoever else is killed"
    assert tries[1] > 2


def _alone(trial: Trial, number: int) -> bool:
    """Whether a suspect is under way."""
    path = trial.folder / "in.jsonl.lowbit-batch" / "journal.sqlite"
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path)) as db:
        try:
            row = db.execute("SELECT sent AND points >= 4 FROM items WHERE number = ?", (number,)).fetchone()
        except sqlite3.OperationalError:  # its tables are being made
            return False
    return bool(row and row[0])


def test_requests_that_time_out_end(server: BatchServer, tmp_path: Path) -> None:
    from lowbit.harness import HarnessOptions

    source, out = write(tmp_path / "in.jsonl", ["hang", "word"]), tmp_path / "out.jsonl"
    options = BatchOptions(harness=HarnessOptions(seconds=0.3), tries=2)
    batch.run(source, out, endpoint=server.url, options=options)
    assert read(out)["0"]["error"]["code"] == "upstream_timeout" and server.asked.count("hang") == 2
    assert contents(out) == {"1": expected(["", "word"])["1"]}


def test_an_item_that_kills_its_runners_ends(server: BatchServer, tmp_path: Path) -> None:
    """Across processes: each dies while it has the item, and the one after the last allowed says so."""
    source, out = write(tmp_path / "in.jsonl", ["hang"]), tmp_path / "out.jsonl"
    for deaths in range(10):
        with Job(source, tmp_path / "in.jsonl.lowbit-batch") as job:
            job.begin(BatchOptions().deciding())
            assert job.journal.condemned() == []
            job.journal.enter()
            [lease] = job.journal.lease(3)
            assert lease.suspect == (deaths >= 4)
            job.journal.commit(sent=[lease.number])
            job.journal._db.execute("UPDATE owners SET pid = 999999999")  # as if that process had been killed
            job.journal._owner = 0
        with Job.existing(source) as job:
            assert job.journal.take_over() == 1
    batch.run(source, out, endpoint=server.url)
    assert read(out)["0"]["error"]["code"] == "server_crashed" and not server.asked.count("hang")


def test_a_silent_owner_is_taken_over_and_comes_too_late(tmp_path: Path) -> None:
    from lowbit.batch.journal import Result

    source = write(tmp_path / "in.jsonl", ["a", "b"])
    with Job(source, tmp_path / "j") as slow, Job(source, tmp_path / "j") as quick:
        slow.begin({})
        quick.begin({})
        slow.journal.enter()
        quick.journal.enter()
        had = slow.journal.lease(2)
        assert quick.journal.lease(2) == [] and quick.journal.take_over() == 0
        slow.journal._db.execute("UPDATE owners SET beat = beat - 1000 WHERE id = ?", (slow.journal._owner,))
        assert quick.journal.take_over() == 2
        again = quick.journal.lease(2)
        assert [lease.number for lease in again] == [lease.number for lease in had]
        quick.journal.commit([Result(number=0, status=200, kind=None, body=b'"quick"')])
        slow.journal.commit([Result(number=n, status=200, kind=None, body=b'"slow"') for n in (0, 1)])
        quick.journal.commit([Result(number=1, status=200, kind=None, body=b'"quick"')])
        found = list(slow.journal.query("SELECT number, body FROM results ORDER BY number"))
        assert found == [(0, b'"quick"'), (1, b'"slow"')]


def test_a_pid_that_came_again_is_another_process(tmp_path: Path) -> None:
    from lowbit.batch import owners

    host, pid, start = owners.own()
    now, beat = time.time(), time.monotonic()
    assert owners.Owner(1, host, pid, start, now, now, beat).alive()
    assert owners.Owner(1, host, pid, start, now, now - 1000, beat).alive()  # the time of day was set
    assert not owners.Owner(1, host, pid, start, now, now, beat - 1000).alive()
    assert not owners.Owner(1, host, pid, start + "1", now, now, beat).alive()
    assert owners.Owner(1, "another host", 999999999, "", now, now, 0.0).alive()
    assert not owners.Owner(1, "another host", 999999999, "", now, now - 1000, beat).alive()


def test_two_runners_share_a_job(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    words = command("run", source, "-o", out, "--endpoint", server.url, "--slots", 3, "--quiet")
    processes = [subprocess.Popen(words) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(out) == expected(SAID) and len(server.asked) == len(SAID) and server.most > 3


def test_a_journal_that_is_none_is_refused(server: BatchServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", SAID[:3])
    folder = tmp_path / "in.jsonl.lowbit-batch"
    folder.mkdir()
    (folder / "journal.sqlite").write_bytes(os.urandom(4096))
    with pytest.raises(BadFile, match=r"not a journal.*--restart"):
        batch.run(source, endpoint=server.url)
    batch.run(source, tmp_path / "out.jsonl", endpoint=server.url, options=BatchOptions(restart=True))
    assert contents(tmp_path / "out.jsonl") == expected(SAID[:3])


def test_out_that_cannot_be_written_is_said_before_anything_starts(server: BatchServer, tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        batch.run(write(tmp_path / "in.jsonl", SAID), tmp_path, endpoint=server.url)
    assert not server.asked
