"""A real model, its server started for the batch: a kill of it, or of the runner, changes no answer."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from jobs import command, contents, write

from lowbit import batch

SAID = [f"Name a colour that {thing} can have. One word." for thing in (
    "a car", "the sky", "an apple", "a rose", "the sea", "a cat", "snow", "coal", "a leaf", "a house",
)]  # fmt: skip


def words(source: Path, out: Path) -> list[str]:
    return command("run", source, "-o", out, "--model", "smollm2-135m", "--slots", 1, "--ctx", 512, "--threads", 1)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed run answers."""
    folder = tmp_path_factory.mktemp("quiet")
    source = write(folder / "in.jsonl", SAID, temperature=0, max_tokens=12)
    done = subprocess.run(words(source, folder / "out.jsonl"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = contents(folder / "out.jsonl")
    assert len(found) == len(SAID) and all(found.values())
    return found


def some_done(source: Path, process: subprocess.Popen[bytes]) -> int:
    """Waits until a few items are done."""
    folder, deadline = source.with_name(source.name + ".lowbit-batch"), time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "journal.sqlite").exists() and (done := batch.status(source).completed) >= 3:
            return done
        time.sleep(0.05)
    raise AssertionError("nothing is done")


@pytest.mark.parametrize("killed", ["runner", "server"])
def test_a_kill_changes_no_answer(killed: str, quiet: dict[str, str], tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID, temperature=0, max_tokens=12), tmp_path / "out.jsonl"
    process = subprocess.Popen(words(source, out), stderr=subprocess.DEVNULL)
    done = some_done(source, process)
    [server] = psutil.Process(process.pid).children()
    if killed == "runner":
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.wait(10)  # it does not outlive the runner
        assert done <= batch.status(source).completed < len(SAID)
        assert subprocess.run(words(source, out), timeout=120, stderr=subprocess.DEVNULL).returncode == 0
    else:
        server.kill()
        assert process.wait(120) == 0
    assert contents(out) == quiet
