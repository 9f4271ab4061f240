"""Kill -9 at any moment: the same command goes on, redoes no stage that is done, and ends with every file whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint

# What the command says as it goes, and the file that stands when the stage is done.
MARKS = ("naive:", "Sampling", "Calibrated", "Distilling", "pack:", "Measuring")
STAGES = {
    "reference: ": "reference.gguf",
    "naive: ": "naive-q4_0.gguf",
    "calibrated: ": "calibrated-q4_0.gguf",
    "pack: ": "model-q4_0.gguf",
}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lowbit", "ship", *words, "--out", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def stop_at(
    process: subprocess.Popen[str], mark: str | tuple[str, ...], delay: float, how: signal.Signals
) -> list[str]:
    """Sends ``how`` to the process group ``delay`` seconds after a line that starts with a mark; gives all lines."""
    assert process.stderr and process.stdout
    lines = []
    with process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith(mark):
                time.sleep(delay)
                if process.poll() is None:
                    os.killpg(process.pid, how)
                break
        lines += process.stderr
    return lines


def finished(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in STAGES.values() if (folder / name).exists()}


def test_killed_at_any_moment(byte_folder: Path, few_steps: tuple[str, ...], tmp_path: Path) -> None:
    chance = random.Random(20)
    folder = tmp_path / "run"
    words = (str(byte_folder), *few_steps)
    killed = 0
    for i in range(len(MARKS)):
        before = finished(folder)
        process = start(folder, *words)
        # The delay of the last kill may have carried it past this mark: then at the next one.
        lines = stop_at(process, MARKS[i:], chance.uniform(0, 0.4), signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        redone = [line for line in lines if any(line.startswith(s) and n in before for s, n in STAGES.items())]
        assert not redone
        assert before.items() <= finished(folder).items()
        for name in finished(folder):
            with open_checkpoint(folder / name) as checkpoint:  # whole: the header is checked against the size
                checkpoint.read(checkpoint.names[-1])

    assert killed >= len(MARKS) - 1
    before = finished(folder)
    assert set(before) == set(STAGES.values())
    process = start(folder, *words)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert out == f"{(folder / 'report.html').resolve()}\n"
    assert "Distilling" not in errors and finished(folder) == before
    assert not list(folder.rglob("*.partial"))
    record = json.loads((folder / "lowbit.json").read_text(encoding="utf-8"))
    for name, entry in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert [stage["name"] for stage in record["stages"]][-1] == "measure"


def test_interrupted(byte_folder: Path, few_steps: tuple[str, ...], tmp_path: Path) -> None:
    process = start(tmp_path / "run", str(byte_folder), *few_steps)
    lines = stop_at(process, "Sampling", 0.1, signal.SIGINT)
    assert process.returncode == 130
    assert lines[-1] == "lowbit: interrupted; the same command goes on from here\n"
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_two_at_once(
    byte_folder: Path,
    few_steps: tuple[str, ...],
    tmp_path: Path,
    lowbit_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    process = start(tmp_path / "run", str(byte_folder), *few_steps)
    assert process.stderr
    with process:
        assert process.stderr.readline().startswith("reference:")
        process.send_signal(signal.SIGSTOP)
        second = lowbit_command("ship", byte_folder, *few_steps, "--out", tmp_path / "run")
        os.killpg(process.pid, signal.SIGKILL)
    assert second.returncode == 2
    assert second.stderr == (
        f"lowbit: {tmp_path / 'run'}: another run is at work in this folder. Wait for it, or choose another --out\n"
    )


@pytest.mark.parametrize("name", ["work/run.json", "work/times.json", "lowbit.json"])
def test_a_spoilt_note_is_named(
    byte_folder: Path,
    few_steps: tuple[str, ...],
    tmp_path: Path,
    lowbit_command: Callable[..., subprocess.CompletedProcess[str]],
    name: str,
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("{")
    done = lowbit_command("ship", byte_folder, *few_steps, "--out", tmp_path / "run")
    assert done.returncode == 2 and str(path) in done.stderr.splitlines()[-1]
