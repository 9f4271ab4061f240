"""The comparison behind a certificate: every block of a packed file against the source's values, a slice at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import console
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import LowbitError
from lowbit.grid.base import Grid
from lowbit.pack import identify, lattice
from lowbit.pack.rows import file_rows, precision_of, row_slices
from lowbit.threads import in_order

_SLICE_WEIGHTS = 1 << 18  # decoded and compared at a time
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True)
class TensorProof:
    """What is proved of one tensor.

    name: Hugging Face's; of a tensor that only the artifact has, GGUF's. type: the artifact's, 'q4_0'. source_dtype: as
    the source stores it; rounded_to: the dtype in which the two are compared ('BF16' also for F32 that holds nothing
    finer). grid: the lattice that the source's values sit on, found in a sample of rows; 'none'; None for a vector.
    blocks = exact + within_scale_rounding + off_lattice, counted in the artifact's own blocks; a tensor of floats is
    counted in rows. max_error: the largest |artifact - source| of a weight in the blocks that are not exact.
    note: why a tensor was not compared; its blocks are 0 then.
    """

    name: str
    type: str
    source_dtype: str | None = None
    rounded_to: str | None = None
    grid: str | None = None
    blocks: int = 0
    exact: int = 0
    within_scale_rounding: int = 0
    off_lattice: int = 0
    max_error: float = 0.0
    note: str | None = None


def prove_tensors(file: GgufFile, source: Checkpoint, label: str, threads: int) -> list[TensorProof]:
    """The proof of every tensor of ``source``, in its order. ``file`` has them all, in the source's shapes; errors call
    it ``label``. Raises BadFile on NaN or Inf in either."""
    tensors = [_Tensor(file, source, spec, f"{label}: {spec.gguf_name}") for spec in source.specs.values()]
    jobs = (job for tensor in tensors for job in tensor.jobs())
    with (
        console.progress("Proving", source.n_weights, "weights") as bar,
        contextlib.closing(in_order(jobs, threads)) as finished,
    ):
        for found in finished:
            found.tensor.add(found)
            bar.advance(found.n_weights)
    return [tensor.proof() for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one job found of a tensor: blocks by status, the largest error; or the lattice."""

    tensor: _Tensor
    n_weights: int = 0
    counts: np.ndarray | int = 0
    max_error: float = 0.0
    grid: str | None = None


class _Tensor:
    """One tensor at work: how it is compared, and what its slices have shown so far."""

    def __init__(self, file: GgufFile, source: Checkpoint, spec: TensorSpec, where: str) -> None:
        self.file, self.source, self.spec, self.where = file, source, spec, where
        self.stored_type, self.info = file.entries[spec.gguf_name].dtype, source.info(spec.name)
        self.counts, self.max_error = np.zeros(3, np.int64), 0.0
        self.grid: Grid | None = None
        self.lattice: str | None = None
        self.dtype = ""
        with contextlib.suppress(LowbitError):
            self.grid = grids.by_ggml_type(GGMLQuantizationType[self.stored_type])

    def jobs(self) -> Iterator[Callable[[], _Found]]:
        if self.grid is None:
            return
        self.dtype = precision_of(self.source, self.spec)
        if len(self.spec.gguf_shape) > 1:
            yield self._identify
        for start, stop in row_slices(self.spec, _SLICE_WEIGHTS):
            yield partial(self._compare, self.grid, start, stop)

    def add(self, found: _Found) -> None:
        self.counts += found.counts
        self.max_error = max(self.max_error, found.max_error)
        self.lattice = found.grid or self.lattice

    def proof(self) -> TensorProof:
        name, kind, dtype = self.spec.name, self.stored_type.lower(), self.info.dtype
        if self.grid is None:
            note = f"lowbit cannot decode {kind}: not compared"
            return TensorProof(name=name, type=kind, source_dtype=dtype, note=note)
        return TensorProof(
            name=name,
            type=self.grid.name,
            source_dtype=dtype,
            rounded_to=self.dtype,
            grid=self.lattice,
            blocks=int(self.counts.sum()),
            exact=int(self.counts[lattice.EXACT]),
            within_scale_rounding=int(self.counts[lattice.WITHIN_SCALE_ROUNDING]),
            off_lattice=int(self.counts[lattice.OFF_LATTICE]),
            max_error=self.max_error,
        )

    def _compare(self, grid: Grid, start: int, stop: int) -> _Found:
        values = file_rows(self.source, self.spec, start, stop)
        raw = self.file.read_rows(self.spec.gguf_name, start, stop)
        status, error = _compare(values, raw, grid, self.dtype, self.where)
        counts = np.bincount(status.reshape(-1), minlength=3)
        return _Found(tensor=self, n_weights=values.size, counts=counts, max_error=error)

    def _identify(self) -> _Found:
        stored = self.info.dtype
        if stored not in _FLOATS:
            return _Found(tensor=self, grid=f"stored as {stored.lower()}")
        picked = identify.sample(self.spec.gguf_n_rows, self.spec.gguf_shape[-1])
        values = np.concatenate([file_rows(self.source, self.spec, row, row + 1) for row in picked])
        return _Found(tensor=self, grid=identify.describe(values, stored))


def _compare(values: np.ndarray, raw: np.ndarray, grid: Grid, dtype: str, where: str) -> tuple[np.ndarray, float]:
    """Statuses (rows, n_blocks) of stored bytes (rows, row_bytes), and the largest error outside of exact blocks."""
    blocks = grid.unpack(raw)
    if blocks.scales is not None:
        grids.check_finite(blocks.scales, where)
    stored = grid.dequantize(blocks)
    grids.check_finite(stored, where)
    if grid.has_scales:
        status = lattice.judge(values, blocks, dtype)
    else:
        size = grid.block_size if grid.block_size > 1 else values.shape[1]
        same = (lattice.round_to(stored, dtype) == values).reshape(len(values), -1, size).all(-1)
        status = np.where(same, lattice.EXACT, lattice.OFF_LATTICE)
    wrong = status != lattice.EXACT
    if not wrong.any():
        return status, 0.0
    shape = (*status.shape, -1)
    differences = stored.reshape(shape)[wrong].astype(np.float64) - values.reshape(shape)[wrong]
    return status, float(np.abs(differences).max())
