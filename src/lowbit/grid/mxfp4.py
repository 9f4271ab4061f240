"""MXFP4: 32 weights as 4-bit floats (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) times a power of two.

The OCP Microscaling format, as ggml rounds to it: the exponent is the largest magnitude's, and each weight takes the
nearest value. Codes here are as the file holds them, 0..15: bit 3 is the sign, so that 8 is a zero too, which ``pack``
keeps and ``quantize`` never chooses. Scales are uint8 exponents. Source: quantize_row_mxfp4_ref, best_index_mxfp4,
kvalues_mxfp4 and block_mxfp4 in ggml (ggml-quants.c, ggml-common.h), ggml_e8m0_to_fp32_half (ggml-impl.h).
"""

from __future__ import annotations

import numpy as np

from lowbit.grid._array import as_blocks, as_rows, cast, extremes, lookup, raw_blocks
from lowbit.grid._layout import nibbles, put_nibbles
from lowbit.grid.base import Array, Blocks, Grid, namespace

_MAGNITUDES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # doubled, so that they are whole
_VALUES = np.concatenate([_MAGNITUDES, 0 - _MAGNITUDES])  # 0 - 0: both zeros are positive
_MIDPOINTS = tuple(float(m) for m in (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2)
# (256,) float32: 2^(exponent - 127), halved because the values are doubled
_SCALES = np.ldexp(np.ones(256, np.float32), np.arange(256) - 128)
_TOP_EXPONENT = 253  # the extreme is almost 2^128: values past 6 overflow, so none of them is the nearest


class MXFP4(Grid):
    name = "mxfp4"
    ggml_type = 39
    block_size = 32
    block_bytes = 1 + 16  # the exponent, then 32 nibbles

    @property
    def is_trainable(self) -> bool:
        return True  # on exponents that stay as they are

    def quantize(self, x: Array) -> Blocks:
        xp = namespace(x)
        blocks = as_blocks(x, self.block_size)  # (..., n_blocks, 32)
        low, high = extremes(blocks)
        exponents = _exponents(xp, xp.maximum(-low, high))  # (..., n_blocks) uint8
        return Blocks(codes=_codes(xp, blocks, exponents), scales=exponents)

    def encode_on(self, x: Array, frame: Blocks) -> Blocks:
        blocks = as_blocks(x, self.block_size)
        return Blocks(codes=_codes(namespace(blocks), blocks, frame.scales), scales=frame.scales)

    def dequantize(self, blocks: Blocks) -> Array:
        with np.errstate(over="ignore"):  # 12 * 2^125 is Inf, in ggml too
            return as_rows(lookup(_VALUES, blocks.codes) * lookup(_SCALES, blocks.scales)[..., None])

    def pack(self, blocks: Blocks) -> np.ndarray:
        codes = np.asarray(blocks.codes).view(np.uint8)
        raw = np.empty((*codes.shape[:-1], self.block_bytes), np.uint8)
        raw[..., 0] = blocks.scales
        put_nibbles(raw[..., 1:], codes)
        return as_rows(raw)

    def unpack(self, raw: np.ndarray) -> Blocks:
        raw = raw_blocks(raw, self.block_bytes)
        return Blocks(codes=nibbles(raw[..., 1:]).view(np.int8), scales=raw[..., 0].copy())


def _codes(xp: Array, blocks: Array, exponents: Array) -> Array:
    """The nearest values' codes: (..., n_blocks, 32) int8."""
    scaled = blocks / lookup(_SCALES, exponents)[..., None]
    negative = scaled < 0
    magnitude = abs(scaled)
    codes = xp.zeros_like(magnitude, dtype=xp.int8)
    for midpoint in _MIDPOINTS:
        codes += magnitude > midpoint  # a midpoint goes to the smaller magnitude
    at_top = exponents >= _TOP_EXPONENT
    if at_top.any():
        codes[at_top] = xp.clip(codes[at_top], None, 5)
    negative &= codes > 0
    codes += 8 * cast(negative, "int8")
    return codes


def _exponents(xp: Array, largest: Array) -> Array:
    """(..., n_blocks) float32 -> uint8: floor(log2) + 125, and 0 for a block of zeros.

    In C's float32 the logarithm of what is just below a power of two rounds up to the whole number; a float64 one,
    rounded, gives the same. Below 2^-125 C's cast of a negative number keeps its lowest byte.
    """
    with np.errstate(divide="ignore"):
        power = xp.floor(cast(xp.log2(cast(largest, "float64")), "float32"))
    biased = xp.where(largest > 0, power + 125.0, 0.0)
    return cast(cast(biased, "int32") & 255, "uint8")


GRID = MXFP4()
