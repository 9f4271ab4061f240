"""Several processes that share a model train as one would: the same curve, whatever their number, and after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts_to_train_on import random_words

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption
from lowbit.train import TrainOptions
from lowbit.train.loop import SequenceOrder
from lowbit.train.sharded_trainer import ShareOfOrder, check_divisible, share_of
from lowbit.train.world import World
from processes import together, train_one

FEW: dict[str, Any] = {
    "steps": 5, "threads": 1, "sequence_length": 16, "precision": "float32", "batch_size": 4, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_words(tmp_path_factory.mktemp("prose") / "prose.txt", 3000))


def trained(n: int, model: Path, out: Path, options: dict[str, Any], **more: int) -> dict[str, Any]:
    assert together(n, train_one, model, out, options, *more.values()) == [0] * n
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text("utf-8"))
    return found


def assert_same_curve(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-5) -> None:
    ours, theirs = a["curve"], b["curve"]
    assert [point["step"] for point in ours] == [point["step"] for point in theirs]
    assert [point["loss"] for point in ours] == pytest.approx([point["loss"] for point in theirs], abs=tolerance)
    assert [point["lr"] for point in ours] == [point["lr"] for point in theirs]
    for one, other in itertools.zip_longest(ours, theirs):
        if "kld" in one and "kld" in other:  # how often is a matter of its cost
            assert one["kld"] == pytest.approx(other["kld"], abs=tolerance)
    assert "kld" in ours[-1] and "kld" in theirs[-1]


def contents(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name).copy() for name in checkpoint.names}


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = contents(a), contents(b)
    assert list(ours) == list(theirs)
    for name in ours:
        # Sums in another order: here and there a master ends up on the other side of the middle between two codes.
        differing = np.abs(ours[name] - theirs[name]) > 1e-5 * np.abs(theirs[name]).max()
        assert differing.mean() < 2e-3, name


NEAREST = {"start": "nearest"}
CASES = {
    "llama": (("tiny_llama", {}), NEAREST | {"accumulate": 2, "batch_size": 2}, (2, 4)),
    "gemma3, tied, calibrated": (("tiny_gemma3", {}), {"targets": "topk:8"}, (2,)),
    "qwen3, learned scales": (("tiny_qwen3", {}), NEAREST | {"train": "both"}, (2,)),
    "qwen3, scales alone": (("tiny_qwen3", {}), NEAREST | {"train": "scales"}, (2,)),
    "uneven rows": (("tiny_llama", {"tie_word_embeddings": True}), NEAREST | {"batch_size": 6}, (3,)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_one_process(
    case: str, request: pytest.FixtureRequest, prose: str, tmp_path: Path
) -> None:
    (fixture, changes), more, sizes = CASES[case]
    model = request.getfixturevalue(fixture)(num_hidden_layers=2, **changes)
    options = FEW | {"data": prose} | more
    alone = trained(1, model, tmp_path / "alone", options)
    for n in sizes:
        several = trained(n, model, tmp_path / f"by-{n}", options)
        assert_same_curve(several, alone)
        start, end = (contents(tmp_path / name) for name in (f"by-{n}.work/start", "alone.work/start"))
        assert all(start[name].tobytes() == end[name].tobytes() for name in end)  # the start is the same to the bit
        assert_same_weights(tmp_path / f"by-{n}", tmp_path / "alone")


def test_a_run_goes_on_with_another_number_of_processes(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path
) -> None:
    """2, then 4, then 1, each killed after a step that was not saved; and what one began, two end."""
    model, options = tiny_llama(num_hidden_layers=2), FEW | NEAREST | {"data": prose, "steps": 8}
    alone = trained(1, model, tmp_path / "alone", options)
    parts = tmp_path / "parts"
    assert together(2, train_one, model, parts, options, 2, 3) == [9, 9]
    assert [path.name for path in (tmp_path / "parts.work" / "trainer").iterdir()] == ["checkpoint-2"]
    assert together(4, train_one, model, parts, options, 5, 6) == [9] * 4
    assert not parts.exists()
    assert_same_curve(trained(1, model, parts, options), alone)
    assert_same_weights(parts, tmp_path / "alone")
    back = tmp_path / "back"
    assert together(1, train_one, model, back, options, 3, 4) == [9]
    assert_same_curve(trained(2, model, back, options), alone)


def test_bfloat16_products(tiny_llama: Callable[..., Path], prose: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    options = FEW | {"data": prose, "precision": "bfloat16", "learning_rate": 1e-4} | NEAREST
    alone = trained(1, model, tmp_path / "alone", options)
    assert_same_curve(trained(2, model, tmp_path / "two", options), alone, tolerance=5e-4)


def test_text_of_their_own_is_written_together(tiny_gemma3: Callable[..., Path], tmp_path: Path) -> None:
    options = FEW | NEAREST | {"minutes": 0.3, "steps": 2}
    done = trained(2, tiny_gemma3(num_hidden_layers=2), tmp_path / "out", options)
    assert done["data"]["sampled_tokens"] > 0
    assert done["curve"] and (tmp_path / "out" / "lowbit.json").exists()


def test_by_the_clock_they_decide_together(tiny_llama: Callable[..., Path], prose: str, tmp_path: Path) -> None:
    """Whether there is time for steps that gain on the start."""
    model, options = tiny_llama(num_hidden_layers=2), FEW | {"data": prose, "steps": None}
    short = trained(2, model, tmp_path / "short", options | {"minutes": 0.002})
    assert not short["curve"] and short["phases"][-1]["detail"] == "0 steps, too little time: the start was kept"
    assert_same_weights(tmp_path / "short", tmp_path / "short.work" / "start")
    assert trained(2, model, tmp_path / "longer", options | {"minutes": 0.3})["curve"]


def test_a_step_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(BadOption, match=r"3 processes .* Try --batch-size 2 --accumulate 3"):
        check_divisible(TrainOptions(batch_size=2, accumulate=2), 3)
    check_divisible(TrainOptions(batch_size=2, accumulate=3), 3)


@pytest.mark.parametrize("batch_size,accumulate,n", [(4, 1, 2), (2, 4, 4), (2, 3, 2), (6, 1, 3), (1, 8, 8), (4, 3, 2)])
def test_shares_of_a_step_are_the_step(batch_size: int, accumulate: int, n: int) -> None:
    options = TrainOptions(batch_size=batch_size, accumulate=accumulate)
    own = share_of(options, n)
    step = batch_size * accumulate
    assert own.batch_size <= batch_size and own.batch_size * own.accumulate * n == step
    order = SequenceOrder(np.arange(22, dtype=np.int32).reshape(11, 2), seed=1)
    whole = [int(item["row"]) for item in itertools.islice(order, 3 * step)]
    shares = [
        [int(item["row"]) for item in itertools.islice(ShareOfOrder(order, step, World(rank, n)), 3 * step // n)]
        for rank in range(n)
    ]
    each = step // n
    assert whole == [row for s in range(3) for share in shares for row in share[s * each : (s + 1) * each]]


def test_the_loss_of_a_process_is_one_line_and_the_run_goes_on(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path
) -> None:
    """The command under torchrun: one process is killed, the others end with one line; fewer go on."""
    model, out = tiny_llama(num_hidden_layers=1), tmp_path / "out"
    words = ["train", str(model), "-o", str(out), "--data", prose, "--sequence-length", "16", "--batch-size", "4"]
    words += ["--precision", "float32", "--threads", "1", "--start", "nearest", "--steps"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "lowbit"]
    with subprocess.Popen([*launcher, *words, "100000"], stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        said = []
        for line in running.stderr:
            said.append(line)
            if line.startswith("Distilling"):
                break
        time.sleep(1.0)
        assert running.poll() is None, said
        children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
        rest = running.stderr.read()
        assert running.wait(60) != 0
    assert rest, said
    lines = [line for line in rest.splitlines() if line.startswith("lowbit: ")]
    assert len(lines) == 1 and "another of its processes has gone" in lines[0]
    assert sum(line.startswith("Distilling") for line in said) == 1  # process 0 alone says what is done
    assert not out.exists() and (tmp_path / "out.work" / "ledger.json").exists()
