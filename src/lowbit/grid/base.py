"""The contract of a grid: the arithmetic of one storage format, written once over an array namespace.

A grid file (``q4_0.py``) defines one subclass and its instance ``GRID``; ``lowbit.grid.get("q4_0")`` finds it by
file name. Every method takes numpy arrays or torch tensors and answers in kind; results are bit-identical in both
and with the library that executes the format, ggml, MLX or compressed-tensors (tests/golden holds blocks made by it).

Shapes: weights are (..., n) float32 with n a multiple of ``block_size``; n_blocks = n / block_size.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What a format stores, before it is laid out in bytes.

    codes:  (..., n_blocks, block_size) int8, from min_code to max_code (Q4_0: -8..7, Q4_1: 0..15); MXFP4: 0..15 as
            stored; MLX affine: uint8 as stored; for the float formats (..., n) in the stored dtype's bits (float16,
            uint16 for BF16, float32).
    scales: (..., n_blocks) float16 (MXFP4: uint8 exponents), or None for the float formats. Containers that keep
            scales apart (MLX, compressed-tensors) may have them in BF16 or F32: float32 here.
    sub_scales: (..., n_blocks, n_sub) int8 where a block has scales of its parts (Q4_K, Q5_K, Q6_K), else None.
    mins: (..., n_blocks) like scales where code 0 stands for another value than 0, else None. Q4_1, Q5_1, MLX affine:
            that value; Q4_K, Q5_K: what ``sub_mins`` are multiplied by, and then subtracted.
    sub_mins: (..., n_blocks, n_sub) int8 where a block has minimums of its parts (Q4_K, Q5_K), else None.
    """

    codes: Array
    scales: Array | None = None
    sub_scales: Array | None = None
    mins: Array | None = None
    sub_mins: Array | None = None


def namespace(x: Array) -> Any:
    """The array namespace of ``x``: the torch module for a tensor, else numpy. Never imports torch."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(x, torch.Tensor) else np


class Grid(ABC):
    """One storage format. Subclasses set the class variables and write the four methods."""

    name: ClassVar[str]  # lowbit's and llama.cpp's spelling, lower case: "q4_0"
    ggml_type: ClassVar[int | None]  # gguf.GGMLQuantizationType value; None where GGUF does not have the format
    block_size: ClassVar[int]  # weights a block
    block_bytes: ClassVar[int]  # bytes a block
    max_code: ClassVar[int] = 0  # codes run from min_code to max_code; 0 for floats, MXFP4 and MLX's unsigned codes
    min_code: ClassVar[int] = 0
    ladder_group: ClassVar[int] = 0  # weights that share a step and an offset, where ``ladder`` tells them
    whole_rows: ClassVar[bool] = False  # one scale a row: its blocks of ``block_size`` weights share it
    scale_bytes: ClassVar[int] = 0  # of that scale, ahead of a row's blocks
    scale_dtype: ClassVar[str] = "F16"  # that scales and minimums are rounded to: 'F16', or 'BF16' (float32 arrays)

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes / self.block_size

    def row_bytes(self, n: int) -> int:
        """Bytes that a row of ``n`` weights, whole blocks, is stored in."""
        return n // self.block_size * self.block_bytes + self.scale_bytes

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code of evenly spaced ones, unsigned ones included."""
        return self.min_code, self.max_code

    @property
    def is_trainable(self) -> bool:
        """Whether there is ``encode_on``: training holds on to a frame and moves weights between its codes."""
        return self.has_scales

    @property
    def has_scales(self) -> bool:
        """Whether a block is codes times one float16 scale, so that ``encode`` works and scales can be trained."""
        return self.max_code > 0

    @abstractmethod
    def quantize(self, x: Array) -> Blocks:
        """Rounds ``x`` (..., n) float32 by the library's own rule. Raises BadFile on NaN or Inf."""

    @abstractmethod
    def dequantize(self, blocks: Blocks) -> Array:
        """The float32 values (..., n) that the runtime computes with."""

    @abstractmethod
    def pack(self, blocks: Blocks) -> np.ndarray:
        """The stored bytes: (..., n_blocks * block_bytes) uint8. numpy only."""

    @abstractmethod
    def unpack(self, raw: np.ndarray) -> Blocks:
        """The inverse of ``pack``. numpy only."""

    def ladder(self, blocks: Blocks) -> tuple[Array, Array]:
        """Step and offset of each group of ``ladder_group`` weights: value = code * step + offset, both float32
        (..., n / ladder_group). Formats whose groups are more than one float16 scale only."""
        raise NotImplementedError(f"{self.name} has no ladder")

    def encode_on(self, x: Array, frame: Blocks) -> Blocks:
        """The nearest codes for ``x`` (..., n) float32, finite, on the scales and minimums of ``frame``, whatever its
        codes. Formats that are trainable only. No gradient flows.
        """
        raise NotImplementedError(f"{self.name} is not trainable")

    def encode(self, x: Array, scales: Array) -> Blocks:
        """The nearest codes for ``x`` (..., n) float32, finite, on the given float16 ``scales`` (..., n_blocks).

        Scales may be negative; on a zero scale every code is 0. Formats with ``has_scales`` only. No gradient flows.
        """
        raise NotImplementedError(f"{self.name} has no scales")

    def nearest_values(self, x: Array, scales: Array) -> Array:
        """``dequantize(encode(x, scales))`` bit for bit, without the codes in between: float32 (..., n)."""
        return self.dequantize(self.encode(x, scales))

    def inverse(self, scales: Array) -> Array:
        """What ``encode`` multiplies by: 1/scale in float32 (..., n_blocks), and 0 where the scale is 0."""
        raise NotImplementedError(f"{self.name} has no scales")
