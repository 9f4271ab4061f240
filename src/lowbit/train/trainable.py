"""Which parameters of a prepared model are trained."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.train import static_ranges


def choose_parameters(model: Any, train: str, names: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """Marks what is trained of a prepared model, and gives it: the low-bit matrices ``names`` and the norms ("full"),
    the scales and minimums alone ("scales"), or weights, norms and scales ("both"); always the scales of static
    activations.
    """
    low_bit = {f"{path}.parametrizations.{kind}" for path, _, kind in (name.rpartition(".") for name in names)}

    def is_low_bit(inside: str) -> bool:
        path, _, rest = inside.partition(".parametrizations.")
        return f"{path}.parametrizations.{rest.partition('.')[0]}" in low_bit

    chosen = []
    for name, parameter in model.named_parameters():
        inside, _, last = name.rpartition(".")
        if last == static_ranges.PARAMETER:
            wanted = True
        elif last in ("scales", "mins"):
            wanted = is_low_bit(inside) and train in (("scales", "both") if last == "scales" else ("scales",))
        elif last.startswith("original"):
            wanted = train in ("full", "both") and inside in low_bit
        else:
            wanted = train in ("full", "both") and parameter.ndim == 1
        parameter.requires_grad_(wanted)
        if wanted:
            chosen.append(parameter)
    return chosen
