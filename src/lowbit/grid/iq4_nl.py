"""IQ4_NL: 32 weights on 16 unevenly spaced values, dense around zero; a float16 scale, and codes of 4 bits.

Codes here are the table's values, -127..113; the file holds their places in the table. A block's scale is the best of
16 by least squares, weighted by the squares of the weights. Source: quantize_row_iq4_nl_impl (7 tries to each side, as
llama-quantize calls it), kvalues_iq4nl and block_iq4_nl in ggml (ggml-quants.c, ggml-common.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_blocks, as_rows, cast, check_finite, first_extreme, inverse_of, lookup, raw_blocks
from lowbit.grid._layout import halves, nibbles, put_halves, put_nibbles
from lowbit.grid._search import in_slices, sum_in_order
from lowbit.grid.base import Array, Blocks, Grid, namespace

_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_TRIES = 7
_EPSILON = 1e-15  # GROUP_MAX_EPS: a block below it is zero
_SLICE = 2048  # blocks at a time

# The midpoints of neighbours are whole or halves, so floor(2x) tells the nearest value; a midpoint goes up.
# (512,) float32: the nearest of _VALUES for floor(2x) from -256 to 255.
_DOUBLED_MIDPOINTS = _VALUES[1:].astype(np.int16) + _VALUES[:-1]
_NEAREST = _VALUES[np.searchsorted(_DOUBLED_MIDPOINTS, np.arange(-256, 256), side="right")].astype(np.float32)
# (256,) uint8: the place of a value in the table, by the byte that it is.
_PLACES = np.zeros(256, np.uint8)
_PLACES[_VALUES.view(np.uint8)] = np.arange(16)


class IQ4_NL(Grid):
    name = "iq4_nl"
    ggml_type = 20
    block_size = 32
    block_bytes = 2 + 16  # the float16 scale, then 32 nibbles
    min_code, max_code = -127, 113

    @property
    def has_scales(self) -> bool:
        return False  # code * scale it is, but calibration rounds to evenly spaced codes

    @property
    def is_trainable(self) -> bool:
        return True

    def encode_on(self, x: Array, frame: Blocks) -> Blocks:
        scaled = as_blocks(x, self.block_size) * inverse_of(cast(frame.scales, "float32"))[..., None]
        codes = _nearest(namespace(scaled), scaled)
        return Blocks(codes=cast(codes, "int8"), scales=frame.scales)

    def quantize(self, x: Array) -> Blocks:
        check_finite(x)
        blocks = as_blocks(x, self.block_size)  # (..., n_blocks, 32)
        codes, scales = in_slices(_quantize, blocks.reshape(-1, self.block_size), _SLICE)
        return Blocks(codes=codes.reshape(blocks.shape), scales=scales.reshape(blocks.shape[:-1]))

    def quantize_at_once(self, x: Array) -> Blocks:
        """Without the search: as llama.cpp writes a cache of this type (quantize_row_iq4_nl_ref, no tries)."""
        check_finite(x)
        blocks = as_blocks(x, self.block_size)
        codes, scales = in_slices(_at_once, blocks.reshape(-1, self.block_size), _SLICE)
        return Blocks(codes=codes.reshape(blocks.shape), scales=scales.reshape(blocks.shape[:-1]))

    def dequantize(self, blocks: Blocks) -> Array:
        with np.errstate(invalid="ignore"):  # a scale that overflowed on the way is NaN, in the runtime too
            return as_rows(cast(blocks.codes, "float32") * cast(blocks.scales, "float32")[..., None])

    def pack(self, blocks: Blocks) -> np.ndarray:
        places = _PLACES[np.asarray(blocks.codes).view(np.uint8)]
        raw = np.empty((*places.shape[:-1], self.block_bytes), np.uint8)
        put_halves(raw[..., :2], blocks.scales)
        put_nibbles(raw[..., 2:], places)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        return Blocks(codes=_VALUES[nibbles(raw[..., 2:])], scales=halves(raw[..., :2]))


def _quantize(xp: Array, x: Array) -> tuple[Array, Array]:
    """(n, 32) float32 -> codes (n, 32) int8, scales (n) float16."""
    scale = _search(xp, x)
    # The codes by the scale as found; only then is it rounded to float16.
    codes = _nearest(xp, x * xp.where(scale == 0, 0.0, 1.0 / scale)[:, None])
    return cast(codes, "int8"), cast(scale, "float16")


def _at_once(xp: Array, x: Array) -> tuple[Array, Array]:
    """(n, 32) float32 -> codes (n, 32) int8, scales (n) float16: the extreme weight on -127, the scale refitted."""
    extreme = first_extreme(x)  # (n)
    is_zero = abs(extreme) < _EPSILON
    extreme = xp.where(is_zero, 1.0, extreme)
    codes = _nearest(xp, x * (1.0 / (extreme / xp.full_like(extreme, -127.0)))[:, None])
    weighted = (x * x) * codes
    by_weight, squares = weighted * x, weighted * codes
    sum_x = sum_in_order(xp, xp.stack([by_weight[:, i] for i in range(32)]))
    sum_2 = sum_in_order(xp, xp.stack([squares[:, i] for i in range(32)]))
    scale = xp.where(sum_2 > 0, sum_x / sum_2, 0.0)
    scale[is_zero] = 0.0
    return cast(codes, "int8"), cast(scale, "float16")


def _search(xp: Array, x: Array) -> Array:
    """The best scale of each block: (n, 32) float32 -> (n) float32."""
    extreme = first_extreme(x)  # (n)
    is_zero = abs(extreme) < _EPSILON
    extreme = xp.where(is_zero, 1.0, extreme)
    by_weight = xp.stack([x[:, i] for i in range(32)])  # (32, n), contiguous: sums run over the weights in order
    squared = by_weight * by_weight

    def fit(inverse: Array) -> tuple[Array, Array]:
        codes = _nearest(xp, by_weight * inverse)
        weighted = squared * codes
        codes *= weighted
        weighted *= by_weight
        return sum_in_order(xp, weighted), sum_in_order(xp, codes)

    sum_x, sum_2 = fit(1.0 / (extreme / xp.full_like(extreme, 127.0)))
    scale = xp.where(sum_2 > 0, sum_x / sum_2, 0.0)
    best = scale * sum_x
    for i in range(-_TRIES, _TRIES + 1):
        sum_x, sum_2 = fit(xp.full_like(extreme, float(i - 127)) / extreme)
        better = (sum_2 > 0) & (sum_x * sum_x > best * sum_2)
        fitted = sum_x / sum_2
        scale, best = xp.where(better, fitted, scale), xp.where(better, fitted * sum_x, best)
    scale[is_zero] = 0.0
    return scale


def _nearest(xp: Array, x: Array) -> Array:
    """The nearest values of the table, as float32. ``x`` is overwritten."""
    x += x
    xp.floor(x, out=x)
    x[xp.isnan(x)] = 255.0  # where sums overflowed; no comparison holds, and ggml's search ends at the last value
    xp.clip(x, -256.0, 255.0, out=x)
    x += 256.0
    return lookup(_NEAREST, x)


GRID = IQ4_NL()
