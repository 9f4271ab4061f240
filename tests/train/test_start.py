"""The start: rounded under the collected moments, with the codes that were chosen, and the model the closer for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from threadpoolctl import threadpool_limits

from lowbit import compensate as compensation
from lowbit import grid as grids
from lowbit import recipe as recipes
from lowbit.checkpoint import open_checkpoint
from lowbit.grid.base import Grid
from lowbit.run._hf_model import load
from lowbit.train import importance, start
from lowbit.train.fake_quant import assignment, master, prepare, quantized
from lowbit.train.importance import CollectOptions

Q4_0 = grids.get("q4_0")


@pytest.fixture(scope="module")
def source(save_tiny_llama: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    save_tiny_llama(folder, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def moments(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "calibration.safetensors"
    with open_checkpoint(source) as checkpoint:
        model = load(checkpoint)
        sequences = np.random.default_rng(0).integers(0, model.config.vocab_size, (24, 32)).astype(np.int32)
        importance.collect_of(model, checkpoint, sequences, path, CollectOptions(precision="float32"))
    return path


def started(source: Path, moments: Path, in_time: Callable[[float], bool]) -> tuple[Any, dict[str, Any]]:
    """A model, and weights and scales of each of its matrices."""
    with open_checkpoint(source) as checkpoint:
        model = load(checkpoint)
        on = assignment(model, "q4_0")
        chosen: dict[str, tuple[Grid, ...]] = {n: (on[n],) for n in recipes.get("q4_0").trained(checkpoint)}
        found = {name: (w, s) for name, w, (s,) in start.rounded(model, chosen, moments, 2, in_time)}
        weight, frame = found.pop("model.embed_tokens.weight")  # whose rows are looked up
        assert torch.equal(weight, model.get_parameter("model.embed_tokens.weight"))
        assert len(frame.scales) == len(weight)
        return model, found


def test_the_codes_are_those_of_the_compensation(source: Path, moments: Path) -> None:
    model, found = started(source, moments, lambda _: True)
    stored = safetensors.torch.load_file(moments)
    for name, (weight, frame) in found.items():
        original = model.get_parameter(name).detach()
        second = compensation.moments_of(stored[f"{name}.inputs"].numpy())
        with threadpool_limits(1, "blas"):  # as there: BLAS adds up otherwise in several threads
            blocks = compensation.compensate_together(original.numpy(), second, stored[f"{name}.slopes"].numpy(), Q4_0)
        assert torch.equal(frame.scales, torch.from_numpy(blocks.scales)), name
        got = Q4_0.encode(weight, frame.scales)
        assert torch.equal(got.codes, torch.from_numpy(blocks.codes)), name
        # Where the nearest code was chosen the weight has not moved, but for what was too near the edge of its cell.
        inside = Q4_0.encode(original, frame.scales).codes == got.codes
        assert 0.5 < inside.float().mean() < 1
        steps = frame.scales.float()[..., None]
        from_code = original.view_as(inside) / steps - got.codes
        moved = (weight - original).abs().view_as(inside)[inside & (from_code.abs() <= start._INSIDE)]
        assert float(moved.median()) == 0 or float((moved < 1e-6).float().mean()) > 0.9
        # No weight is further from its code than that, whether compensation moved it or not.
        assert float((weight.view_as(inside) / steps - got.codes).abs().max()) < start._INSIDE + 1e-4


def test_what_is_trained_begins_there(source: Path, moments: Path) -> None:
    model, found = started(source, moments, lambda _: True)
    with torch.no_grad():
        for name, (weight, _) in found.items():
            model.get_parameter(name).copy_(weight)
    prepare(model, "q4_0", frames={name: frame for name, (_, frame) in found.items()})
    prepared = {name: quantizer.blocks(master(module)) for name, module, quantizer in quantized(model)}
    for name, (weight, frame) in found.items():
        assert torch.equal(prepared[name].codes, Q4_0.encode(weight, frame.scales).codes)


def test_short_of_time_it_goes_without_sweeps(source: Path, moments: Path) -> None:
    asked: list[float] = []

    def never(done: float) -> bool:
        asked.append(done)
        return False

    model, quick = started(source, moments, never)
    _, whole = started(source, moments, lambda _: True)
    assert 0 < min(asked) < 0.3 and max(asked) < 1 and len(asked) == len(quick)
    stored = safetensors.torch.load_file(moments)
    losses = []
    for found in (quick, whole):
        loss = 0.0
        for name, (weight, frame) in found.items():
            second = compensation.moments_of(stored[f"{name}.inputs"].numpy())
            values = Q4_0.nearest_values(weight, frame.scales).numpy()
            loss += compensation.loss(model.get_parameter(name).detach().numpy(), values, second).sum()
        losses.append(loss)
    assert losses[1] < 0.97 * losses[0]


def test_other_formats_get_their_frame_first(source: Path, moments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "is_blockwise", lambda _: False)
    monkeypatch.setattr(start, "compensate", lambda *_, **__: pytest.fail("blockwise"))
    model, found = started(source, moments, lambda _: True)
    stored = safetensors.torch.load_file(moments)
    for name, (weight, frame) in found.items():
        original, second = model.get_parameter(name).detach(), compensation.moments_of(stored[f"{name}.inputs"].numpy())
        ours, nearest = (
            compensation.loss(original.numpy(), values.numpy(), second).sum()
            for values in (Q4_0.nearest_values(weight, frame.scales), Q4_0.dequantize(Q4_0.quantize(original)))
        )
        assert ours < 0.9 * nearest, name


@pytest.mark.parametrize("name", [name for name in grids.names() if start.is_blockwise(grids.get(name))])
def test_the_codes_of_every_format_are_kept(name: str) -> None:
    grid, generator = grids.get(name), torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(4, 512, generator=generator)
    weight[1, :256] = 0
    x = torch.randn(300, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    second = x.T @ x / 300
    blocks = compensation.compensate(weight.numpy(), compensation.moments_of(second.numpy()), grid)
    start_weight, frame = start._blockwise(weight, second, None, grid, compensation.SWEEPS)
    values = grid.dequantize(grid.encode_on(start_weight, frame))
    assert torch.equal(values, torch.from_numpy(grid.dequantize(blocks)))


def test_weights_that_serve_several_formats_stay_and_each_has_its_frame(source: Path, moments: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        model = load(checkpoint)
        on = [assignment(model, recipe) for recipe in ("q4_0", "mlx_affine4_g32", "int4_g32")]
        names = recipes.get("q4_0").trained(checkpoint)
        wanted = {name: tuple(of[name] for of in on) for name in names}
        for name, weight, starts in start.rounded(model, wanted, moments, 1, lambda _: True):
            assert torch.equal(weight, model.get_parameter(name))
            assert [frame is not None for frame in starts] == [of[name].is_trainable for of in on]
            assert starts[1].mins is not None and starts[0].mins is None
