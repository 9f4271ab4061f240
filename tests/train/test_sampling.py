"""The sampler: what it draws from is what the model says of the same tokens in one go, sliding windows included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.run._hf_model import load
from lowbit.train import sampling


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("prompt_length", [1, 7])
def test_it_draws_from_the_models_own_probabilities(
    family: str,
    prompt_length: int,
    tiny_llama: Callable[..., Path],
    tiny_gemma3: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_checkpoint(tiny_llama() if family == "llama" else tiny_gemma3()) as checkpoint:
        model = load(checkpoint)
    seen: list[torch.Tensor] = []
    draw = sampling._draw

    def noting(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return draw(logits)

    monkeypatch.setattr(sampling, "_draw", noting)
    torch.manual_seed(1)
    prompt = torch.randint(0, 320, (3, prompt_length))
    before = model.config._attn_implementation
    tokens = sampling.write(model, prompt, 48, seconds=60.0)
    assert tokens.shape == (3, 48) and torch.equal(tokens[:, :prompt_length], prompt)
    assert model.config._attn_implementation == before
    with torch.no_grad():
        whole = model(tokens).logits[:, prompt_length - 1 : -1]
    assert (torch.stack(seen, dim=1) - whole).abs().max() < 1e-3


def test_draws_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = sampling._draw(probabilities.log().expand(40_000, 4)).flatten()
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert share[1] == 0
    assert (share - probabilities).abs().max() < 0.01


def test_time_is_up(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = load(checkpoint)
    assert sampling.write(model, torch.zeros(2, 1, dtype=torch.int64), 400, seconds=0.0).shape == (2, 2)
