"""Balanced keys and queries: the same model, whose keys a cache's rounding hurts less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.run._hf_model import load
from lowbit.train import kv_balance, kv_quant

SEQUENCES = np.random.default_rng(0).integers(3, 300, (3, 64)).astype(np.int32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "E2B", "31B"])
def test_the_same_function_and_less_damage(of_family: Callable[[str], Path], family: str) -> None:
    with open_checkpoint(of_family(family)) as checkpoint, torch.no_grad():
        model = load(checkpoint)
        quantizer = kv_quant.quantizer_of(checkpoint, "q4_0:f16")
        _unbalance(model)
        tokens = torch.from_numpy(SEQUENCES[2:].astype(np.int64))
        plain = torch.log_softmax(model(tokens).logits, -1)
        before = damage(model, quantizer, tokens)
        changed = kv_balance.balance(model, SEQUENCES[:2], torch.float32)
        after = damage(model, quantizer, tokens)
        torch.testing.assert_close(torch.log_softmax(model(tokens).logits, -1), plain, rtol=1e-3, atol=2e-3)
    assert changed and all(torch.equal(model.get_parameter(name), values) for name, values in changed.items())
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == ({"k_proj", "q_proj"} if family == "llama" else {"k_norm", "q_norm"})
    if family == "E2B":  # the last layers that own keys share them: they stay
        assert len(changed) < 2 * 3 + 1
    else:
        assert after < 0.6 * before, (before, after)


def _unbalance(model: torch.nn.Module) -> None:
    """Some pairs of keys large and their queries small, as trained norms are."""
    for module in model.modules():
        if not hasattr(module, "k_proj") or not hasattr(module, "q_proj"):
            continue
        heads = module.k_proj.weight.shape[0] // module.head_dim
        factors = torch.ones(module.head_dim // 2)
        factors[::5] = 6.0
        factors = factors.repeat(2)
        if hasattr(module, "k_norm"):
            kv_balance._scale_norm(module.k_norm, factors.double())
            kv_balance._scale_norm(module.q_norm, 1 / factors.double())
        else:
            queries = module.q_proj.weight.shape[0] // module.head_dim
            kv_balance._scale_rows(module.k_proj, factors.double().repeat(heads))
            kv_balance._scale_rows(module.q_proj, 1 / factors.double().repeat(queries))


def damage(model: torch.nn.Module, quantizer: kv_quant.KvQuantizer, tokens: torch.Tensor) -> float:
    plain = torch.log_softmax(model(tokens).logits.double(), -1)
    with kv_quant.simulated(model, quantizer):
        rounded = torch.log_softmax(model(tokens).logits.double(), -1)
    return float((plain.exp() * (plain - rounded)).sum(-1).mean())


def test_factors_are_the_least() -> None:
    torch.manual_seed(0)
    costs = torch.rand(2, 6, 6, dtype=torch.float64) * torch.exp(2 * torch.randn(2, 6, 6, dtype=torch.float64))
    factors = kv_balance.balancing_factors(costs)
    torch.testing.assert_close(factors.log().mean(-1), torch.zeros(2, dtype=torch.float64))

    def total(s: torch.Tensor) -> torch.Tensor:
        return (costs * (s[:, None, :] / s[:, :, None]).square()).sum((-2, -1))

    least = total(factors)
    assert bool((least < total(torch.ones_like(factors))).all())
    for _ in range(50):
        assert bool((total(factors * torch.exp(0.05 * torch.randn_like(factors))) >= least).all())


def test_pairs_that_are_never_used_stay_finite(tiny_llama: Callable[..., Path]) -> None:
    costs = torch.zeros(1, 4, 4, dtype=torch.float64)
    costs[0, 0, 1], costs[0, 1, 0] = 3.0, 1.0
    factors = kv_balance.balancing_factors(costs)
    assert bool(torch.isfinite(factors).all()) and float(factors.max() / factors.min()) <= 256
