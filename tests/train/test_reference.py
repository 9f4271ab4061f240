"""The reference is asked once: the cache holds what the model says, however often the asking was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lowbit.checkpoint import open_checkpoint
from lowbit.train import TrainOptions, load
from lowbit.train.forms import Compact, Form, Hidden, TopK, chosen
from lowbit.train.loss import HiddenTargets, TopKTargets, softcap
from lowbit.train.reference import OwnReference, ReferenceCache

N, LENGTH, K = 20, 6, 5
CPU = torch.device("cpu")
KINDS = {"hidden": None, "topk": K, "compact": "compact"}


@pytest.fixture(scope="module")
def model(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_llama(tmp_path_factory.mktemp("reference") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sequences() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, (N, LENGTH), dtype=np.int32)


def new_cache(folder: Path, model: Any, kind: int | str | None) -> ReferenceCache:
    form: Form = Hidden(model.config.hidden_size)
    if kind is not None:
        form = TopK(K) if kind == K else Compact(model.config.vocab_size, seed=3)
    return ReferenceCache(folder, N, LENGTH, form)


def fill(cache: ReferenceCache, model: Any, sequences: np.ndarray, **more: Any) -> int:
    return cache.fill(OwnReference(model, torch.float32, cache.form), sequences, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(model: Any, sequences: np.ndarray) -> torch.Tensor:
    """What the model itself says at every position: (n * length, vocabulary) float64."""
    with torch.no_grad():
        return model(torch.from_numpy(sequences.astype(np.int64))).logits.flatten(0, 1).double()


class Killed(Exception):
    pass


class Counting:
    """may_go_on that notes where it was asked, says no at row ``stop`` and raises at row ``kill``."""

    def __init__(self, stop: int | None = None, kill: int | None = None) -> None:
        self.stop, self.kill = stop, kill
        self.asked: list[int] = []

    def __call__(self, done: int) -> bool:
        self.asked.append(done)
        if done == self.kill:
            raise Killed
        return done != self.stop


@pytest.mark.parametrize("top_k", KINDS.values(), ids=KINDS)
def test_stopped_and_resumed_gives_the_same_bytes(
    top_k: int | str | None, model: Any, sequences: np.ndarray, tmp_path: Path
) -> None:
    assert fill(new_cache(tmp_path / "whole", model, top_k), model, sequences, batch=2) == N
    first = new_cache(tmp_path / "parts", model, top_k)
    assert fill(first, model, sequences, batch=2, may_go_on=Counting(stop=6)) == 6
    second = new_cache(tmp_path / "parts", model, top_k)
    assert second.done == 6
    assert fill(second, model, sequences, batch=2, until=10) == 10
    third = new_cache(tmp_path / "parts", model, top_k)
    going = Counting()
    assert fill(third, model, sequences, batch=2, may_go_on=going) == N
    assert going.asked == list(range(10, N, 2))  # nothing twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("top_k", KINDS.values(), ids=KINDS)
def test_killed_between_two_notes_gives_the_same_bytes(
    top_k: int | str | None, model: Any, sequences: np.ndarray, tmp_path: Path
) -> None:
    fill(new_cache(tmp_path / "whole", model, top_k), model, sequences, batch=1)
    first = new_cache(tmp_path / "parts", model, top_k)
    with pytest.raises(Killed):
        fill(first, model, sequences, batch=1, may_go_on=Counting(kill=13))
    noted = json.loads((tmp_path / "parts" / "rows.json").read_text())
    assert 0 < noted <= 13
    going = Counting()
    fill(new_cache(tmp_path / "parts", model, top_k), model, sequences, batch=1, may_go_on=going)
    assert going.asked[0] == noted
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_from_any_row_on_what_was_done_is_noted_now_and_then(model: Any, sequences: np.ndarray, tmp_path: Path) -> None:
    cache = new_cache(tmp_path, model, None)
    fill(cache, model, sequences, batch=2, until=1)  # no multiple of the batches that follow
    with pytest.raises(Killed):
        fill(cache, model, sequences, batch=2, may_go_on=Counting(kill=19))
    assert json.loads((tmp_path / "rows.json").read_text()) > 1


def test_a_lost_array_is_asked_for_again(model: Any, sequences: np.ndarray, tmp_path: Path) -> None:
    fill(new_cache(tmp_path, model, K), model, sequences)
    before = contents(tmp_path)
    (tmp_path / "tokens.npy").unlink()
    again = new_cache(tmp_path, model, K)
    assert again.done == 0
    fill(again, model, sequences)
    assert contents(tmp_path) == before


def test_hidden_targets_give_the_exact_divergence(model: Any, sequences: np.ndarray, tmp_path: Path) -> None:
    cache = new_cache(tmp_path, model, None)
    fill(cache, model, sequences)
    rows = torch.tensor([13, 2, 7])  # in the order that is asked for
    head = model.get_output_embeddings().weight.detach()
    targets = cache.targets(rows, head, CPU)
    assert isinstance(targets, HiddenTargets)
    log_p = F.log_softmax(logits(model, sequences[rows.numpy()]), -1)
    student = logits(model, sequences[[4, 5, 6]])
    log_q = F.log_softmax(student, -1)
    part = slice(3, 15)
    divergence, slope = targets.compare(part, log_q[part].float())
    direct = (log_p.exp() * (log_p - log_q)).sum(-1)[part]
    # What is kept is float16: 11 bits of the hidden states.
    torch.testing.assert_close(divergence.double(), direct, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(slope.double(), (log_q.exp() - log_p.exp())[part], rtol=0.0, atol=2e-3)
    # Given these float16 values it is exact.
    kept = torch.from_numpy(np.load(tmp_path / "hidden.npy"))[rows].flatten(0, 1).double()
    log_p = F.log_softmax(kept @ head.double().T, -1)
    direct = (log_p.exp() * (log_p - log_q)).sum(-1)[part]
    torch.testing.assert_close(divergence.double(), direct, rtol=1e-5, atol=1e-5)


def test_top_k_targets_are_what_the_model_says(model: Any, sequences: np.ndarray, tmp_path: Path) -> None:
    cache = new_cache(tmp_path, model, K)
    fill(cache, model, sequences)
    rows = torch.tensor([13, 2, 7])
    targets = cache.targets(rows, None, CPU)
    assert isinstance(targets, TopKTargets)
    top = F.log_softmax(logits(model, sequences[rows.numpy()]), -1).topk(K)
    assert targets.tokens.dtype == torch.int64
    assert torch.equal(targets.tokens, top.indices)
    torch.testing.assert_close(targets.log_p.double(), top.values, rtol=1e-4, atol=1e-4)


def test_the_cap_of_gemma_4s_logits_is_part_of_what_it_says(tiny_gemma4: Callable[..., Path]) -> None:
    """Against transformers' own logits, of weights large enough to meet the cap."""
    with open_checkpoint(tiny_gemma4("31B")) as checkpoint:
        model = load(checkpoint)
    head = model.get_output_embeddings().weight
    head.data *= 40 / head.data.std()
    tokens = np.arange(3, 19, dtype=np.int32)[None]
    form = chosen(TrainOptions(targets=f"topk:{K}"), head.shape[1], head.shape[0], softcap(model))
    said = OwnReference(model, torch.float32, form)(tokens, 0)["logp"]
    with torch.no_grad():
        own = model(torch.from_numpy(tokens).long()).logits.float()
        raw = model.model(torch.from_numpy(tokens).long()).last_hidden_state @ head.T
    assert raw.abs().max() > 2 * own.abs().max()
    torch.testing.assert_close(said, F.log_softmax(own, -1).topk(K).values, rtol=1e-4, atol=1e-4)
