"""A layer's experts, run so that each expert's two products can be watched.

transformers keeps all experts of a layer in two parameters, (experts, rows, n), which no module hook sees one by one.
What is computed is its own (integrations/moe.py, and ``Gemma4TextExperts`` of models/gemma4): the tokens routed to an
expert go through gate and up, the activation, and down, and are added up under the router's weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lowbit.errors import Unsupported

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Which of the two, the expert, what flows in and what flows out: (tokens, n) and (tokens, rows).
Watch = Callable[[str, int, torch.Tensor, torch.Tensor], None]


def check(module: nn.Module, name: str) -> None:
    """Raises Unsupported where a module's experts are not of the kind that ``watched`` runs."""
    plain = {"has_gate": True, "is_transposed": False, "has_bias": False, "has_post_expert_norm": False}
    odd = [key for key, value in plain.items() if getattr(module, key, None) is not value]
    if odd or not all(hasattr(module, key) for key in (GATE_UP, DOWN, "_apply_gate")):
        raise Unsupported("experts of a kind that lowbit does not calibrate", where=name, found=odd or type(module))


@contextlib.contextmanager
def watched(module: nn.Module, watch: Watch) -> Iterator[None]:
    """Within the block the module's experts run one by one, and ``watch`` is told of each product."""
    module.forward = functools.partial(_forward, module, watch)
    try:
        yield
    finally:
        del module.forward  # the class's own again


def _forward(
    module: Any, watch: Watch, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden: (tokens, width); top_k_index, top_k_weights: (tokens, experts a token)."""
    out = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        x = hidden[token]
        gate_up = linear(x, module.gate_up_proj[expert])
        watch(GATE_UP, expert, x, gate_up)
        inner = module._apply_gate(gate_up)
        down = linear(inner, module.down_proj[expert])
        watch(DOWN, expert, inner, down)
        out = out.index_add(0, token, (down * top_k_weights[token, place, None]).to(out.dtype))
    return out
