"""What llama.cpp rounds while it runs: keys and values on their way into its cache, activations on their way into a
product. The formulas are those of its kernels, which differ from the formats' own where speed counts.

Source: ggml_get_type_traits_cpu(type)->from_float, which is what copies into a cache and products call: quantize_row_*
of ggml-cpu (arch/x86/quants.c, repack.cpp; other processors' kernels may differ in the last code) and ggml-quants.c.
"""

from __future__ import annotations

from lowbit.errors import BadOption
from lowbit.grid import iq4_nl, q8_0
from lowbit.grid._array import as_blocks, as_rows, cast, extremes, first_extreme, plain, round_to
from lowbit.grid._search import nearest_int
from lowbit.grid.base import Array, Blocks, Grid, namespace

# The types of llama.cpp's --cache-type-k and -v, by grid.
CACHES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")

# ggml's vec_dot_type of a weight's grid: what the other side of its product is rounded to.
_Q8_0, _Q8_1, _Q8_K = "q8_0", "q8_1", "q8_k"
ACTIVATIONS = {
    "q4_0": _Q8_0, "q5_0": _Q8_0, "q8_0": _Q8_0, "iq4_nl": _Q8_0, "mxfp4": _Q8_0, "q4_1": _Q8_1, "q5_1": _Q8_1,
    "q4_k": _Q8_K, "q5_k": _Q8_K, "q6_k": _Q8_K, "f16": "f16", "bf16": "bf16",
}  # fmt: skip
_SUPER_BLOCK = 256


def cache_blocks(grid: Grid, x: Array) -> Blocks:
    """``x`` (..., n) float32 as the cache holds it; ``grid.pack`` makes its bytes. Raises BadFile on NaN or Inf."""
    if grid.name not in CACHES:
        raise BadOption("no such KV cache type", found=grid.name, expected=", ".join(CACHES))
    if grid.name == "q8_0":
        return eight_bit(x)
    if grid.name == "iq4_nl":
        return iq4_nl.GRID.quantize_at_once(x)
    return grid.quantize(x)


def eight_bit(x: Array) -> Blocks:
    """Q8_0 by its fast kernel: codes by 127 / magnitude, halves to even. (..., n) float32 -> blocks of 32."""
    xp = namespace(x)
    blocks = as_blocks(x, q8_0.GRID.block_size)
    low, high = extremes(blocks)
    magnitude = abs(xp.maximum(-low, high))  # (..., n_blocks)
    zero = magnitude == 0
    # By an array: some torch backends divide by a number as a product with its inverse.
    most = xp.full_like(magnitude, 127.0)
    inverse = most / xp.where(zero, 1.0, magnitude)
    inverse[zero | xp.isinf(inverse)] = 0.0
    q = blocks * inverse[..., None]
    xp.round(q, out=q)
    return Blocks(codes=cast(q, "int8"), scales=cast(magnitude / most, "float16"))


def activations(kind: str, x: Array) -> Array:
    """``x`` (..., n) float32 as a product reads it, float32: ``kind`` is a value of ACTIVATIONS.

    Q8_1 is Q8_0 and the sum of its values. Raises Unsupported where rows are not whole blocks, BadFile on NaN or Inf.
    """
    if kind in ("f16", "bf16"):
        return cast(round_to(plain(x), kind.upper()), "float32")
    if kind == _Q8_K:
        return _super_blocks(x)
    return q8_0.GRID.dequantize(eight_bit(x))


def _super_blocks(x: Array) -> Array:
    """Q8_K: 256 values on a float32 scale; the extreme one gets code -127."""
    xp = namespace(x)
    blocks = as_blocks(x, _SUPER_BLOCK)
    extremes(blocks)  # NaN and Inf are refused
    extreme = first_extreme(blocks)  # (..., n_blocks)
    zero = extreme == 0
    inverse = xp.full_like(extreme, -127.0) / xp.where(zero, 1.0, extreme)
    codes = cast(nearest_int(blocks * inverse[..., None]), "float32")
    xp.clip(codes, None, 127.0, out=codes)
    codes *= xp.where(zero, 0.0, 1.0 / inverse)[..., None]
    return as_rows(codes)
