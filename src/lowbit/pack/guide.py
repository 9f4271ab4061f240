"""What tells the packer which errors matter: an importance matrix or a calibration. Both are one of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadOption
from lowbit.grid.base import Grid

# From (start, stop) to what the file has of these rows: (stop - start, row_bytes) uint8. Any thread may call it, for
# any rows in any order.
Encoder = Callable[[int, int], np.ndarray]


class Guide(Protocol):
    """Measured on the model that is packed, and checked to be of it."""

    @property
    def identity(self) -> Any:
        """JSON that tells this guide from another, for a packing that goes on."""

    def fields(self) -> Sequence[Field]:
        """What a GGUF says of it."""

    def encoder(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Encoder | None:
        """How a tensor without codes of its own becomes bytes; None: as without a guide. naive: by ggml's rule."""

    def rows_at_least(self, spec: TensorSpec) -> int:
        """How many rows an encoder should be asked for at a time."""


class Either:
    """Two guides of one model: a tensor is rounded by the ``first`` if it knows how, else by the ``second``."""

    def __init__(self, first: Guide, second: Guide) -> None:
        self._first, self._second = first, second

    @property
    def identity(self) -> list[object]:
        return [self._first.identity, self._second.identity]

    def fields(self) -> list[Field]:
        return [*self._first.fields(), *self._second.fields()]

    def encoder(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Encoder | None:
        found = self._first.encoder(checkpoint, spec, grid, naive=naive)
        return found if found is not None else self._second.encoder(checkpoint, spec, grid, naive=naive)

    def rows_at_least(self, spec: TensorSpec) -> int:
        return max(self._first.rows_at_least(spec), self._second.rows_at_least(spec))


def refuse(guide: Guide | None, container: str) -> None:
    """For containers whose rounding no guide knows. Raises BadOption where there is one."""
    if guide is not None:
        raise BadOption("only GGUF is rounded by an imatrix or a calibration", found=container, hint="Leave it out")
