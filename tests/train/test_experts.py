"""Experts, calibrated one by one: their sums against autograd over every label, and files that are nearer for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import Unsupported
from lowbit.pack.calibration import Calibration
from lowbit.pack.mix import choose
from lowbit.run._hf_model import load
from lowbit.train import data, experts
from lowbit.train.importance import CollectOptions, collect
from lowbit.train.model import load_tokenizer

LAYER = "model.layers.1.experts"
GATE_UP, DOWN = f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"
# Experts that make up most of the model, so that what becomes of them shows in the whole.
SIZES = {"moe_intermediate_size": 64, "intermediate_size": 32}


@pytest.fixture
def model(tiny_gemma4_moe: Callable[..., Path]) -> Path:
    return tiny_gemma4_moe(**SIZES)


def written(path: Path, seed: int) -> str:
    words = ["the", "in", "her", "thing", "a", "ring", "tin", "ate", "quick", "Fox"]
    path.write_text(" ".join(np.random.default_rng(seed).choice(words, 3000)), "utf-8")
    return str(path)


def calibrated(model: Path, folder: Path, **options: Any) -> Path:
    text = written(folder / "text.txt", 0)
    options = {"sequences": 12, "sequence_length": 64, "precision": "float32"} | options
    lowbit.calibrate(model, folder / "moments", text=text, **options)
    return folder / "moments"


def without_experts(calibration: Path) -> Path:
    """As lowbit wrote it before it knew of experts."""
    found = {name: values for name, values in load_file(calibration).items() if ".experts." not in name}
    save_file(found, calibration.with_name("dense"))
    return calibration.with_name("dense")


def test_watched_experts_compute_what_they_always_do(model: Path) -> None:
    seen = []
    with open_checkpoint(model) as checkpoint, torch.no_grad():
        loaded = load(checkpoint)
        ids = torch.arange(24)[None]
        expected = loaded(ids).logits
        modules = [loaded.get_submodule(f"model.layers.{i}.experts") for i in range(2)]
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(experts.watched(module, lambda *told: seen.append(told)))
            found = loaded(ids).logits
        assert all("forward" not in vars(module) for module in modules)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    by_part = {part: sum(len(x) for p, _, x, _ in seen if p == part) for part in ("gate_up_proj", "down_proj")}
    assert by_part == {"gate_up_proj": 2 * 2 * 24, "down_proj": 2 * 2 * 24}  # layers, experts a token


def test_experts_of_another_kind_are_refused() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="experts of a kind"):
        experts.check(module, "model.layers.0.experts")


def test_an_experts_moments_are_the_fisher_information(model: Path, tmp_path: Path) -> None:
    """Averaged over many draws of labels: against the exact expectation, by autograd, over every label."""
    text = written(tmp_path / "text.txt", 0)
    with open_checkpoint(model) as checkpoint:
        draws = []
        for seed in range(100):
            options = CollectOptions(sequences=1, sequence_length=6, precision="float32", seed=seed)
            collect(checkpoint, tmp_path / "one", text, options)
            draws.append(load_file(tmp_path / "one"))
        loaded = load(checkpoint)
        row = torch.from_numpy(data.load_sequences(text, load_tokenizer(checkpoint), 6, 1)).long()
    seen: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {GATE_UP: {}, DOWN: {}}

    def watch(part: str, expert: int, x: torch.Tensor, out: torch.Tensor) -> None:
        seen[f"{LAYER}.{part}"][expert] = x.detach(), out

    with experts.watched(loaded.get_submodule(LAYER), watch):
        logits = loaded(row).logits[0]
    p = torch.softmax(logits.detach(), -1)
    expert = max(seen[DOWN], key=lambda e: len(seen[DOWN][e][0]))
    watched = [seen[name][expert] for name in (GATE_UP, DOWN)]
    exact = [torch.zeros(len(x)) for x, _ in watched]
    outputs = [torch.zeros(out.shape[1]) for _, out in watched]
    for position in range(6):
        log = torch.log_softmax(logits[position], -1)
        for label in range(logits.shape[1]):
            gradients = torch.autograd.grad(-log[label], [out for _, out in watched], retain_graph=True)
            for i, gradient in enumerate(gradients):
                exact[i] += p[position, label] * gradient.square().mean(-1)
                outputs[i] += p[position, label] * gradient.square().sum(0)
    for name, (x, _), of_tokens, of_rows in zip((GATE_UP, DOWN), watched, exact, outputs, strict=True):
        for part, expected in (("inputs", (x.T * of_tokens) @ x / 6), ("outputs", of_rows / 6)):
            found = np.mean([draw[f"{name}.{part}"][expert] for draw in draws], axis=0)
            assert np.linalg.norm(found - expected.numpy()) < 0.2 * np.linalg.norm(expected.numpy()), (name, part)
        assert draws[0][f"{name}.tokens"].sum() == 2 * 6
        assert draws[0][f"{name}.tokens"][expert] == len(x)
        pooled = draws[0][f"{name}.inputs"].sum(0)
        assert np.allclose(draws[0][f"{name}.pooled"], pooled, rtol=1e-4, atol=1e-6 * np.abs(pooled).max())


def kld(source: Path, artifact: Path, ids: np.ndarray) -> float:
    """Mean over the tokens of KL(source || artifact), both computed by torch from the values that they hold."""
    rows = []
    for path in (source, artifact):
        with open_checkpoint(path) as checkpoint, torch.no_grad():
            rows.append(torch.log_softmax(load(checkpoint)(torch.from_numpy(ids)).logits, -1))
    p, q = rows
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def unseen(model: Path, tmp_path: Path) -> np.ndarray:
    with open_checkpoint(model) as checkpoint:
        text = written(tmp_path / "unseen.txt", 1)
        return data.load_sequences(text, load_tokenizer(checkpoint), 64, 12).astype(np.int64)


def test_packing_by_it_is_closer_to_the_source(model: Path, unseen: np.ndarray, tmp_path: Path) -> None:
    """Plain rounding, a calibration without its experts, the whole: each is nearer than the one before."""
    moments = calibrated(model, tmp_path)
    pack = functools.partial(lowbit.pack, model, "q4_0")
    types = pack(tmp_path / "whole.gguf", calibration=moments, certificate=True).types
    assert (types[GATE_UP], types[DOWN]) == ("q4_0", "q4_0")
    pack(tmp_path / "dense.gguf", calibration=without_experts(moments))
    pack(tmp_path / "naive.gguf", naive=True)
    naive, dense, whole = (kld(model, tmp_path / f"{name}.gguf", unseen) for name in ("naive", "dense", "whole"))
    assert whole < 0.9 * dense < 0.9 * naive


def test_a_mix_measures_experts(model: Path, unseen: np.ndarray, tmp_path: Path) -> None:
    """Every expert tensor has its costs, fewer with more bits; and within the size of one type the mix is nearer."""
    moments = calibrated(model, tmp_path)
    plain = lowbit.pack(model, "q5_0", tmp_path / "plain.gguf", calibration=moments)
    mixed = lowbit.pack(model, None, tmp_path / "mix.gguf", calibration=moments, size=plain.size_bytes)
    assert mixed.mix is not None
    rows = {row["name"]: row["tried"] for row in mixed.mix.table()}
    for name in (GATE_UP, DOWN):
        costs = [rows[name][kind] for kind in ("q4_0", "q5_0", "q8_0", "f16")]
        assert costs == sorted(costs, reverse=True) and costs[0] > 4 * costs[1] / 2 > 0
    assert mixed.size_bytes <= plain.size_bytes
    assert kld(model, tmp_path / "mix.gguf", unseen) < kld(model, tmp_path / "plain.gguf", unseen)


def test_a_sample_of_the_experts_stands_for_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs from a few experts are near those from all of them, however unevenly they are used."""
    moments = calibrated(model, tmp_path)
    with open_checkpoint(model) as checkpoint:
        calibration = Calibration(moments, checkpoint)
        costs = []
        for n in (8, 4):
            monkeypatch.setattr("lowbit.pack.mix._SAMPLED_EXPERTS", n)
            mix = choose(checkpoint, calibration, 1 << 30, threads=1)
            costs.append({row["name"]: row["tried"]["q4_0"] for row in mix.table() if ".experts." in str(row["name"])})
    for name, cost in costs[0].items():
        assert costs[1][name] == pytest.approx(cost, rel=0.35), name


def test_an_expert_that_was_not_reached_leans_on_the_others(model: Path, tmp_path: Path) -> None:
    """Rounded under what all experts saw; where not even one was reached, by its values alone. Neither costs anything
    of a text that does not reach it."""
    moments = calibrated(model, tmp_path)
    found = load_file(moments)
    never = {f"{GATE_UP}.{part}": found[f"{GATE_UP}.{part}"].copy() for part in ("inputs", "outputs", "tokens")}
    for values in never.values():
        values[3] = 0
    save_file(found | never, tmp_path / "never")
    with open_checkpoint(model) as checkpoint:
        calibration = Calibration(tmp_path / "never", checkpoint)
        leaning = calibration.moments(GATE_UP, 3).values
        pooled = found[f"{GATE_UP}.pooled"]
        off = ~np.eye(len(pooled), dtype=bool)  # the diagonal is damped
        assert np.corrcoef(leaning[off], pooled[off])[0, 1] > 0.999
        errors = [np.ones((2, pooled.shape[0]), np.float32)]
        assert calibration.costs(GATE_UP, np.array([0, 1]), errors, 3)[0] == 0
        assert calibration.costs(GATE_UP, np.array([0, 1]), errors, 2)[0] > 0
    nothing = {name: np.zeros_like(values) for name, values in found.items() if ".experts." in name}
    save_file(found | nothing, tmp_path / "nothing")
    for name in ("never", "nothing"):
        lowbit.pack(model, "q4_0", tmp_path / f"{name}.gguf", calibration=tmp_path / name)
        lowbit.pack(model, None, tmp_path / f"{name}-mix.gguf", calibration=tmp_path / name, bits=8)


def test_an_imatrix_beside_a_calibration_is_for_what_that_lacks(model: Path, tmp_path: Path) -> None:
    """The calibration's tensors are rounded by it, others as under the imatrix alone; the file names the imatrix."""
    moments = calibrated(model, tmp_path)
    dense = without_experts(moments)
    lowbit.imatrix(model, tmp_path / "im.gguf", tmp_path / "text.txt", chunks=3, context_size=64, threads=1)
    pack = functools.partial(lowbit.pack, model, "q4_0")
    pack(tmp_path / "both.gguf", calibration=dense, imatrix=tmp_path / "im.gguf")
    pack(tmp_path / "dense.gguf", calibration=dense)
    pack(tmp_path / "im-only.gguf", imatrix=tmp_path / "im.gguf")
    pack(tmp_path / "plain.gguf")
    with contextlib.ExitStack() as stack:
        both, alone, weighted, plain = (
            stack.enter_context(open_checkpoint(tmp_path / f"{name}.gguf"))
            for name in ("both", "dense", "im-only", "plain")
        )
        for name in (GATE_UP, DOWN):
            assert (both.read(name) == weighted.read(name)).all()
            assert (both.read(name) != plain.read(name)).any()
        name = "model.layers.1.mlp.up_proj.weight"
        assert (both.read(name) == alone.read(name)).all()
        assert (both.read(name) != weighted.read(name)).any()
        keys = {field.key for field in both.gguf_metadata() or ()}
    assert "quantize.imatrix.file" in keys
    budget = (tmp_path / "both.gguf").stat().st_size + 4000
    mixed = lowbit.pack(
        model, None, tmp_path / "mix.gguf", calibration=moments, imatrix=tmp_path / "im.gguf", size=budget
    )
    assert mixed.size_bytes <= budget
