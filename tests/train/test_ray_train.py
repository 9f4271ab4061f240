"""A training whose processes Ray Train starts, on a real cluster of this machine."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
sys.path.append(str(Path(__file__).parent.parent / "batch"))

from ray_nodes import Cluster
from texts_to_train_on import random_words

import lowbit
from lowbit import ray_cluster
from lowbit.cli import main
from lowbit.errors import BadOption, BadText, RuntimeFailed
from lowbit.train import TrainOptions
from lowbit.train.ray_entry import train_on_ray

FEW: dict[str, Any] = {
    "steps": 4, "threads": 1, "sequence_length": 16, "precision": "float32", "batch_size": 2, "start": "nearest",
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray kills workers where the machine is short of memory, whoever took it.
    with Cluster(cpus=2, environment={"RAY_memory_monitor_refresh_ms": "0"}) as found:
        yield found


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    return random_words(tmp_path / "prose.txt", 3000)


def test_two_workers_train_as_one_process_does(
    cluster: Cluster, tiny_llama: Callable[..., Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The command, with relative paths; then what it does where everything is done already, and where data is bad."""
    model = tiny_llama(num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    flags = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["train", model.name, "-o", "two", "--data", prose.name, *flags, "--launcher", "ray", "--processes", "2"]
    assert main([*words, "--ray-address", cluster.address]) == 0
    assert capfd.readouterr().out == "two\n"  # what its workers say may come when it is over, and too late
    alone = lowbit.train(model, tmp_path / "alone", options=TrainOptions(**FEW, data=str(prose)))
    ledger = json.loads((tmp_path / "two.work" / "ledger.json").read_text("utf-8"))
    ours, theirs = (record["curve"] for record in (ledger["facts"]["record"], alone.record))
    assert [point["step"] for point in ours] == [point["step"] for point in theirs]
    assert [point["loss"] for point in ours] == pytest.approx([point["loss"] for point in theirs], abs=1e-5)
    assert ours[-1]["kld"] == pytest.approx(theirs[-1]["kld"], abs=1e-5)
    assert (tmp_path / "two" / "lowbit.json").exists()
    assert not cluster.processes("RayTrainWorker")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\0" * 100)
    with pytest.raises(BadText, match="binary"):  # what a process said, in its own words
        train_on_ray(
            model, tmp_path / "bad", processes=2, address=cluster.address, options=TrainOptions(**FEW, data=str(bad))
        )


def test_a_worker_that_is_killed_ends_the_command_and_nothing_is_lost(
    cluster: Cluster, tiny_llama: Callable[..., Path], prose: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is killed while it trains: one line, and what the run had done is there for the same command."""
    model, out = tiny_llama(num_hidden_layers=1), tmp_path / "out"
    options = TrainOptions(**FEW | {"steps": 100_000}, data=str(prose))
    killed: list[int] = []
    said: list[str] = []

    def kill() -> None:
        ledger = tmp_path / "out.work" / "ledger.json"
        while not (ledger.exists() and "prepare" in json.loads(ledger.read_text("utf-8"))["stages"]):
            time.sleep(0.2)
        deadline = time.monotonic() + 60
        while "Distilling" not in "".join(said) and time.monotonic() < deadline:  # a worker's progress is shown here
            said.append(capfd.readouterr().err)
            time.sleep(0.2)
        process = cluster.processes("RayTrainWorker")[1]
        process.kill()
        killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(RuntimeFailed, match="The same command goes on from here"):
        train_on_ray(model, out, processes=2, address=cluster.address, options=options)
    thread.join(10)
    assert killed and not out.exists()
    assert "Distilling" in "".join(said)
    stages = json.loads((tmp_path / "out.work" / "ledger.json").read_text("utf-8"))["stages"]
    assert {"data", "reference", "prepare"} <= stages.keys() and "distil" not in stages


def test_a_cluster_that_is_not_there_or_too_small(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadOption, match="the Ray cluster is too small; found 2 CPUs on 1 nodes: 2 processes of 1"):
        train_on_ray("model", tmp_path / "out", processes=3, address=cluster.address)
    with pytest.raises(BadOption, match="no Ray cluster answers"):
        train_on_ray("model", tmp_path / "out", processes=2, address="127.0.0.1:9")
    for more in (["--processes", "2"], ["--launcher", "ray"], ["--ray-address", "127.0.0.1:9"]):
        assert main(["train", "model", "-o", str(tmp_path / "out"), *more]) == 2
        assert "half of a launcher" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["train", "model", "-o", str(tmp_path / "out"), "--launcher", "ray", "--processes", "2"]
    assert main(words) == 2
    assert "pip install 'lowbit[ray-train]'" in capsys.readouterr().err


def test_what_a_batch_hushed_is_shown_again() -> None:
    """A batch hides what Ray prints; a training in the same process shows its workers' progress all the same."""
    from ray._private import worker

    printing = worker.print_to_stdstream
    for shows in (False, False, True):
        ray_cluster._show(shows)
        assert (worker.print_to_stdstream is printing) == shows
