"""Static int8 activations: transformers' own arithmetic, calibrated, learned, saved under its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from texts_to_train_on import sentences
from transformers import TrainingArguments
from transformers.integrations.gemma_quant import QuantizedLinear, apply_srq

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption
from lowbit.train import TrainOptions, load, prepare, static_ranges
from lowbit.train.loop import DistillationTrainer
from lowbit.train.pipeline import choose_parameters

SEQUENCES = np.random.default_rng(0).integers(3, 300, (3, 24)).astype(np.int32)


def _modules(model: Any) -> tuple[str, ...]:
    return tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 0.013, 2.5])
def test_rounding_is_transformers_own_bit_for_bit(dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(400, 64, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[0, :5] = torch.tensor([0.0065, -0.0065, 0.0195, 900.0, -900.0]).to(dtype)
    stored = torch.tensor(scale)
    assert torch.equal(static_ranges.rounded(x, stored), apply_srq(x, stored))


def test_a_layer_computes_what_transformers_layer_does(tiny_llama: Callable[..., Path]) -> None:
    """Codes, weight scales and both activation scales put into its QuantizedLinear."""
    from lowbit.grid import get

    grid, generator = get("channelwise4"), torch.Generator().manual_seed(2)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(10, 64, generator=generator)
    blocks = grid.quantize(weight)
    theirs = QuantizedLinear(64, 48, num_bits=4)
    theirs.weight.data = torch.from_numpy(grid.pack_codes(blocks.codes.numpy())[:, 0])
    theirs.weight_scale.data = blocks.scales
    theirs.input_activation_scale.data, theirs.output_activation_scale.data = torch.tensor(0.03), torch.tensor(0.4)
    ours = torch.nn.Linear(64, 48, bias=False)
    ours.weight.data = grid.dequantize(blocks)
    model = torch.nn.Module()
    model.layer, model.config = ours, type("Config", (), {"_attn_implementation": "sdpa"})()
    scales = {"layer.input_activation_scale": torch.tensor(0.03), "layer.output_activation_scale": torch.tensor(0.4)}
    static_ranges.attach(model, ("layer",), scales)
    assert torch.equal(ours(x), theirs(x))


def test_gradients_go_through_inside_and_learn_the_scale() -> None:
    x = torch.tensor([0.3, -0.26, 500.0, -500.0], requires_grad=True)
    scale = torch.tensor(0.2, requires_grad=True)
    static_ranges._Round.apply(x, scale).backward(torch.ones(4))
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    expected = (2 - 1.5) + (-1 + 1.3) + 127 - 128
    assert float(scale.grad) == pytest.approx(expected, abs=1e-5)


def test_one_huge_position_does_not_choose_the_scale_for_all() -> None:
    watching = static_ranges.StaticRange()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    x[0] *= 3000
    assert watching(x) is x
    assert float(watching.settled()) * 127 < 30 * float(x[1:].abs().max())


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma3", "tiny_qwen3"])
def test_calibrated_ranges_are_close_and_come_off_without_a_trace(family: str, request: pytest.FixtureRequest) -> None:
    with open_checkpoint(request.getfixturevalue(family)()) as checkpoint:
        model = load(checkpoint)
    tokens = torch.from_numpy(SEQUENCES.astype(np.int64))
    names = dict(model.named_parameters()).keys()
    with torch.no_grad():
        before = model(tokens).logits
        found = static_ranges.calibrate(model, _modules(model), SEQUENCES, torch.float32)
        assert torch.equal(model(tokens).logits, before)
        assert dict(model.named_parameters()).keys() == names
        static_ranges.attach(model, _modules(model), found)
        rounded = model(tokens).logits
    assert {name.rpartition(".")[2] for name in found} == set(static_ranges._NAMES.values())
    assert all(float(scale) > 0 for scale in found.values())
    error = (rounded - before).square().mean() / before.square().mean()
    assert 0 < error < 0.01


def test_layers_that_share_a_cache_see_its_owners_rounding(tiny_gemma4: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_gemma4("E2B")) as checkpoint:
        model = load(checkpoint)
    static_ranges.attach(model, _modules(model))
    sharing = [m for m in model.modules() if getattr(m, "is_kv_shared_layer", False) and hasattr(m, "o_proj")]
    assert len(sharing) == 3
    for module in sharing:
        owner = module.__dict__["_range_owner"]
        assert owner is not module and owner.layer_type == module.layer_type
        assert hasattr(owner, "k_cache_range") and not hasattr(module, "k_cache_range")


def test_a_run_trains_and_saves_them(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    sentences(text, 300)
    options = TrainOptions(
        recipe="mobile_mlp2", train="both", activations="static", data=str(text), steps=4, threads=1,
        sequence_length=32, precision="float32", learning_rate=1e-3, scale_rate=1e-2,
    )  # fmt: skip
    result = lowbit.train(tiny_llama(), tmp_path / "out", options=options)
    start, end = (safetensors.torch.load_file(p / "activations.safetensors") for p in (result.start, result.path))
    manifest = json.loads((result.path / "lowbit.json").read_text())
    assert manifest["activations"] == {"kind": "static-int8", "file": "activations.safetensors"}
    assert start.keys() == end.keys()
    assert "model.layers.2.self_attn.v_cache_scale" in end
    assert "model.layers.0.mlp.down_proj.input_activation_scale" in end
    assert sum(not torch.equal(start[name], end[name]) for name in end) > len(end) // 2
    with open_checkpoint(result.path) as back:
        assert back.info("model.layers.0.mlp.up_proj.weight").grid == "channelwise2"
        assert back.info("model.layers.0.self_attn.q_proj.weight").grid == "channelwise4"


@pytest.mark.parametrize(("asked", "expected"), [(None, {1e-3, 1e-4, 3e-5}), (2e-4, {2e-4})])
def test_scales_move_in_parts_of_their_own_size(
    tiny_llama: Callable[..., Path], tmp_path: Path, asked: float | None, expected: set[float]
) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "mobile_mlp2,q4_0", train="both")
        names = lowbit.recipe.get("q4_0").trained(checkpoint)
    static_ranges.attach(model, ("model.layers.0.mlp.up_proj",), dict.fromkeys(_scale_names(model), torch.tensor(0.02)))
    choose_parameters(model, "both", names)
    options = TrainOptions(train="both", scale_rate=asked, steps=1)
    trainer = object.__new__(DistillationTrainer)
    trainer.model, trainer.options, trainer.optimizer = model, options, None
    trainer.args = TrainingArguments(str(tmp_path), learning_rate=1e-4, optim="adamw_torch_fused", use_cpu=True)
    rest, *groups = trainer.create_optimizer().param_groups
    assert rest["lr"] == 1e-4 and all(group["weight_decay"] == 0 for group in (rest, *groups))
    found = {round(g["lr"] / float(g["params"][0].detach().abs().mean()), 9) for g in groups}
    assert found == expected
    assert sum(len(g["params"]) for g in (rest, *groups)) == sum(p.requires_grad for p in model.parameters())


def _scale_names(model: Any) -> list[str]:
    layers = [f"model.layers.{i}.self_attn.{kind}_cache_scale" for i in range(3) for kind in "kv"]
    return [f"model.layers.0.mlp.up_proj.{kind}_activation_scale" for kind in ("input", "output")] + layers


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(BadOption, match="unknown activations"):
        TrainOptions(activations="int4")
