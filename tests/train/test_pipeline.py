"""A training run as a whole: what it refuses before it begins, what a kill costs, what it keeps apart."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from texts_to_train_on import sentences

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.run._hf_model import load
from lowbit.train import TrainOptions, data, importance, ledger, loop, pipeline
from lowbit.train.ledger import Ledger

FEW: dict[str, Any] = {"steps": 2, "threads": 1, "sequence_length": 32, "precision": "float32"}


@pytest.fixture
def prose(tmp_path: Path) -> str:
    return str(sentences(tmp_path / "prose.txt", 300))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_is_never_trained_over_itself(tiny_llama: Callable[..., Path], prose: str, tmp_path: Path) -> None:
    folder = tiny_llama()
    before = files_of(folder)
    with pytest.raises(BadOption, match="replace the model"):
        lowbit.train(folder, folder, options=TrainOptions(data=prose, **FEW))
    other = tmp_path / "another-model"
    shutil.copytree(folder, other)
    with pytest.raises(BadOption, match="holds a model already"):
        lowbit.train(folder, other, options=TrainOptions(data=prose, **FEW))
    assert files_of(folder) == files_of(other) == before
    assert not other.with_name("another-model.work").exists()


def test_what_is_not_trainable_is_refused_before_it_is_loaded(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda checkpoint: pytest.fail("loaded"))
    with pytest.raises(BadOption, match="no low-bit weights"):
        lowbit.train(tiny_llama(), tmp_path / "out", options=TrainOptions(recipe="q8_0", **FEW))


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": 1 << 32}, {"seed": -1}, {"minutes": float("inf")}, {"minutes": float("nan")}, {"clip": 0.0},
        {"learning_rate": -1e-4}, {"learning_rate": float("nan")}, {"sequence_length": 1}, {"threads": 0},
        {"warmup_steps": -1}, {"batch_size": 0}, {"targets": "topk:\u00b2"},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options(bad: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        TrainOptions(**bad)


def test_a_model_saved_anew_is_another(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama()
    with open_checkpoint(folder) as checkpoint:
        first = pipeline.run_key(checkpoint, TrainOptions())
        assert pipeline.run_key(checkpoint, TrainOptions(threads=1)) == first
        assert pipeline.run_key(checkpoint, TrainOptions(seed=1)) != first
    weights = folder / "model.safetensors"
    stamp = weights.stat().st_mtime_ns + 1
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(stamp, stamp))
    with open_checkpoint(folder) as checkpoint:
        assert pipeline.run_key(checkpoint, TrainOptions()) != first


def test_a_killed_stage_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(ledger, "time", SimpleNamespace(monotonic=lambda: now.value))
    path = tmp_path / "ledger.json"
    first = Ledger.open(path, "key")
    with first.stage("load"):
        now.value += 3
    with pytest.raises(KeyboardInterrupt), first.stage("data"):
        now.value += 40
        first.tick()
        now.value += 2  # after the last tick: lost
        raise KeyboardInterrupt
    second = Ledger.open(path, "key")
    assert second.done("load") and not second.done("data")
    assert second.spent() == 43 and second.earlier == {"data": 40}
    with second.stage("data"):
        now.value += 10
        second.tick()
        assert second.spent() == 43  # the stage's own seconds are not behind it yet
        now.value += 10
    assert second.stages == {"load": 3, "data": 60} and second.spent() == 63
    third = Ledger.open(path, "key")
    assert third.spent() == 63 and third.done("data")
    with pytest.raises(BadOption, match="another model or with other options"):
        Ledger.open(path, "another key")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"facts": {}, "stages": {}}'])
def test_a_spoilt_ledger_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(content, "utf-8")
    with pytest.raises(BadFile, match=r"ledger\.json"):
        Ledger.open(tmp_path / "ledger.json", "key")


def test_unseen_sequences_are_kept_from_all_of_training(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither calibration nor distillation sees them, and the curve holds their KLD."""
    calibrated: list[int] = []
    trained: list[int] = []

    collect_of = importance.collect_of

    def collected(*given: Any) -> int:
        calibrated.append(collect_of(*given))
        return calibrated[-1]

    monkeypatch.setattr(importance, "collect_of", collected)
    inner = loop.DistillationTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        trained.extend(inputs["row"].tolist())
        return inner(self, model, inputs, *more, **named)

    monkeypatch.setattr(loop.DistillationTrainer, "compute_loss", compute_loss)
    options = TrainOptions(data=prose, **FEW | {"steps": 12, "batch_size": 2})
    done = lowbit.train(tiny_llama(), tmp_path / "out", options=options)
    n = len(np.load(tmp_path / "out.work" / "sequences.npy"))
    assert n == 24
    assert set(trained) == set(range(n - 3))
    assert calibrated == [32 * (n - 3)]
    klds = [point["kld"] for point in done.record["curve"] if "kld" in point]
    assert len(klds) >= 2  # how often is a matter of its cost
    assert klds[-1] == pytest.approx(klds[0], rel=0.05)  # from a start this good twelve steps gain little


def test_training_helps_with_text_that_it_has_not_seen(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path
) -> None:
    options = TrainOptions(data=prose, start="nearest", learning_rate=1e-3, **FEW | {"steps": 12, "batch_size": 2})
    done = lowbit.train(tiny_llama(), tmp_path / "out", options=options)
    klds = [point["kld"] for point in done.record["curve"] if "kld" in point]
    assert len(klds) >= 2 and klds[-1] < 0.8 * klds[0]


def test_a_start_that_training_would_spoil_is_kept(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that are too large cost more than they bring: what comes out is the start, and the record says so."""
    options = TrainOptions(data=prose, learning_rate=3e-2, **FEW | {"steps": 12, "batch_size": 2})
    done = lowbit.train(tiny_llama(), tmp_path / "out", options=options)
    klds = [point["kld"] for point in done.record["curve"] if "kld" in point]
    assert klds[-1] > klds[0]
    assert f", then {klds[-1]:.4f}): the start is kept" in capsys.readouterr().err
    for path in done.start.iterdir():
        assert (done.path / path.name).read_bytes() == path.read_bytes()
    assert done.record["phases"][-1]["detail"] == "12 steps, no help with unseen text: the start was kept"


def test_a_budget_for_a_few_steps_goes_to_the_start(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is not asked for what nobody will be trained on; what comes out is the start, also when the command
    is given again."""
    monkeypatch.setattr(pipeline.Run, "_affordable", lambda *_: 2 * pipeline._FEWEST_STEPS - 1)
    asked: list[int] = []
    monkeypatch.setattr(pipeline.Run, "_ask", lambda self: asked.append(1))
    options = TrainOptions(data=prose, **FEW | {"steps": None, "minutes": 0.3, "batch_size": 2})
    folder = tiny_llama()
    done = lowbit.train(folder, tmp_path / "out", options=options)
    assert not done.record["curve"] and sum(asked) <= 1
    assert done.record["phases"][-1]["detail"] == "0 steps, too little time: the start was kept"
    for path in done.start.iterdir():
        assert (done.path / path.name).read_bytes() == path.read_bytes()
    again = lowbit.train(folder, tmp_path / "out", options=options)
    assert again.record == done.record


def test_where_distillation_gains_more_it_has_the_time(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_of(**changes: Any) -> pipeline.Run:
        run = object.__new__(pipeline.Run)
        run.options = TrainOptions(**changes)
        run.kv = "quantized" if run.options.kv else None  # type: ignore[assignment]
        run.recipes, run.checkpoint = lowbit.recipe.several(run.options.recipe), checkpoint
        run.model = load(checkpoint)
        return run

    def starts_well(**changes: Any) -> bool:
        return run_of(**changes)._starts_well()

    with open_checkpoint(tiny_llama()) as checkpoint:
        assert starts_well() and starts_well(recipe="int4_g32") and starts_well(recipe="mobile_w4")
        assert not starts_well(start="nearest") and not starts_well(kv="q4_0")
        assert not starts_well(recipe="mobile_mlp2") and not starts_well(recipe="q4_0,mlx_affine4")
        assert not starts_well(activations="runtime")
        assert run_of()._collecting(100.0) == pytest.approx(60, abs=1)
        assert run_of(start="nearest")._collecting(100.0) == pytest.approx(35)
        monkeypatch.setattr(pipeline, "_ROUNDING_SECONDS", 1.0)  # rounding has what it cannot do without
        assert run_of()._collecting(100.0) == pytest.approx(35)


def test_a_killed_calibration_goes_on(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it had collected, and what comes out is what one run would have given."""
    options = TrainOptions(data=prose, **FEW | {"batch_size": 8})
    folder = tiny_llama()
    whole = lowbit.train(folder, tmp_path / "whole", options=options)
    monkeypatch.setattr(importance, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(importance, "_SAVING", 0)
    add, seen = importance.Pass.add, []

    def added(self: Any, row: torch.Tensor) -> None:
        if len(seen) == 5:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(int(row[0, -1]))
        add(self, row)

    monkeypatch.setattr(importance.Pass, "add", added)
    with pytest.raises(KeyboardInterrupt):
        lowbit.train(folder, tmp_path / "out", options=options)
    work = tmp_path / "out.work"
    assert (work / "calibration.safetensors.partial.sums").exists()
    done = lowbit.train(folder, tmp_path / "out", options=options)
    assert len(seen) - 1 == whole.record["phases"][1]["tokens"] // 32  # none twice
    assert not list(work.glob("calibration*"))
    ours, theirs = (load_file(run.start / "model.safetensors") for run in (done, whole))
    assert all(np.array_equal(values, theirs[name]) for name, values in ours.items())


def test_sampled_batches_survive_a_kill(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def sample(model: Any, tokenizer: Any, length: int, seconds: float, seed: int) -> np.ndarray:
        if len(made) == 2:
            made.append(-1)
            raise KeyboardInterrupt
        made.append(seed)
        time.sleep(0.05)
        return np.full((4, length), 5 + seed, np.int32)

    monkeypatch.setattr(data, "sample", sample)
    folder, options = tiny_llama(), TrainOptions(minutes=0.2, **FEW)
    with pytest.raises(KeyboardInterrupt):
        lowbit.train(folder, tmp_path / "out", options=options)
    work = tmp_path / "out.work"
    assert len(list(work.glob("sampled-*.npy"))) == 2
    lowbit.train(folder, tmp_path / "out", options=options)
    seeds = [seed for seed in made if seed >= 0]
    assert seeds == list(range(len(seeds))) and len(seeds) > 2  # none twice
    sequences = np.load(work / "sequences.npy")
    assert {5, 6} <= set(sequences[:, 0].tolist())
    assert not list(work.glob("sampled-*.npy"))


def test_the_writer_keeps_its_rotary_frequencies(tiny_gemma3: Callable[..., Path], tmp_path: Path) -> None:
    with open_checkpoint(tiny_gemma3()) as checkpoint:
        run = pipeline.Run(checkpoint, TrainOptions(**FEW), Ledger(tmp_path / "l.json"), tmp_path, tmp_path / "out")
        run.load(time.monotonic())
        run.dtype = torch.bfloat16
        writer = run._writer()
    assert {parameter.dtype for parameter in writer.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    ours, theirs = dict(writer.named_buffers()), dict(run.model.named_buffers())
    rotary = [name for name in ours if name.endswith("inv_freq")]
    assert rotary and all(torch.equal(ours[name], theirs[name]) for name in rotary)


def test_a_training_that_diverged_is_not_exported(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = pipeline.distil

    def distil(*arguments: Any) -> Any:
        trainer, curve = inner(*arguments)
        with torch.no_grad():
            next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
        return trainer, curve

    monkeypatch.setattr(pipeline, "distil", distil)
    with pytest.raises(BadOption, match="diverged"):
        lowbit.train(tiny_llama(), tmp_path / "out", options=TrainOptions(data=prose, **FEW))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_of_a_hub_model_the_name_is_the_repository(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Model-1B" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_llama(), snapshot)
    config = json.loads((snapshot / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)
    (snapshot / "config.json").write_text(json.dumps(config), "utf-8")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == "Model-1B"
