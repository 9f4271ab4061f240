"""Q6_K: 256 weights in 16 groups of 16; codes of 6 bits, a scale of 8 bits a group, and a float16 scale over those.

llama-quantize puts an output head here. Each group's scale is the best of 19, weighted by the squares of the weights.
Source: quantize_row_q6_K_ref, make_qx_quants (rmse_type 1) and block_q6_K in ggml (ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_blocks, as_rows, cast, check_finite, first_extreme, raw_blocks
from lowbit.grid._ladder import LadderGrid
from lowbit.grid._search import sum_in_order
from lowbit.grid.base import Array, Blocks, namespace

_EPSILON = 1e-15  # GROUP_MAX_EPS: a group or block below it is zero
_SLICE = 1024  # blocks at a time, so that the search stays in the cache


class Q6_K(LadderGrid):
    name = "q6_k"
    ggml_type = 14
    block_size = 256
    block_bytes = 128 + 64 + 16 + 2  # lower 4 bits, upper 2 bits, the groups' scales, the float16 scale
    min_code, max_code = -32, 31
    ladder_group = 16

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)
        flat = blocks.reshape(-1, 16, 16)  # (block, group, weight)
        like = flat[:, :, 0]
        codes, sub_scales = xp.zeros_like(flat, dtype=xp.int8), xp.zeros_like(like, dtype=xp.int8)
        scales = xp.zeros_like(like[:, 0], dtype=xp.float16)
        for start in range(0, flat.shape[0], _SLICE):
            part = slice(start, start + _SLICE)
            # ggml computes with Inf and NaN where sums overflow; so does this.
            with np.errstate(all="ignore"):
                codes[part], sub_scales[part], scales[part] = _quantize(xp, flat[part])
        outer = blocks.shape[:-1]
        return Blocks(
            codes=codes.reshape(*outer, 256), scales=scales.reshape(outer), sub_scales=sub_scales.reshape(*outer, 16)
        )

    def dequantize(self, blocks: Blocks) -> Array:
        with np.errstate(invalid="ignore"):  # 0 * Inf, where a scale overflowed float16: NaN, as in the runtime
            steps = cast(blocks.scales, "float32")[..., None] * cast(blocks.sub_scales, "float32")
            values = cast(blocks.codes, "float32").reshape(*steps.shape, 16) * steps[..., None]
        return as_rows(values.reshape(*steps.shape[:-1], 256))

    def ladder(self, blocks: Blocks) -> tuple[Array, Array]:
        steps = cast(blocks.scales, "float32")[..., None] * cast(blocks.sub_scales, "float32")
        return steps, namespace(steps).zeros_like(steps)

    def pack(self, blocks: Blocks) -> np.ndarray:
        unsigned = (np.asarray(blocks.codes) + np.int8(32)).view(np.uint8)
        # Each half of a block: four quarters of 32 weights. (..., half, quarter, 32)
        quarters = unsigned.reshape(*unsigned.shape[:-1], 2, 4, 32)
        raw = np.empty((*unsigned.shape[:-1], self.block_bytes), np.uint8)
        low = (quarters[..., :2, :] & 15) | (quarters[..., 2:, :] << 4)
        high = quarters >> 4
        high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
        raw[..., :128] = low.reshape(*raw.shape[:-1], 128)
        raw[..., 128:192] = high.reshape(*raw.shape[:-1], 64)
        raw[..., 192:208] = np.asarray(blocks.sub_scales).view(np.uint8)
        raw[..., 208:] = np.ascontiguousarray(blocks.scales, "<f2")[..., None].view(np.uint8)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        low = raw[..., :128].reshape(*raw.shape[:-1], 2, 2, 32)
        high = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32)
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        quarters = np.concatenate([low & 15, low >> 4], axis=-2) | ((high >> shifts & 3) << 4)
        return Blocks(
            codes=quarters.reshape(*raw.shape[:-1], 256).view(np.int8) - np.int8(32),
            scales=np.ascontiguousarray(raw[..., 208:]).view("<f2")[..., 0],
            sub_scales=np.ascontiguousarray(raw[..., 192:208]).view(np.int8),
        )


def _quantize(xp: Array, x: Array) -> tuple[Array, Array, Array]:
    """(n, 16, 16) float32 -> codes (n, 16, 16) int8, the groups' scales (n, 16) int8, scales (n) float16."""
    wanted, inverse, is_zero = _search(xp, x)
    searched = xp.clip(_nearest(xp, x * inverse[..., None]), -32, 31)
    searched[is_zero] = -32.0
    largest = first_extreme(xp.where(xp.isnan(wanted), 0.0, wanted))  # C's > passes over NaN
    zero_block = abs(largest) < _EPSILON
    inverse_of_d = xp.full_like(largest, -128.0) / largest
    d = cast(1.0 / inverse_of_d, "float16")
    sub_scales = xp.clip(_nearest(xp, wanted * inverse_of_d[:, None]), None, 127.0)
    sub_scales[sub_scales < -128] = 0.0  # C's cast of what Inf became keeps the lowest byte, 0
    # The codes once more, on the scales as they are stored; a group whose stored scale is 0 keeps the search's.
    steps = (cast(d, "float32")[:, None] * sub_scales)[..., None]
    codes = xp.where(steps == 0, searched, xp.clip(_nearest(xp, x / steps), -32, 31))
    codes[zero_block], sub_scales[zero_block], d[zero_block] = -32.0, 0.0, 0.0
    return cast(codes, "int8"), cast(sub_scales, "int8"), d


def _search(xp: Array, x: Array) -> tuple[Array, Array, Array]:
    """The best scale of each group, what its codes were made with (1/scale about), and whether it is all zero."""
    extreme = first_extreme(x)  # (n, 16)
    is_zero = abs(extreme) < _EPSILON
    extreme = xp.where(is_zero, 1.0, extreme)
    # (16 weights, n, 16 groups), contiguous: sums run over the weights in order, as in C
    by_weight = xp.stack([x[..., i] for i in range(16)])
    squared = by_weight * by_weight
    cubed = squared * by_weight

    def fit(steps: np.float32) -> tuple[Array, Array, Array]:
        inverse = xp.full_like(extreme, -float(steps)) / extreme
        codes = by_weight * inverse
        xp.round(codes, out=codes)
        xp.clip(codes, -32, 31, out=codes)
        products = squared * codes
        products *= codes
        codes *= cubed
        return inverse, sum_in_order(xp, codes), sum_in_order(xp, products)

    best_inverse, sum_x, sum_2 = fit(np.float32(32))
    scale = xp.where(sum_2 == 0, 0.0, sum_x / sum_2)
    best = scale * sum_x
    for i in (*range(-9, 0), *range(1, 10)):
        inverse, sum_x, sum_2 = fit(np.float32(32) + np.float32(0.1) * np.float32(i))
        better = (sum_2 > 0) & (sum_x * sum_x > best * sum_2)
        fitted = sum_x / sum_2
        scale, best = xp.where(better, fitted, scale), xp.where(better, fitted * sum_x, best)
        best_inverse = xp.where(better, inverse, best_inverse)
    scale[is_zero] = 0.0
    return scale, best_inverse, is_zero


def _nearest(xp: Array, x: Array) -> Array:
    """ggml's nearest_int: halves to even; NaN gives 0 and Inf the least integer it knows."""
    rounded = xp.round(x)
    rounded[xp.isnan(rounded)] = 0.0
    rounded[xp.isinf(rounded)] = -4194304.0
    return rounded


GRID = Q6_K()
