"""A tensor's rows as the artifact means them, some at a time: in the file's order, its offset added, and finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.tensor_file import pick_rows
from lowbit.pack import lattice


def file_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows of the tensor seen as (rows, n), a vector as one row: float32 (stop - start, n). Raises BadFile on NaN or
    Inf."""
    is_vector = len(spec.shape) == 1
    values = pick_rows(
        spec.gguf_rows(), start, stop, lambda a, b: checkpoint.read_rows(spec.name, a, b), of_vector=is_vector
    )
    if spec.gguf_offset:
        values += np.float32(spec.gguf_offset)
    grids.check_finite(values, f"{checkpoint.path}: {spec.name}")
    return values


def row_slices(spec: TensorSpec, weights: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices of about ``weights`` weights, at least a row; whole heads where the file reorders rows
    within a head, so that none is read twice."""
    rows = spec.n_rows
    unit = rows // spec.heads if spec.heads and len(spec.shape) > 1 else 1
    step = max(1, weights // (spec.shape[-1] * unit)) * unit
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def matrix_slices(spec: TensorSpec, matrices: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, start, stop) of the parts of rows ``start`` to ``stop`` that lie in one of the stacked matrices each."""
    height = spec.n_rows // matrices
    while start < stop:
        end = min(stop, (start // height + 1) * height)
        yield start // height, start, end
        start = end


def plain_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """The same in Hugging Face's own order and values."""
    values = checkpoint.read_rows(spec.name, start, stop)
    grids.check_finite(values, f"{checkpoint.path}: {spec.name}")
    return values


def precision_of(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """What ``file_rows`` are rounded to: 'BF16', 'F16' or 'F32'; after an offset it is F32."""
    return "F32" if spec.gguf_offset else plain_precision_of(checkpoint, spec)


def plain_precision_of(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """What ``plain_rows`` are rounded to. Of a tensor stored as F32 rows are read until one is finer than BF16."""
    stored = checkpoint.info(spec.name).dtype
    if stored != "F32":
        return lattice.precision(np.empty(0, np.float32), stored)
    slices = row_slices(spec, 1 << 18)
    is_bf16 = all(lattice.precision(checkpoint.read_rows(spec.name, a, b), stored) == "BF16" for a, b in slices)
    return "BF16" if is_bf16 else "F32"
