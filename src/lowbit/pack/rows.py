"""A tensor's rows as the artifact means them, some at a time: in the file's order, its offset added, and finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.pack import lattice

_Rows = Callable[[Checkpoint, TensorSpec, int, int], np.ndarray]


def file_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows of the tensor in GGUF's shape seen as (rows, n), a vector as one row: float32 (stop - start, n). Raises
    BadFile on NaN or Inf."""
    values = checkpoint.stored_rows(spec.name, start, stop)
    if values is None:
        values = spec.gguf_values(lambda a, b: checkpoint.read_rows(spec.name, a, b), start, stop)
    grids.check_finite(values, f"{checkpoint.path}: {spec.name}")
    return values


def row_slices(spec: TensorSpec, weights: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices of about ``weights`` weights, at least a row; whole heads where the file reorders rows
    within a head, so that none is read twice."""
    rows = spec.gguf_n_rows
    unit = rows // spec.heads if spec.heads and len(spec.shape) > 1 else 1  # a bias of heads is one row
    step = max(1, weights // (spec.gguf_shape[-1] * unit)) * unit
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def matrix_slices(spec: TensorSpec, matrices: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, start, stop) of the parts of rows ``start`` to ``stop`` that lie in one of the stacked matrices each."""
    height = spec.n_rows // matrices
    while start < stop:
        end = min(stop, (start // height + 1) * height)
        yield start // height, start, end
        start = end


def plain_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """The same in Hugging Face's own order and values, for tensors that GGUF has in Hugging Face's shape."""
    values = checkpoint.read_rows(spec.name, start, stop)
    grids.check_finite(values, f"{checkpoint.path}: {spec.name}")
    return values


def precision_of(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """What ``file_rows`` are rounded to: 'BF16', 'F16' or 'F32'; where GGUF has other values it is F32."""
    return _precision(checkpoint, spec, file_rows) if spec.same_values else "F32"


def plain_precision_of(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """What ``plain_rows`` are rounded to."""
    return _precision(checkpoint, spec, plain_rows)


def _precision(checkpoint: Checkpoint, spec: TensorSpec, rows: _Rows) -> str:
    """Of a tensor stored as F32 rows are read until one is finer than BF16."""
    stored = checkpoint.info(spec.name).dtype
    if stored != "F32":
        return lattice.precision(np.empty(0, np.float32), stored)
    slices = row_slices(spec, 1 << 18)
    is_bf16 = all(lattice.precision(rows(checkpoint, spec, a, b), stored) == "BF16" for a, b in slices)
    return "BF16" if is_bf16 else "F32"
