"""MLX's KV caches as planned against mlx-lm's own, to the byte: layouts x windows x contexts x prompt steps x types.

    python benchmarks/plan_mlx.py [--real]

--real: SmolLM2-135M and Gemma 3 270M themselves instead, in float32 (1.6 GB of temporary files, minutes on a CPU), with
the peak that MLX saw beside the plan's total.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "plan"))

import mlx.core as mx
from miniature import small
from mlx_lm.utils import load_model
from test_mlx import cached, models

import lowbit
from lowbit.plan import PlanOptions, open_model, plan_open
from lowbit.plan.runtimes import mlx as mlx_plan

# The first layers of each: their order repeats.
LAYERS = {
    "smollm2-135m": 2, "llama-3.2-1b": 2, "llama-3.1-8b": 2, "qwen3-0.6b": 2, "qwen3-8b": 2, "gemma-3-270m": 6,
    "gemma-3-1b": 7, "gemma-3-4b": 6, "gemma-3-27b": 6, "gemma-4-e2b": 20, "gemma-4-e4b": 24, "gemma-4-12b": 6,
    "gemma-4-26b-a4b": 6, "gemma-4-31b": 6,
}  # fmt: skip
WINDOWS = (24, 280)
READS = ((1, 256), (2, 256), (40, 16), (257, 256), (258, 256), (310, 100), (513, 512))
QUANTIZED = ((20, 8), (45, 8), (46, 8), (49, 16), (257, 128))
REAL = ((64, 64), (257, 256), (514, 512))
START = 44  # of quantization: the real 5000 takes hours on a CPU


def floats() -> list[bool]:
    found = []
    for name, layers in LAYERS.items():
        for window in WINDOWS if name.startswith("gemma") else (None,):
            model, real = models(small(name, window=window, layers=layers))
            with model:
                for tokens, step in READS:
                    options = PlanOptions(
                        runtime="mlx", recipe="bf16", context=tokens, batch=step, kv_type_k="f32", kv_type_v="f32"
                    )
                    planned, real_bytes = plan_open(model, options).bytes_of("kv"), cached(real, tokens, step)
                    found.append(planned == real_bytes)
                    if planned != real_bytes:
                        print(f"{name} window {window}, {tokens} tokens by {step}: {planned:,}, mlx-lm {real_bytes:,}")
    return found


def quantized() -> list[bool]:
    found = []
    mlx_plan.QUANTIZED_FROM = START
    config = small("llama-3.2-1b", layers=1, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    model, real = models(config)
    real.set_dtype(mx.float16)
    with model:
        for bits in (8, 6, 5, 4, 3, 2):
            for group in (32, 64):
                kind = f"q{bits}_g{group}"
                for tokens, step in QUANTIZED:
                    options = PlanOptions(
                        runtime="mlx", recipe="bf16", context=tokens, batch=step, kv_type_k=kind, kv_type_v=kind
                    )
                    planned = plan_open(model, options).bytes_of("kv")
                    real_bytes = cached(real, tokens, step, kv_bits=bits, kv_group_size=group, quantized_kv_start=START)
                    found.append(planned == real_bytes)
                    if planned != real_bytes:
                        print(f"{kind}, {tokens} tokens by {step}: planned {planned:,}, mlx-lm {real_bytes:,}")
    return found


def real_models() -> list[bool]:
    """Packed to MLX in float32, which a CPU computes fastest; 16 bits would halve caches and activations."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("smollm2-135m", "gemma3-270m"):
            packed = lowbit.pack(name, "f32", Path(folder) / name, to="mlx").path
            loaded, _ = load_model(packed)
            mx.eval(loaded.parameters())
            with open_model(packed) as model:
                for tokens, step in REAL:
                    options = PlanOptions(runtime="mlx", context=tokens, batch=step, kv_type_k="f32", kv_type_v="f32")
                    made = plan_open(model, options)
                    mx.clear_cache()
                    mx.reset_peak_memory()
                    real_bytes = cached(loaded, tokens, step)
                    found.append(made.bytes_of("kv") == real_bytes)
                    peak, total = mx.get_peak_memory(), made.total_bytes
                    print(
                        f"{name}, {tokens} tokens by {step}: KV planned {made.bytes_of('kv'):,}, is {real_bytes:,}; "
                        f"weights planned {made.bytes_of('weights'):,}; total planned {total:,} (scratch for 16 bits), "
                        f"MLX's peak {peak:,} ({total / peak - 1:+.1%})",
                        flush=True,
                    )
            del loaded
    return found


def main() -> int:
    mx.disable_compile()
    equal = real_models() if "--real" in sys.argv[1:] else [*floats(), *quantized()]
    print(f"KV caches of MLX: {sum(equal)} of {len(equal)} combinations equal to the byte")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    raise SystemExit(main())
