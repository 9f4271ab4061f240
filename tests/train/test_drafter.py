"""A drafter: cut from its target or brought along, trained on what the target as it ships writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts_to_train_on import sentences

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadOption
from lowbit.run._hf_model import load
from lowbit.train import TrainOptions, loop, reference
from lowbit.train.cut import Cut, layers_asked
from lowbit.train.drafter import train_drafter

FEW: dict[str, Any] = {"steps": 12, "threads": 1, "sequence_length": 32, "precision": "float32", "batch_size": 4}


@pytest.fixture
def prose(tmp_path: Path) -> str:
    return str(sentences(tmp_path / "prose.txt", 400))


@pytest.fixture
def target(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def packed(target: Path, tmp_path: Path) -> Path:
    """What ships: Q4_0."""
    return lowbit.pack(target, "q4_0", tmp_path / "target.gguf").path


def divergence(reference_model: Any, student: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (torch.log_softmax(model(ids).logits, -1) for model in (reference_model, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("asked", "n"), [("layers:4", 4), ("layers:1", 1), ("model.gguf", None), ("layers", None), ("org/layers", None)]
)
def test_layers_are_asked_for_by_number(asked: str, n: int | None) -> None:
    assert layers_asked(asked) == n


@pytest.mark.parametrize("asked", ["layers:", "layers:0", "layers:two", "layers:-1"])
def test_what_is_no_number_is_refused(asked: str) -> None:
    with pytest.raises(BadOption, match="not a number of layers"):
        layers_asked(asked)


def test_a_cut_has_the_first_the_last_and_what_lies_between(target: Path) -> None:
    with open_checkpoint(target) as checkpoint:
        assert Cut(checkpoint, 1).layers == [0]
        assert Cut(checkpoint, 2).layers == [0, 3]
        cut = Cut(checkpoint, 3)
        assert cut.layers == [0, 2, 3]
        for ours, theirs in ((0, 0), (1, 2), (2, 3)):
            name = "model.layers.{}.mlp.up_proj.weight"
            assert np.array_equal(cut.read(name.format(ours)), checkpoint.read(name.format(theirs)))
        assert np.array_equal(cut.read("model.norm.weight"), checkpoint.read("model.norm.weight"))
        model = load(cut)
        assert len(model.model.layers) == 3 and torch.isfinite(model(torch.arange(8)[None]).logits).all()
        for n in (4, 5):
            with pytest.raises(BadOption, match="fewer layers"):
                Cut(checkpoint, n)


def test_a_layer_goes_to_a_place_of_its_kind(tiny_gemma3: Callable[..., Path]) -> None:
    """Runtimes know which layer's attention slides by its place."""
    with open_checkpoint(tiny_gemma3(num_hidden_layers=13)) as checkpoint:
        source = checkpoint.config["layer_types"]
        assert source.count("full_attention") == 2
        for n in range(1, 13):
            cut = Cut(checkpoint, n)
            assert cut.layers == sorted(set(cut.layers)) and len(cut.layers) == n
            assert [source[i] for i in cut.layers] == source[:n] == cut.config["layer_types"]


def test_a_cut_of_what_ships_comes_closer_to_it(packed: Path, prose: str, tmp_path: Path) -> None:
    """Trained, packed and opened again: fewer layers, the target's vocabulary, and nearer to the target."""
    out = tmp_path / "drafter"
    done = train_drafter(packed, "layers:2", out, options=TrainOptions(data=prose, **FEW | {"steps": 40}))
    assert done.path == out and [phase["name"] for phase in done.record["phases"]] == ["distilled"]
    file = lowbit.pack(out, "q8_0", tmp_path / "drafter.gguf").path
    fields, theirs = ({f.key: f.value for f in GgufFile(path).fields} for path in (file, packed))
    assert fields["llama.block_count"] == 2 and theirs["llama.block_count"] == 4
    assert fields["tokenizer.ggml.tokens"] == theirs["tokenizer.ggml.tokens"]
    ids = torch.from_numpy(np.load(tmp_path / "drafter.work" / "sequences.npy")[-4:].astype(np.int64))
    with open_checkpoint(packed) as of, open_checkpoint(file) as trained:
        model = load(of)
        before, after = divergence(model, load(Cut(of, 2)), ids), divergence(model, load(trained), ids)
    assert after < 0.8 * before
    curve = [entry["kld"] for entry in done.record["curve"] if "kld" in entry]
    assert curve[-1] < curve[0]


def test_what_the_target_says_is_what_the_packed_one_says(packed: Path, prose: str, tmp_path: Path) -> None:
    """The targets are the quantized model's, not those of the model it was made from."""
    train_drafter(packed, "layers:1", tmp_path / "drafter", options=TrainOptions(data=prose, **FEW))
    work = tmp_path / "drafter.work"
    kept = np.load(work / "reference" / "hidden.npy")[0].astype(np.float32)
    tokens = torch.from_numpy(np.load(work / "sequences.npy")[:1].astype(np.int64))
    with open_checkpoint(packed) as of, torch.no_grad():
        expected = load(of).model(tokens).last_hidden_state[0].numpy()
    assert np.allclose(kept, expected, atol=2e-3)


def test_a_drafter_of_its_own_is_adapted(target: Path, packed: Path, prose: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    train_drafter(target, "layers:1", mine, options=TrainOptions(data=prose, **FEW | {"steps": 2}))
    with open_checkpoint(mine) as checkpoint:
        embedding = checkpoint.read("model.embed_tokens.weight")
        before = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    train_drafter(packed, mine, tmp_path / "adapted", options=TrainOptions(data=prose, **FEW))
    with open_checkpoint(tmp_path / "adapted") as checkpoint:
        assert np.array_equal(checkpoint.read("model.embed_tokens.weight"), embedding)
        assert not np.array_equal(checkpoint.read("model.layers.0.mlp.up_proj.weight"), before)


def test_another_vocabulary_is_refused(target: Path, prose: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(target, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(BadOption, match="another vocabulary"):
        train_drafter(target, other, tmp_path / "out", options=TrainOptions(data=prose, **FEW))
    with pytest.raises(BadOption, match="fewer layers"):
        train_drafter(target, "layers:4", tmp_path / "out", options=TrainOptions(data=prose, **FEW))
    with pytest.raises(BadOption, match="replace the model"):
        train_drafter(target, "layers:2", target, options=TrainOptions(data=prose, **FEW))


def test_a_kill_costs_nothing_that_was_done(
    packed: Path, prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it is trained: the target is not asked again, and the same drafter comes out."""
    options = TrainOptions(data=prose, **FEW)
    whole = train_drafter(packed, "layers:2", tmp_path / "whole", options=options)
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    inner, steps = loop.DistillationTrainer.compute_loss, []

    def compute_loss(self: Any, *given: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return inner(self, *given, **named)

    monkeypatch.setattr(loop.DistillationTrainer, "compute_loss", compute_loss)
    with pytest.raises(KeyboardInterrupt):
        train_drafter(packed, "layers:2", tmp_path / "out", options=options)
    asked: list[int] = []
    fill = reference.ReferenceCache.fill
    monkeypatch.setattr(
        reference.ReferenceCache, "fill", lambda self, *given, **named: asked.append(1) or fill(self, *given, **named)
    )
    done = train_drafter(packed, "layers:2", tmp_path / "out", options=options)
    assert not asked
    with open_checkpoint(whole.path) as first, open_checkpoint(done.path) as second:
        for name in first.names:
            assert np.allclose(first.read(name), second.read(name), atol=1e-6), name
