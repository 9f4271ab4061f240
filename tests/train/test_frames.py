"""Every trainable grid: what training computes with after real steps is what the packed file holds, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.grid.base import Blocks, Grid
from lowbit.train import frame_search, frames, load, prepare, save
from lowbit.train.fake_quant import FakeQuantizer, quantized
from lowbit.train.pipeline import choose_parameters

TRAINABLE = [name for name in grids.names() if grids.get(name).is_trainable and grids.get(name).bits_per_weight < 8]
LEARNED = [name for name in TRAINABLE if name != "mxfp4"]
# The recipe by which a container holds the grid; the mobile schema's own bits lie in the checkpoint alone.
PACKED = {
    "q4_0": "gguf", "q4_1": "gguf", "q5_0": "gguf", "q5_1": "gguf", "iq4_nl": "gguf", "mxfp4": "gguf", "q2_k": "gguf",
    "q4_k": "gguf", "q5_k": "gguf", "q6_k": "gguf", "q4_k_m": "gguf", "mlx_affine4_g32": "mlx",
    "mlx_affine4_g64": "mlx",
    "int4_g32": "compressed-tensors", "int4_g128": "compressed-tensors", "mobile": "gguf", "mobile_mlp2": "gguf",
    "mobile_w4": "gguf",
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def test_every_grid_that_can_be_trained_is_tried_in_a_container() -> None:
    of_recipes = {grids.get(lowbit.recipe.get(name).weights).name for name in PACKED}
    assert {name for name in TRAINABLE if not name.startswith(("channelwise", "int4_g256"))} <= of_recipes


@pytest.mark.parametrize("train", ["full", "both"])
@pytest.mark.parametrize("recipe", PACKED)
def test_no_bit_differs_between_training_and_the_packed_file(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str, train: str
) -> None:
    with open_checkpoint(tiny_llama(**WIDE)) as checkpoint:
        model = prepare(load(checkpoint), recipe, train=train)
        names = lowbit.recipe.get(recipe).trained(checkpoint)
        before = {name: module.weight.detach().clone() for name, module, _ in quantized(model)}
        _take_steps(model, choose_parameters(model, train, names))
        save(model, tmp_path / "trained", like=checkpoint)
    in_gguf = "f32" if recipe.startswith("mobile") else recipe
    packed = lowbit.pack(tmp_path / "trained", in_gguf, tmp_path / "packed", to=PACKED[recipe], certificate=True)
    moved = 0
    with open_checkpoint(packed.path) as back, torch.no_grad():
        for name, module, quantizer in quantized(model):
            values = torch.from_numpy(back.read(name))
            assert torch.equal(values.view(torch.int32), module.weight.view(torch.int32)), name
            if name in names:
                assert quantizer.grid.name in (*TRAINABLE, "channelwise8")
                moved += int((values != before[name]).sum())
    assert moved > 1000  # the steps changed codes, so that a file of the start would not do


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_a_frame_are_those_of_the_values(name: str) -> None:
    """With codes fixed the values are linear in scales and minimums: autograd through the formula says the same."""
    grid = grids.get(name)
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(5))
    start = grid.quantize(weight)
    slope = torch.randn(3, 512, generator=torch.Generator().manual_seed(6))
    by_scales, by_mins = frames.gradients(grid, weight, start, start.codes, slope)
    scales, mins = (None if p is None else p.float().requires_grad_() for p in (start.scales, start.mins))
    values = grid.dequantize(replace(start, scales=scales, mins=mins))
    torch.autograd.backward(values, slope)
    torch.testing.assert_close(by_scales, scales.grad, rtol=1e-4, atol=1e-4)
    if mins is not None:
        torch.testing.assert_close(by_mins, mins.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "channelwise2", "mlx_affine4_g64", "q4_k"])
def test_lsqs_slope_by_hand(name: str) -> None:
    """Inside of the range a scale's slope is code - ratio, outside it is the edge's code; an offset's is 0 or 1."""
    grid = grids.get(name)
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(7))
    frame = frames.without_codes(grid.quantize(0.5 * weight))  # half the range, so that much lies outside
    by_scales, by_mins = frames.gradients(grid, weight, frame, None, torch.ones(2, 256))
    step, offset = frames.steps(grid, frame)
    group = 256 // step.reshape(2, -1).shape[1]
    step, offset = (part.reshape(2, -1).double().repeat_interleave(group, 1) for part in (step, offset))
    ratio = torch.where(step == 0, 0.0, (weight.double() - offset) / step)
    low, high = grid.code_range
    code = ratio.round().clamp(low, high)
    outside = (ratio < low - 0.5) | (ratio > high + 0.5)
    assert 0.02 < outside.double().mean() < 0.9
    by_step = torch.where(outside, code, code - ratio).reshape(2, -1, group).sum(-1)
    if frame.sub_scales is not None:
        by_step = (by_step.reshape(frame.sub_scales.shape) * frame.sub_scales).sum(-1)
    torch.testing.assert_close(by_scales.double(), by_step.reshape(by_scales.shape), rtol=1e-3, atol=1e-3)
    if by_mins is not None:
        n_outside = outside.double().reshape(2, -1, group).sum(-1)
        if frame.sub_mins is not None:
            n_outside = -(n_outside.reshape(frame.sub_mins.shape) * frame.sub_mins).sum(-1)
        torch.testing.assert_close(by_mins.double(), n_outside.reshape(by_mins.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_search_is_no_worse_than_the_formats_own_rule(name: str) -> None:
    grid = grids.get(name)
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(16, 512, generator=generator) * torch.rand(16, 1, generator=generator)
    importance = torch.rand(512, generator=generator) ** 4
    found = frame_search.search(weight, importance, grid)
    own, ours = (
        ((frames.values_on(grid, weight, frame, torch.float32) - weight).square() * importance).sum()
        for frame in (frames.without_codes(grid.quantize(weight)), found)
    )
    assert ours < (0.5 if name.startswith("channelwise2") else 1.001) * own
    assert _is_storable(grid, found)


def test_frames_travel_through_a_file() -> None:
    for name in TRAINABLE:
        frame = frames.without_codes(grids.get(name).quantize(torch.randn(4, 512)))
        back = frames.from_tensors(frames.to_tensors(frame, "x.y.weight"), torch.device("cpu"))["x.y.weight"]
        for part in ("scales", "mins", "sub_scales", "sub_mins"):
            one, other = getattr(frame, part), getattr(back, part)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_minimums_are_learned_where_codes_stay_and_not_where_they_move() -> None:
    weight = torch.randn(4, 256)
    for train, kinds in (("full", 0), ("both", 1), ("scales", 2)):
        assert len(FakeQuantizer(grids.get("q4_k"), weight, train=train).learned) == kinds


def test_powers_of_two_are_never_learned() -> None:
    quantizer = FakeQuantizer(grids.get("mxfp4"), torch.randn(4, 64), train="both")
    assert not quantizer.learned
    assert quantizer.scales is not None and quantizer.scales.dtype == torch.uint8


def test_masters_of_a_learned_frame_keep_their_master(tiny_llama: Callable[..., Path]) -> None:
    """A scale that moves by less than its storage can tell moves all the same, in float32."""
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "q4_0", train="both")
    _, module, quantizer = next(found for found in quantized(model) if found[2].learned)
    before, scales = module.weight.detach().clone(), quantizer.learned[0]
    with torch.no_grad():
        scales.mul_(1 + 2.0**-14)
    assert torch.equal(module.weight, before)
    with torch.no_grad():
        for _ in range(16):
            scales.mul_(1 + 2.0**-14)
    assert not torch.equal(module.weight, before)


def _take_steps(model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> None:
    """Three steps of a fused AdamW towards nonsense, far enough that codes and scales change."""
    generator = torch.Generator().manual_seed(9)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, fused=True)
    for _ in range(3):
        tokens = torch.randint(3, 300, (2, 16), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _is_storable(grid: Grid, frame: Blocks) -> bool:
    """Whether the scales are numbers that the format stores: packing and unpacking changes none."""
    codes = grid.encode_on(torch.zeros(16, 512), frame)
    arrays = Blocks(**{key: None if part is None else part.numpy() for key, part in vars(codes).items()})
    back = grid.unpack(grid.pack(arrays))
    return bool(np.array_equal(back.scales, arrays.scales))  # type: ignore[arg-type]
