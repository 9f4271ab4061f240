"""The commands as launchers start them: ``accelerate launch``, and the whole of ``lowbit ship`` under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts_to_train_on import random_words

import lowbit
from lowbit.release.lock import read as read_lock
from lowbit.train import TrainOptions

FEW: dict[str, Any] = {
    "steps": 3, "threads": 1, "sequence_length": 16, "precision": "float32", "batch_size": 2, "start": "nearest",
}  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "--"]
ACCELERATE = ["accelerate.commands.launch", "--num-processes", "2", "--num-machines", "1", "--use-fsdp", "-m"]


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("prose") / "prose.txt", 6000)


def launched(launcher: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    """A lowbit command in two processes of this machine."""
    flags = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", *launcher, "lowbit", *map(str, words), *flags]
    # Where another training on this machine listens already, a launcher's usual port would be its own.
    environment = {**os.environ, "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


def curve(record: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in record["curve"]]


def test_accelerate_launch(tiny_llama: Callable[..., Path], prose: Path, tmp_path: Path) -> None:
    model, out = tiny_llama(num_hidden_layers=1), tmp_path / "two"
    done = launched(ACCELERATE, "train", model, "-o", out, "--data", prose)
    assert done.stdout.splitlines() == [str(out)]  # process 0 alone says it
    assert done.stderr.count("Distilling") == 1
    alone = lowbit.train(model, tmp_path / "alone", options=TrainOptions(**FEW, data=str(prose)))
    ledger = json.loads((tmp_path / "two.work" / "ledger.json").read_text("utf-8"))
    assert curve(ledger["facts"]["record"]) == pytest.approx(curve(alone.record), abs=1e-5)
    assert (out / "lowbit.json").exists()


def test_ship_under_torchrun(
    tiny_llama: Callable[..., Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_llama(num_hidden_layers=1), tmp_path / "run"
    text = tmp_path / "held-out.txt"
    text.write_text(prose.read_text("utf-8")[::-1], encoding="utf-8")
    words = ["ship", model, "--out", out, "--data", prose, "--text", text, "--no-speed"]
    done = launched(TORCHRUN, *words)
    assert done.stdout.splitlines() == [str((out / "report.html").resolve())]
    record = json.loads((out / "lowbit.json").read_text("utf-8"))
    assert {Path(artifact["path"]).name for artifact in record["measure"]["artifacts"]} >= {"model-q4_0.gguf"}
    assert record["certificate"] and read_lock(out / "lowbit.lock").members
    alone = lowbit.ship(model, out=tmp_path / "alone", text=text, speed=False, data=str(prose), **FEW)
    assert curve(record["training"]) == pytest.approx(curve(alone["training"]), abs=1e-5)
    before = (out / "model-q4_0.gguf").read_bytes()
    assert launched(TORCHRUN, *words).stdout == done.stdout  # what is done is not done again
    assert (out / "model-q4_0.gguf").read_bytes() == before
