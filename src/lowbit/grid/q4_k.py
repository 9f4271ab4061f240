"""Q4_K: 256 weights in 8 groups of 32; codes of 4 bits, a 6-bit scale and minimum a group, two float16 over those.

value = (scale * group's scale) * code - (minimum * group's minimum). Each group's scale and minimum are the best of 22
by least squares, weighted by the magnitudes of the weights. Source: quantize_row_q4_K_ref, make_qkx2_quants and
block_q4_K in ggml (ggml-quants.c, ggml-common.h), without an importance matrix.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from lowbit.grid._array import as_blocks, as_rows, cast, check_finite, raw_blocks
from lowbit.grid._ladder import LadderGrid
from lowbit.grid._layout import halves, nibbles, put_halves, put_nibbles
from lowbit.grid._search import in_slices, nearest_int, square_root, sum_in_order
from lowbit.grid.base import Array, Blocks

_SLICE = 256  # blocks at a time
_TOP_SUB_SCALE = 63


class Q4_K(LadderGrid):
    name = "q4_k"
    ggml_type = 12
    block_size = 256
    block_bytes = 2 + 2 + 12 + 128  # float16 scale and minimum, the groups' scales and minimums, then nibbles
    min_code, max_code = 0, 15
    ladder_group = 32
    # The search tries max_code + first + i / 10 steps to the range of a group, for i from 0 to tries - 1.
    first: ClassVar[float] = -1.0
    tries: ClassVar[int] = 21
    by_magnitude: ClassVar[bool] = False  # in the search weights count by their magnitude alone, and errors likewise

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        blocks = as_blocks(x, self.block_size)
        offsets = [np.float32(self.first) + np.float32(0.1) * np.float32(i) for i in range(self.tries)]
        reaches = [float(offset + np.float32(self.max_code)) for offset in offsets]  # float32 sums, in C's order
        n_groups = self.block_size // self.ladder_group
        flat = blocks.reshape(-1, n_groups, self.ladder_group)  # (block, group, weight)
        found = in_slices(partial(self._quantize, reaches=reaches), flat, _SLICE)
        codes, scales, mins, sub_scales, sub_mins = found
        outer = blocks.shape[:-1]
        return Blocks(
            codes=codes.reshape(*outer, 256),
            scales=scales.reshape(outer),
            mins=mins.reshape(outer),
            sub_scales=sub_scales.reshape(*outer, n_groups),
            sub_mins=sub_mins.reshape(*outer, n_groups),
        )

    def dequantize(self, blocks: Blocks) -> Array:
        with np.errstate(invalid="ignore"):  # 0 * Inf and Inf - Inf, beyond float16: NaN, as in the runtime
            steps = cast(blocks.scales, "float32")[..., None] * cast(blocks.sub_scales, "float32")
            offsets = cast(blocks.mins, "float32")[..., None] * cast(blocks.sub_mins, "float32")
            values = cast(blocks.codes, "float32").reshape(*steps.shape, self.ladder_group) * steps[..., None]
            values -= offsets[..., None]
        return as_rows(values.reshape(*steps.shape[:-1], 256))

    def ladder(self, blocks: Blocks) -> tuple[Array, Array]:
        steps = cast(blocks.scales, "float32")[..., None] * cast(blocks.sub_scales, "float32")
        return steps, -(cast(blocks.mins, "float32")[..., None] * cast(blocks.sub_mins, "float32"))

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes).view(np.uint8)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        put_head(raw[..., :16], blocks)
        raw[..., 16:] = pack_nibbles(codes)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        return unpack_head(raw[..., :16], unpack_nibbles(raw[..., 16:]))

    def _quantize(self, xp: Array, x: Array, reaches: list[float]) -> tuple[Array, ...]:
        """(n, groups, weights) float32 -> codes int8, scales and mins (n) float16, their groups' (n, groups) int8."""
        scale, least, codes = _search(xp, x, self.max_code, reaches, by_magnitude=self.by_magnitude)
        d, d_min, sub_scales, sub_mins = self._levels(xp, scale, -least)
        # The codes once more, on the scales as they are stored; a group whose stored scale is 0 keeps the search's.
        steps = (cast(d, "float32")[:, None] * sub_scales)[..., None]
        again = x + (cast(d_min, "float32")[:, None] * sub_mins)[..., None]
        again /= steps
        again = xp.clip(nearest_int(again), 0, self.max_code)
        codes = xp.where(steps == 0, codes, again)
        return cast(codes, "int8"), d, d_min, cast(sub_scales, "int8"), cast(sub_mins, "int8")

    def _levels(self, xp: Array, scale: Array, minimum: Array) -> tuple[Array, ...]:
        """(n, groups) float32 both -> two float16 (n), and whole numbers (n, groups), still float32."""
        d, sub_scales = _two_levels(xp, scale)
        d_min, sub_mins = _two_levels(xp, minimum)
        return d, d_min, sub_scales, sub_mins


def put_head(out: np.ndarray, blocks: Blocks) -> None:
    """The two float16 and the groups' 6-bit scales and minimums, into (..., 16) bytes."""
    scales, mins = (np.asarray(sub).view(np.uint8) for sub in (blocks.sub_scales, blocks.sub_mins))
    put_halves(out[..., :2], blocks.scales)
    put_halves(out[..., 2:4], blocks.mins)
    # Groups 0..3 have a byte each; of groups 4..7 the lower 4 bits share a byte, the upper 2 lie above the others.
    out[..., 4:8] = scales[..., :4] | scales[..., 4:] >> 4 << 6
    out[..., 8:12] = mins[..., :4] | mins[..., 4:] >> 4 << 6
    out[..., 12:] = scales[..., 4:] & 15 | mins[..., 4:] << 4


def unpack_head(raw: np.ndarray, codes: np.ndarray) -> Blocks:
    """(..., 16) bytes, and the codes (..., 256) uint8 that go with them."""
    low, high = raw[..., 4:12].reshape(*raw.shape[:-1], 2, 4), raw[..., 12:]
    rest = np.stack([high & 15, high >> 4], axis=-2) | (low >> 6 << 4)
    sub = np.concatenate([low & 63, rest], axis=-1).view(np.int8)  # (..., scales and minimums, 8)
    return Blocks(
        codes=codes.view(np.int8),
        scales=halves(raw[..., :2]),
        mins=halves(raw[..., 2:4]),
        sub_scales=sub[..., 0, :],
        sub_mins=sub[..., 1, :],
    )


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """(..., 256) uint8 below 16 -> (..., 128): of 64 weights each, the first 32 are the low nibbles."""
    raw = np.empty((*codes.shape[:-1], 4, 32), np.uint8)
    put_nibbles(raw, codes.reshape(*codes.shape[:-1], 4, 64))
    return as_rows(raw)


def unpack_nibbles(raw: np.ndarray) -> np.ndarray:
    """The inverse of ``pack_nibbles``."""
    return as_rows(nibbles(raw.reshape(*raw.shape[:-1], 4, 32)))


def _two_levels(xp: Array, wanted: Array) -> tuple[Array, Array]:
    """(n, 8) float32 -> float16 (n) and whole numbers (n, 8) up to 63, still float32: their products are stored."""
    d, sub = levels(xp, wanted, _TOP_SUB_SCALE)
    return d, cast(xp.clip(sub, None, _TOP_SUB_SCALE), "float32")


def levels(xp: Array, wanted: Array, top: int) -> tuple[Array, Array]:
    """(n, groups) float32 -> float16 (n), and int32 (n, groups) from 0 to 255: the multiples of it, up to ``top`` but
    where numbers overflowed."""
    greatest = xp.amax(xp.where(wanted > 0, wanted, 0.0), -1)  # C's > passes over NaN
    most = xp.full_like(greatest, float(top))
    inverse = xp.where(greatest > 0, most / greatest, 0.0)
    # C keeps the lowest byte of what nearest_int gives.
    return cast(greatest / most, "float16"), nearest_int(wanted * inverse[:, None]) & 255


def _search(xp: Array, x: Array, top: int, reaches: list[float], *, by_magnitude: bool) -> tuple[Array, Array, Array]:
    """The best scale of each group, the value of its code 0 (at most 0), both (n, groups), and its codes int32.

    Each try rounds to evenly spaced codes from the least value so far to the greatest weight, then fits scale and
    least value to them: a better fit is where the next try starts from.
    """
    size = x.shape[-1]
    by_weight = xp.stack([x[..., i] for i in range(size)])  # (size, n, groups), contiguous: sums run over the weights
    weights = abs(by_weight)
    if not by_magnitude:
        weights += square_root(xp, sum_in_order(xp, by_weight * by_weight) / float(size))
    sum_w, sum_x = sum_in_order(xp, weights), sum_in_order(xp, weights * by_weight)
    high, least = xp.amax(by_weight, 0), xp.clip(xp.amin(by_weight, 0), None, 0.0)
    is_flat, floor = high == least, least

    def rounded(reach: float) -> tuple[Array, Array]:
        inverse = xp.full_like(high, reach) / (high - least)
        codes = by_weight - least
        codes *= inverse
        return inverse, cast(xp.clip(nearest_int(codes), 0, top), "float32")

    def error_of(scale: Array, least: Array, codes: Array) -> Array:
        codes *= scale
        codes += least
        codes -= by_weight
        codes = abs(codes) if by_magnitude else codes * codes
        codes *= weights
        return sum_in_order(xp, codes)

    inverse, codes = rounded(float(top))
    scale = 1.0 / inverse
    error = error_of(scale, least, codes)
    best_inverse, best_start = inverse, least  # what the codes of the best fit were made with
    for reach in reaches:
        inverse, codes = rounded(reach)
        weighted = weights * codes
        sum_c = sum_in_order(xp, weighted)
        sum_2 = sum_in_order(xp, weighted * codes)
        weighted *= by_weight
        sum_cx = sum_in_order(xp, weighted)
        determinant = sum_w * sum_2 - sum_c * sum_c
        new_scale = (sum_w * sum_cx - sum_x * sum_c) / determinant
        new_least = (sum_2 * sum_x - sum_c * sum_cx) / determinant
        above = new_least > 0
        new_scale, new_least = xp.where(above, sum_cx / sum_2, new_scale), xp.where(above, 0.0, new_least)
        new_error = error_of(new_scale, new_least, codes)
        better = (determinant > 0) & (new_error < error)
        error, scale = xp.where(better, new_error, error), xp.where(better, new_scale, scale)
        best_inverse, best_start = xp.where(better, inverse, best_inverse), xp.where(better, least, best_start)
        least = xp.where(better, new_least, least)
    chosen = x - best_start[..., None]
    chosen *= best_inverse[..., None]
    chosen = xp.clip(nearest_int(chosen), 0, top)
    chosen[is_flat], scale[is_flat], least[is_flat] = 0, 0.0, floor[is_flat]
    return scale, least, chosen


GRID = Q4_K()
