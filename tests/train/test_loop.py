"""The loop: the learning rate by steps and by the clock, the order of the data, and runs that are killed and go on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from texts_to_train_on import random_words
from transformers import TrainerCallback

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.train import TrainOptions, loop, pipeline
from lowbit.train.loop import DistillationTrainer, Schedule, SequenceOrder, latest_checkpoint
from lowbit.train.pipeline import TrainResult

STEPS, SAVED_AT, KILLED_AT = 7, 3, 5


class Clock:
    """A time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock, perf_counter=clock, time=clock))
    return clock


def factors_by_steps(steps: int) -> list[float]:
    schedule = Schedule(TrainOptions(steps=steps), seconds=1.0, spent=0.0)
    return [schedule.factor(step) for step in range(steps)]


def assert_warms_up_then_falls(factors: list[float]) -> None:
    peak = int(np.argmax(factors))
    assert 0 < peak < len(factors) // 2
    assert factors[0] < 0.5 * factors[peak]
    assert all(a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))
    assert 0.8 < factors[peak] <= 1.0
    assert 0.0 <= factors[-1] < 0.25 * factors[peak]


def test_by_steps_it_warms_up_then_falls(clock: Clock) -> None:
    assert_warms_up_then_falls(factors_by_steps(300))


def test_by_steps_the_clock_does_not_matter(clock: Clock) -> None:
    expected = factors_by_steps(50)
    schedule = Schedule(TrainOptions(steps=50), seconds=10.0, spent=9.0)
    got = []
    for step in range(50):
        got.append(schedule.factor(step))
        clock.now += 3.0
    assert got == expected


def test_by_the_clock_it_warms_up_then_falls(clock: Clock) -> None:
    schedule = Schedule(TrainOptions(), seconds=600.0, spent=0.0)
    factors = []
    for step in range(300):
        factors.append(schedule.factor(step))
        clock.now += 2.0
    assert_warms_up_then_falls(factors)
    clock.now += 1000.0
    assert 0.0 <= schedule.factor(300) <= factors[-1]


def test_by_the_clock_the_number_of_steps_does_not_matter(clock: Clock) -> None:
    schedule = Schedule(TrainOptions(), seconds=100.0, spent=0.0)
    clock.now += 50.0
    assert schedule.factor(1000) == schedule.factor(5000)


def test_the_budget_ends_the_run(clock: Clock) -> None:
    schedule = Schedule(TrainOptions(), seconds=100.0, spent=0.0)
    assert schedule.fraction() == 0.0
    clock.now += 25.0
    assert schedule.fraction() == pytest.approx(0.25)
    assert schedule.time_left() == pytest.approx(75.0)
    clock.now += 80.0
    assert schedule.fraction() == 1.0
    assert schedule.time_left() == 0.0
    assert Schedule(TrainOptions(), seconds=0.0, spent=0.0).fraction() == 1.0
    assert Schedule(TrainOptions(), seconds=-3.0, spent=0.0).fraction() == 1.0


def test_a_resumed_schedule_goes_on_where_it_was(clock: Clock) -> None:
    whole = Schedule(TrainOptions(), seconds=100.0, spent=0.0)
    clock.now += 60.0
    resumed = Schedule(TrainOptions(), seconds=100.0, spent=60.0)
    for _ in range(3):
        assert resumed.elapsed() == pytest.approx(whole.elapsed())
        assert resumed.fraction() == pytest.approx(whole.fraction())
        assert resumed.factor(500) == pytest.approx(whole.factor(500))
        clock.now += 15.0
    assert resumed.fraction() == 1.0


def test_by_steps_the_time_left_is_that_of_the_steps(clock: Clock) -> None:
    schedule = Schedule(TrainOptions(steps=10), seconds=1.0, spent=0.0)
    clock.now += 8.0
    schedule.step = 4
    assert schedule.fraction() == pytest.approx(0.4)
    assert schedule.time_left() == pytest.approx(12.0)
    schedule.step = 10
    assert schedule.fraction() == 1.0 and schedule.time_left() == 0.0


def test_every_sequence_comes_once_before_any_comes_twice() -> None:
    n = 11
    sequences = np.arange(n * 4, dtype=np.int32).reshape(n, 4)
    seen = list(itertools.islice(SequenceOrder(sequences, seed=1), 3 * n))
    for item in seen:
        assert item["input_ids"].dtype == torch.int64
        assert item["input_ids"].tolist() == sequences[int(item["row"])].tolist()
    rows = [int(item["row"]) for item in seen]
    rounds = [rows[start : start + n] for start in range(0, 3 * n, n)]
    assert all(sorted(each) == list(range(n)) for each in rounds)
    assert rounds[0] != rounds[1]


def test_the_order_is_that_of_the_seed() -> None:
    sequences = np.zeros((50, 2), np.int32)

    def rows(order: SequenceOrder) -> list[int]:
        return [int(item["row"]) for item in itertools.islice(order, 120)]

    order = SequenceOrder(sequences, seed=1)
    assert rows(order) == rows(order) == rows(SequenceOrder(sequences, seed=1))
    assert rows(order) != rows(SequenceOrder(sequences, seed=2))


def make_checkpoint(folder: Path, step: int, seconds: float | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trained.safetensors").write_bytes(b"weights")
    if seconds is not None:
        (path / "whole").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    return path


def test_the_newest_whole_checkpoint_counts_and_others_go(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9, 40.0)
    newest = make_checkpoint(tmp_path, 100, 450.5)
    make_checkpoint(tmp_path, 110, None)  # half-written: newer, but no use
    make_checkpoint(tmp_path, 8, None)
    assert latest_checkpoint(tmp_path) == (newest, 450.5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-100"]
    assert latest_checkpoint(tmp_path) == (newest, 450.5)


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    make_checkpoint(tmp_path, 5, None)
    assert latest_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())


class Killed(Exception):
    pass


class SaveThenDie(TrainerCallback):  # type: ignore[misc]
    """Saves at one step and is killed at a later one, so that the steps between are lost."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SAVED_AT:
            control.should_save = True
        if state.global_step == KILLED_AT:
            raise Killed


@pytest.fixture
def one_thread() -> Any:
    """Sums in the same order every time, on any machine."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_folder(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "tiny"
    save_tiny_llama(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words enough for every sequence that the steps may ask for."""
    return random_words(tmp_path_factory.mktemp("prose") / "prose.txt", 2000)


def short_run(folder: Path, prose: Path, out: Path, train: str) -> TrainResult:
    options = TrainOptions(
        minutes=1.0, steps=STEPS, start="nearest", train=train, data=str(prose), sequence_length=16, batch_size=2,
        accumulate=2, learning_rate=0.01, precision="float32", threads=1,
    )  # fmt: skip
    return lowbit.train(folder, out, options=options)


def contents(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name).copy() for name in checkpoint.names}


def differing(a: Path, b: Path) -> list[str]:
    """Tensors of which one bit or more differs."""
    ours, theirs = contents(a), contents(b)
    assert list(ours) == list(theirs)
    return [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of every forward pass of training, in order."""
    seen: list[list[int]] = []
    plain = DistillationTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        seen.append(inputs["row"].tolist())
        return plain(self, model, inputs, *more, **named)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize("train", ["full", "scales"])
def test_killed_and_resumed_is_the_same_run_bit_for_bit(
    train: str,
    tiny_folder: Path,
    prose: Path,
    tmp_path: Path,
    rows_seen: list[list[int]],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.Run, "_is_worse", lambda *_: False)  # what training made is what is compared
    whole = short_run(tiny_folder, prose, tmp_path / "whole", train)
    in_one_go = list(rows_seen)
    assert len(in_one_go) == STEPS * 2
    rows_seen.clear()

    plain = DistillationTrainer.__init__

    def init(self: Any, *positional: Any, **named: Any) -> None:
        plain(self, *positional, **named)
        self.add_callback(SaveThenDie())

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(DistillationTrainer, "__init__", init)
        short_run(tiny_folder, prose, tmp_path / "parts", train)
    assert rows_seen == in_one_go[: KILLED_AT * 2]
    assert not (tmp_path / "parts").exists()
    make_checkpoint(tmp_path / "parts.work" / "trainer", KILLED_AT, None)  # a second save that the kill cut short
    rows_seen.clear()

    parts = short_run(tiny_folder, prose, tmp_path / "parts", train)
    assert rows_seen == in_one_go[SAVED_AT * 2 :]
    assert differing(parts.start, whole.start) == []
    assert differing(parts.path, whole.path) == []
    assert len(differing(whole.path, whole.start)) > 5  # it did train
    steps = [entry["step"] for entry in parts.record["curve"]]
    assert steps == [entry["step"] for entry in whole.record["curve"]] == sorted(set(steps))
    assert steps[-1] == STEPS
    seconds = [entry["seconds"] for entry in parts.record["curve"]]
    assert seconds == sorted(seconds)
    assert short_run(tiny_folder, prose, tmp_path / "parts", train) == parts  # over: nothing is done again
    assert len(rows_seen) == (STEPS - SAVED_AT) * 2


def test_training_comes_closer_to_the_reference(
    tiny_folder: Path, prose: Path, tmp_path: Path, one_thread: None
) -> None:
    options = TrainOptions(
        steps=60, start="nearest", data=str(prose), sequence_length=16, batch_size=4, learning_rate=5e-4,
        precision="float32", threads=1,
    )  # fmt: skip
    curve = lowbit.train(tiny_folder, tmp_path / "out", options=options).record["curve"]
    assert curve[-1]["step"] == 60
    # On sequences that it never saw, and within what was trained.
    assert 0 < curve[-1]["kld"] < 0.6 * curve[0]["kld"]
    assert 0 < curve[-1]["loss"] < 0.6 * curve[0]["loss"]
