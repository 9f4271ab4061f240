"""Rounding under an importance matrix: the guide of the packer that ``imatrix`` is read for."""

from __future__ import annotations

import numpy as np

from lowbit import ggml
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import Field
from lowbit.grid.base import Grid
from lowbit.pack import lattice, scale_search
from lowbit.pack.guide import Encoder
from lowbit.pack.imatrix import Imatrix
from lowbit.pack.rows import file_rows, matrix_slices, precision_of


class Weighted:
    """A guide (see ``guide``) that weighs the error of a weight with the mean square of its input.

    Raises BadFile where the matrix is not of this checkpoint.
    """

    def __init__(self, imatrix: Imatrix, checkpoint: Checkpoint) -> None:
        imatrix.check_model(checkpoint)
        self._imatrix = imatrix

    @property
    def identity(self) -> list[object]:
        return ["imatrix", self._imatrix.sha256]

    def fields(self) -> list[Field]:
        return self._imatrix.fields()

    def rows_at_least(self, spec: TensorSpec) -> int:
        return 1

    def encoder(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Encoder | None:
        """None for a weight that the matrix lacks. An expert is rounded under its own inputs."""
        found = self._imatrix.importance_of(spec.gguf_name, spec.shape) if grid.block_size > 1 else None
        if found is None:
            return None
        importance = found
        dtype = precision_of(checkpoint, spec) if grid.has_scales and not naive else ""

        def of_one_matrix(matrix: int, start: int, stop: int) -> np.ndarray:
            values = file_rows(checkpoint, spec, start, stop)
            if naive or not grid.has_scales:
                return ggml.quantize(values, ggml.type_of(grid), importance[matrix], checked=True)
            blocks, status = lattice.recover(values, dtype, grid)
            # What lies on a lattice loses nothing there, whatever matters more.
            off = status == lattice.OFF_LATTICE
            return grid.pack(scale_search.search(values, importance[matrix], grid, blocks, off))

        def encode(start: int, stop: int) -> np.ndarray:
            parts = matrix_slices(spec, len(importance), start, stop)
            return np.concatenate([of_one_matrix(*part) for part in parts])

        return encode
