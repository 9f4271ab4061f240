"""A prepared model computes with exactly what the file will hold, before and after an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption
from lowbit.train import HiddenTargets, distillation_loss, load, prepare, save
from lowbit.train.fake_quant import master, quantized


@pytest.mark.parametrize("recipe", ["q4_0", "q5_0", "int4_g32"])
def test_forward_values_are_the_grids(tiny_llama: Callable[..., Path], recipe: str) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), recipe)
        before = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names}
    found = list(quantized(model))
    assert found
    for name, module, quantizer in found:
        grid = quantizer.grid
        scales = grid.quantize(before[name]).scales
        with torch.no_grad():
            got = module.weight
        assert torch.equal(got, grid.dequantize(grid.encode(before[name], scales)))
        assert torch.equal(got, grid.dequantize(quantizer.blocks(master(module))))


def test_a_fused_optimizers_step_is_seen(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "q4_0")
    _, module, quantizer = next(q for q in quantized(model) if q[2].grid.name == "q4_0")
    before = module.weight.detach().clone()
    weight = master(module)
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    after = module.weight.detach()
    assert not torch.equal(before, after)
    assert torch.equal(after, quantizer.grid.dequantize(quantizer.blocks(weight)))


def test_preparing_twice_is_refused(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "q4_0")
    with pytest.raises(BadOption):
        prepare(model, "q4_0")


@pytest.mark.parametrize("recipe", ["q4_0", "q5_0", "q4_1"])
def test_saved_blocks_are_the_forward_weights(tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), recipe)
        save(model, tmp_path / "out", like=checkpoint)
    with open_checkpoint(tmp_path / "out") as saved, torch.no_grad():
        for name, module, quantizer in quantized(model):
            raw = saved.blocks(name)
            assert raw is not None
            grid = grids.get(quantizer.grid.name)
            assert torch.equal(torch.from_numpy(grid.dequantize(grid.unpack(raw))), module.weight)


def test_the_loss_and_its_gradient_are_plain_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=generator, requires_grad=True)
    teacher = torch.randn(70, 16, generator=generator)
    head = torch.randn(50, 16, generator=generator)
    loss = distillation_loss(hidden, head, HiddenTargets(teacher, head))
    (gradient,) = torch.autograd.grad(loss, hidden)
    p = torch.log_softmax(teacher @ head.T, -1)
    plain = (p.exp() * (p - torch.log_softmax(hidden @ head.T, -1))).sum(-1).mean()
    (expected,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
