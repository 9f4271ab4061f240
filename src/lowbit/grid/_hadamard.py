"""The Walsh-Hadamard rotation that llama.cpp puts before the rounding of a quantized cache.

Source: ggml_compute_forward_fwht in ggml-cpu/ops.cpp (the same sums in the same order, so the same bits) and
build_input_k_rot, build_input_v_rot in llama-kv-cache.cpp (how many neighbours are turned together).
"""

from __future__ import annotations

import math

import numpy as np

from lowbit.grid._array import cast, plain
from lowbit.grid.base import Array, namespace

_UNIT = 64


def width_of_keys(head_dim: int) -> int | None:
    """How many neighbouring values of a key are turned together; None where keys are not: heads not whole 64s."""
    if head_dim % _UNIT:
        return None
    width = _UNIT
    while head_dim % (2 * width) == 0:
        width *= 2
    return width


def width_of_values(head_dim: int) -> int | None:
    """The same of a value: 64, however long the head."""
    return None if head_dim % _UNIT else _UNIT


def rotate(x: Array, width: int) -> Array:
    """``x`` (..., n) float32, every ``width`` neighbours multiplied by the orthonormal Hadamard matrix.

    width: a power of two that divides n. The matrix is its own inverse, but for rounding.
    """
    xp = namespace(x)
    # The factor as C computes it: float32 throughout.
    scale = float(np.float32(1.0) / np.sqrt(np.float32(width)))
    turned = plain(x).reshape(-1, width) * scale
    length = 1
    while length < width:
        pairs = turned.reshape(-1, width // (2 * length), 2, length)
        u, v = pairs[:, :, 0], pairs[:, :, 1]
        turned = xp.stack([u + v, u - v], 2)
        length *= 2
    return turned.reshape(x.shape)


def matrix(width: int) -> np.ndarray:
    """The matrix itself, (width, width) float32: for where a product is wanted and the last bits do not matter."""
    built = np.ones((1, 1))
    while len(built) < width:
        built = np.block([[built, built], [built, -built]])
    return cast(built / math.sqrt(width), "float32")  # type: ignore[no-any-return]
