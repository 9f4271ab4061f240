"""What llama.cpp computes in: its compute buffer where it cannot be asked, and the work buffer that it never tells."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.runtimes._llama_kv import Cells

# The estimate against llama.cpp's own layout, over the layouts and settings of benchmarks/plan_kv.py --estimate.
FOUND = "estimate"
_F32, _F16 = 4, 2
_UNCONVERTED = ("F32", "F64")
_Q8 = 34 / 32  # bytes a value of the rows that quantized weights are multiplied with (Q8_0; Q8_K is close)


def estimate(model: PlanModel, room: Cells, outputs: int, *, flash: bool) -> int:
    """Bytes of the tensors that live at once in the widest part of the graph of ``room.ubatch`` tokens."""
    text = model.config.get("text_config", model.config)
    tokens, hidden, heads = room.ubatch, text["hidden_size"], text["num_attention_heads"]
    wide = text["intermediate_size"]
    wide = max(wide) if isinstance(wide, list) else wide
    wide *= 2 if text.get("use_double_wide_mlp") else 1
    head_dim = max((layer.k_dim for layer in model.cache), default=0)
    cells = [room.of_layer(window, swa_full=False) for window in {layer.window for layer in model.cache}]
    masks = sum(cells) * tokens * (_F32 + (_F16 if flash else 0))
    attention = tokens * heads * head_dim * _F32 * 3
    if not flash:
        attention += 2 * max(cells, default=0) * tokens * heads * _F32
    scores = min(outputs, tokens) * model.vocab_size * _F32
    streams = text.get("altup_num_inputs", 1)
    inputs = tokens * model.config.get("hidden_size_per_layer_input", 0) * len(model.cache) * _F32
    kept = masks + inputs + 3 * streams * tokens * hidden * _F32
    return kept + max(attention, 2 * tokens * wide * _F32, scores)


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
