"""What llama.cpp computes in: its compute buffer where it cannot be asked, and the work buffer that it never tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.runtimes._llama_kv import Cells

# Against llama.cpp's own layout, over the models of plan/catalogue (tests/plan/test_estimate.py): with flash attention
# within 1% but for Gemma 3 270M and Gemma 4 E2B; without it always below.
FOUND = {True: "estimate, up to 17% low", False: "estimate, up to 35% low"}  # by flash attention
_F32, _F16 = 4, 2
_UNCONVERTED = ("F32", "F64")
_Q8 = 34 / 32  # bytes a value of the rows that quantized weights are multiplied with (Q8_0; Q8_K is close)
# Rows of the hidden size, and of the MLP's, that live at once in a layer. Read off llama.cpp's own layouts.
_HIDDEN_ROWS, _WIDE_ROWS, _EXPERT_ROWS, _STREAM_ROWS = 5, 3, 11, 6


def estimate(model: PlanModel, room: Cells, outputs: int, *, flash: bool, swa_full: bool = False) -> int:
    """Bytes of the tensors that live at once in the widest part of the graph of ``room.ubatch`` tokens."""
    text = model.config.get("text_config", model.config)
    tokens, hidden, heads = room.ubatch, text["hidden_size"], text["num_attention_heads"]
    cells = [room.of_layer(window, swa_full=swa_full) for window in {layer.window for layer in model.cache}]
    kept = sum(cells) * tokens * _F16  # masks
    kept += tokens * (text.get("hidden_size_per_layer_input") or 0) * len(model.cache) * _F32
    layer = tokens * _F32 * (_HIDDEN_ROWS * hidden + _WIDE_ROWS * _wide(text))
    if text.get("enable_moe_block"):
        layer = max(layer, tokens * _F32 * (_EXPERT_ROWS + text["top_k_experts"]) * hidden)
    if text.get("altup_num_inputs"):
        layer += tokens * _F32 * _STREAM_ROWS * hidden
    attention = tokens * _F32 * _HIDDEN_ROWS * hidden
    if not flash:
        attention += max(cells, default=0) * tokens * heads * _F32
    scores = min(outputs, tokens) * model.vocab_size * _F32
    return int(kept + max(layer, attention, scores))


def _wide(text: Mapping[str, Any]) -> int:
    """The size of the widest layer's MLP."""
    wide = text["intermediate_size"]
    widest: int = max(wide) if isinstance(wide, list) else wide
    return widest * (2 if text.get("use_double_wide_mlp") else 1)


def work_buffer(
    model: PlanModel, tensors: Sequence[PlannedTensor], room: Cells, kv_type_v: str, *, flash: bool
) -> tuple[int, str]:
    """Bytes, and why: before a product the CPU converts its second factor to what the first one's kernel reads.

    Source: ggml_graph_plan and ggml_compute_forward_mul_mat in ggml-cpu.c.
    """
    tokens, layers = room.ubatch, [t for t in tensors if len(t.shape) > 1 and t.name.startswith("blk.")]
    widest = max((_converted(t.dtype) * t.shape[-1] for t in layers), default=0.0)
    size, why = int(tokens * widest), f"{tokens} rows in the form that the widest matrix is multiplied with"
    text = model.config.get("text_config", model.config)
    scores = tokens * room.per_slot * text.get("num_attention_heads", 0) * _F16
    if not flash and kv_type_v != "f32" and scores > size:
        size, why = (
            scores,
            f"attention of {tokens} tokens to {room.per_slot:,} cells in all heads, without flash attention",
        )
    return size, why


def _converted(dtype: str) -> float:
    """Bytes of a converted value, by the type of the weights."""
    if dtype in _UNCONVERTED:
        return 0.0
    return float(_F16) if dtype in ("F16", "BF16") else _Q8
