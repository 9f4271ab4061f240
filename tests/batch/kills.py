"""What can happen to a batch: the runner killed, the model's server killed, the disk full, two at once and one killed.

A trial is a small job against a server of its own whose answers depend on the request alone. Whatever happens, running
the same command again must give the very bytes of an undisturbed run, and ask nothing again that had been committed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from batch_server import free_port
from jobs import command, contents, expected, write

ITEMS = 60
KINDS = ("runner", "server", "disk", "two")
_SERVER = Path(__file__).parent / "batch_server.py"


class Trial:
    """A job and its server. A context manager.

    folder: for IN, OUT and the journal. faults: that were put in. asked_again: answers that the server gave twice,
    since the first had not been committed.
    """

    def __init__(self, folder: Path, seed: int, delay: float = 0.008) -> None:
        self.folder, self.random, self._delay = folder, random.Random(seed), delay
        self.said = [f"word {seed} {i}" for i in range(ITEMS)]
        self.source, self.out = write(folder / "in.jsonl", self.said), folder / "out.jsonl"
        self.log, self.port = folder.parent / f"{folder.name}.log", free_port()
        self.faults = 0

    def __enter__(self) -> Trial:
        self.log.touch()
        self.start_server()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.wait()

    def start_server(self) -> None:
        environment = {**os.environ, "DELAY": str(self._delay)}
        self.server = subprocess.Popen([sys.executable, str(_SERVER), str(self.port), str(self.log)], env=environment)

    def runner(self) -> subprocess.Popen[str]:
        words = command(
            "run", self.source, "-o", self.out, "--endpoint", f"http://127.0.0.1:{self.port}/v1",
            "--endpoint-model", "m", "--slots", 4, "--quiet",
        )  # fmt: skip
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def answered(self) -> list[str]:
        return self.log.read_text().splitlines()

    def committed(self) -> set[str]:
        """Items whose results are in the journal."""
        path = self.folder / "in.jsonl.lowbit-batch" / "journal.sqlite"
        if not path.exists():
            return set()
        with contextlib.closing(sqlite3.connect(path)) as db:
            try:
                rows = db.execute("SELECT custom_id FROM items WHERE state = 2").fetchall()
            except sqlite3.OperationalError:  # killed before it had made its tables
                return set()
        return {self.said[int(row[0])] for row in rows}

    def moment(self, process: subprocess.Popen[str], *, at_work: bool) -> None:
        """Waits until some time of a run: any, or one of those when requests are under way."""
        if not at_work:
            time.sleep(self.random.uniform(0.0, 1.5))
            return
        before, deadline = len(self.answered()), time.monotonic() + 30
        wanted = before + self.random.randint(1, max(1, (ITEMS - before) * 3 // 4))
        while process.poll() is None and len(self.answered()) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0.0, 0.02))

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9; what had been committed by then must not be asked again."""
        self.faults += 1
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def finish(self) -> None:
        """The same command again, to the end; what had been committed before is not asked again."""
        done, before = self.committed(), len(self.answered())
        process = self.runner()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        again = done & set(self.answered()[before:])
        assert not again, f"asked again: {sorted(again)[:5]}"

    def check(self) -> None:
        """OUT is as if nothing had happened."""
        assert contents(self.out) == expected(self.said)
        assert self.out.read_bytes().count(b"\n") == ITEMS
        assert not list(self.folder.glob("*.partial"))


def run(trial: Trial, kind: str, *, faults: int = 3) -> None:
    """Puts faults of a kind in, at random moments, and sees the job to its end."""
    {"runner": _runner, "server": _server, "disk": _disk, "two": _two}[kind](trial, faults)
    trial.finish()
    trial.check()


def _runner(trial: Trial, faults: int) -> None:
    for _ in range(faults):
        done, before = trial.committed(), len(trial.answered())
        process = trial.runner()
        trial.moment(process, at_work=trial.random.random() < 0.7)
        trial.kill(process)
        assert not done & set(trial.answered()[before:])


def _server(trial: Trial, faults: int) -> None:
    """The runner waits for it, and needs no help."""
    process = trial.runner()
    for _ in range(faults):
        trial.moment(process, at_work=True)
        trial.faults += 1
        trial.server.kill()
        trial.server.wait()
        time.sleep(trial.random.uniform(0.0, 0.5))
        trial.start_server()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def _disk(trial: Trial, faults: int) -> None:
    """Filled to the last byte; when there is room again, it goes on."""
    ballast = trial.folder / "ballast"
    for _ in range(faults):
        process = trial.runner()
        trial.moment(process, at_work=trial.random.random() < 0.7)
        trial.faults += 1
        fill(ballast, trial.random.choice((0, 0, 4096, 20_000)))
        _, said = process.communicate(timeout=120)
        ballast.unlink()
        assert process.returncode in (0, 2), (process.returncode, said)
        if process.returncode == 2:
            assert said.count("\n") == 1 and "cannot" in said, said


def _two(trial: Trial, faults: int) -> None:
    """One of two is killed: the other does all of it."""
    for _ in range(faults):
        processes = [trial.runner(), trial.runner()]
        trial.moment(processes[0], at_work=True)
        trial.kill(processes.pop(trial.random.randrange(2)))
        _, said = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 0, said


def fill(path: Path, leave: int) -> None:
    """Takes all room of a file system but for so many bytes."""
    with open(path, "wb", buffering=0) as handle:
        for size in (1 << 20, 1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while handle.write(b"x" * size) == size:
                    pass
        if leave:
            handle.truncate(max(0, handle.tell() - leave))


@contextlib.contextmanager
def small_disk(place: Path, size: str = "3m") -> Iterator[Path | None]:
    """A file system of so few bytes; None where this process may not mount one."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lowbit", str(place)], capture_output=True)
    if done.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
