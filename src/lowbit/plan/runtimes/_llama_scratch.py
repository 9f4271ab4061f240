"""llama.cpp's compute buffer where it cannot be asked: an estimate from the sizes of the largest graph."""

from __future__ import annotations

from lowbit.plan.model import PlanModel
from lowbit.plan.runtimes._llama_kv import Cells

FOUND = "estimate"
_F32, _F16 = 4, 2


def estimate(model: PlanModel, room: Cells, outputs: int, *, flash: bool) -> int:
    """Bytes of the tensors that live at once in the widest part of the graph of ``room.ubatch`` tokens."""
    text = model.config.get("text_config", model.config)
    tokens, hidden, heads = room.ubatch, text["hidden_size"], text["num_attention_heads"]
    wide = text["intermediate_size"]
    head_dim = max((layer.k_dim for layer in model.cache), default=0)
    masks = len({layer.window for layer in model.cache}) * room.per_slot * tokens * (_F32 + (_F16 if flash else 0))
    attention = tokens * heads * head_dim * _F32 * 3
    if not flash:
        attention += 2 * room.per_slot * tokens * heads * _F32
    scores = min(outputs, tokens) * model.vocab_size * _F32
    return masks + 3 * tokens * hidden * _F32 + max(attention, 2 * tokens * wide * _F32, scores)
