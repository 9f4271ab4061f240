"""How codes lie in bytes, where formats share it. numpy only."""

from __future__ import annotations

import numpy as np

from lowbit.grid.base import Array


def put_nibbles(out: np.ndarray, codes: np.ndarray) -> None:
    """(..., 2k) uint8 below 16 into (..., k) bytes: the first k are the low nibbles, the others the high ones."""
    half = out.shape[-1]
    np.left_shift(codes[..., half:], 4, out=out)
    out |= codes[..., :half]


def nibbles(raw: np.ndarray) -> np.ndarray:
    """The inverse of ``put_nibbles``: (..., k) bytes -> (..., 2k) uint8."""
    half = raw.shape[-1]
    codes = np.empty((*raw.shape[:-1], 2 * half), np.uint8)
    np.bitwise_and(raw, 15, out=codes[..., :half])
    np.right_shift(raw, 4, out=codes[..., half:])
    return codes


def put_pairs(out: np.ndarray, codes: np.ndarray) -> None:
    """(..., 2k) uint8 below 16 into (..., k) bytes: neighbours share a byte, the first in the low nibble."""
    np.left_shift(codes[..., 1::2], 4, out=out)
    out |= codes[..., ::2]


def pairs(raw: np.ndarray) -> np.ndarray:
    """The inverse of ``put_pairs``: (..., k) bytes -> (..., 2k) uint8."""
    codes = np.empty((*raw.shape[:-1], 2 * raw.shape[-1]), np.uint8)
    np.bitwise_and(raw, 15, out=codes[..., ::2])
    np.right_shift(raw, 4, out=codes[..., 1::2])
    return codes


def fifth_bits(codes: np.ndarray, axis: int = -1) -> np.ndarray:
    """The bits worth 16 of uint8 codes, eight of them along ``axis`` in a byte, the first one lowest."""
    return np.packbits(codes >> 4 & 1, axis=axis, bitorder="little")


def from_fifth_bits(raw: np.ndarray, axis: int = -1) -> np.ndarray:
    """The inverse of ``fifth_bits``: uint8, 0 or 16."""
    return np.unpackbits(raw, axis=axis, bitorder="little") << 4


def put_halves(out: np.ndarray, halves: Array) -> None:
    """(...) float16 into (..., 2) bytes."""
    out[...] = np.ascontiguousarray(halves, "<f2")[..., None].view(np.uint8)


def halves(raw: np.ndarray) -> np.ndarray:
    """(..., 2) bytes -> (...) float16."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0]
