"""The comparison behind a certificate: every block of an artifact against the source's values, a slice at a time."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import console
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadFile, LowbitError
from lowbit.grid._mlx_affine import MlxAffine
from lowbit.grid.base import Blocks, Grid
from lowbit.pack import identify, lattice
from lowbit.pack.rows import file_rows, plain_precision_of, plain_rows, precision_of, row_slices
from lowbit.threads import in_order

_SLICE_WEIGHTS = 1 << 19  # decoded and compared at a time
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


def prove_tensors(tensors: Sequence[Tensor], n_weights: int, threads: int) -> list[TensorProof]:
    """The proof of each tensor; ``n_weights`` is how many they have together. Raises BadFile on NaN or Inf."""
    jobs = (job for tensor in tensors for job in tensor.jobs())
    with (
        console.progress("Proving", n_weights, "weights") as bar,
        contextlib.closing(in_order(jobs, threads)) as finished,
    ):
        for found in finished:
            found.tensor.add(found)
            bar.advance(found.n_weights)
    return [tensor.proof() for tensor in tensors]


def prove_computed(file: GgufFile, name: str, values: np.ndarray, where: str) -> TensorProof:
    """The proof of a tensor that the source's config gives (rotary frequencies). Raises BadFile where the file does not
    have it in F32 and this shape."""
    entry = file.entries.get(name)
    if entry is None or entry.dtype != "F32" or entry.shape != values.shape:
        found = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
        raise BadFile("not what the source's config gives", where=where, found=found, expected=f"F32 {[*values.shape]}")
    grid, n_rows = grids.get("f32"), math.prod(values.shape[:-1])
    stored = grid.unpack(file.read_rows(name, 0, n_rows))
    status, error = _compare(values.reshape(n_rows, -1), stored, grid, "F32", where)
    exact = int((status == lattice.EXACT).sum())
    return TensorProof(
        name=name, type="f32", source_dtype="computed", rounded_to="F32",
        blocks=status.size, exact=exact, off_lattice=status.size - exact, max_error=error,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one job found of a tensor: blocks by status, the largest error; or the lattice."""

    tensor: Tensor
    n_weights: int = 0
    counts: np.ndarray | int = 0
    max_error: float = 0.0
    grid: str | None = None


class Tensor(ABC):
    """One tensor at work: how it is compared, and what its slices have shown so far.

    kind: the artifact's type of it. grid: that type's, None where lowbit has none. where: what errors call it.
    """

    def __init__(self, source: Checkpoint, spec: TensorSpec, where: str, kind: str, grid: Grid | None) -> None:
        self.source, self.spec, self.where, self.kind, self.grid = source, spec, where, kind, grid
        self.info = source.info(spec.name)
        self.counts, self.max_error = np.zeros(3, np.int64), 0.0
        self.lattice: str | None = None
        self.dtype = ""

    @abstractmethod
    def values(self, start: int, stop: int) -> np.ndarray:
        """Rows of the source's values in the artifact's layout, float32 (stop - start, n)."""

    @abstractmethod
    def precision(self) -> str:
        """What all of ``values`` are rounded to: 'BF16', 'F16' or 'F32'."""

    @abstractmethod
    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows of what the artifact stores."""

    def jobs(self) -> Iterator[Callable[[], _Found]]:
        if self.grid is None:
            return
        self.dtype = self.precision()
        if len(self.spec.gguf_shape) > 1:
            yield self._identify
        for start, stop in row_slices(self.spec, _SLICE_WEIGHTS):
            yield partial(self._compare, self.grid, start, stop)

    def add(self, found: _Found) -> None:
        self.counts += found.counts
        self.max_error = max(self.max_error, found.max_error)
        self.lattice = found.grid or self.lattice

    def proof(self) -> TensorProof:
        name, kind, dtype = self.spec.name, self.kind, self.info.dtype
        if self.grid is None:
            note = f"lowbit cannot decode {kind}: not compared"
            return TensorProof(name=name, type=kind, source_dtype=dtype, note=note)
        return TensorProof(
            name=name,
            type=self.kind,
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
        values = self.values(start, stop)
        status, error = _compare(values, self.blocks(start, stop), grid, self.dtype, self.where)
        counts = np.bincount(status.reshape(-1), minlength=3)
        return _Found(tensor=self, n_weights=values.size, counts=counts, max_error=error)

    def _identify(self) -> _Found:
        stored = self.info.dtype
        if stored not in _FLOATS:
            return _Found(tensor=self, grid=f"stored as {stored.lower()}")
        picked = identify.sample(self.spec.gguf_n_rows, self.spec.gguf_shape[-1])
        values = np.concatenate([self.values(row, row + 1) for row in picked])
        return _Found(tensor=self, grid=identify.describe(values, stored))


class GgufTensor(Tensor):
    """A tensor of a GGUF, in whose shape and order the source's values are compared."""

    def __init__(self, file: GgufFile, source: Checkpoint, spec: TensorSpec, label: str) -> None:
        kind, grid = file.entries[spec.gguf_name].dtype, None
        with contextlib.suppress(LowbitError):
            grid = grids.by_ggml_type(GGMLQuantizationType[kind])
        super().__init__(source, spec, f"{label}: {spec.gguf_name}", kind.lower(), grid)
        self.file = file

    def values(self, start: int, stop: int) -> np.ndarray:
        return file_rows(self.source, self.spec, start, stop)

    def precision(self) -> str:
        return precision_of(self.source, self.spec)

    def blocks(self, start: int, stop: int) -> Blocks:
        assert self.grid is not None
        return self.grid.unpack(self.file.read_rows(self.spec.gguf_name, start, stop))


class FolderTensor(Tensor):
    """A tensor of a folder, MLX's or compressed-tensors': in Hugging Face's layout, as the source's."""

    def __init__(self, folder: Checkpoint, source: Checkpoint, spec: TensorSpec, label: str) -> None:
        kind = folder.info(spec.name).dtype.lower()
        coded = folder.coded_rows(spec.name, 0, 1)
        if coded is not None:
            kind = coded[0]
        super().__init__(source, spec, f"{label}: {spec.name}", kind, grids.get(kind) if kind != "f64" else None)
        self.folder, self._is_coded = folder, coded is not None

    def values(self, start: int, stop: int) -> np.ndarray:
        return plain_rows(self.source, self.spec, start, stop)

    def precision(self) -> str:
        return plain_precision_of(self.source, self.spec)

    def blocks(self, start: int, stop: int) -> Blocks:
        coded = self.folder.coded_rows(self.spec.name, start, stop) if self._is_coded else None
        if coded is not None:
            return coded[1]
        assert self.grid is not None
        values = self.folder.read_rows(self.spec.name, start, stop)
        grids.check_finite(values, self.where)
        return self.grid.quantize(values)


class LiteRtTensor(FolderTensor):
    """A tensor of a .litertlm: in Hugging Face's layout, and norms with what their family adds to them."""

    def __init__(self, file: Checkpoint, source: Checkpoint, spec: TensorSpec, label: str) -> None:
        super().__init__(file, source, spec, label)
        self._offset = np.float32(source.family.decoder(source.config).norm_offset if spec.role == "norm" else 0)

    def values(self, start: int, stop: int) -> np.ndarray:
        values = super().values(start, stop)
        return values + self._offset if self._offset else values

    def precision(self) -> str:
        return "F32" if self._offset else super().precision()

    def blocks(self, start: int, stop: int) -> Blocks:
        stored = self.folder.stored_rows(self.spec.name, start, stop)
        if stored is None:
            return super().blocks(start, stop)
        assert self.grid is not None
        grids.check_finite(stored, self.where)
        return self.grid.quantize(stored)


def _compare(values: np.ndarray, blocks: Blocks, grid: Grid, dtype: str, where: str) -> tuple[np.ndarray, float]:
    """Statuses (rows, n_blocks) of what is stored, and the largest error outside of exact blocks."""
    if blocks.scales is not None:
        grids.check_finite(blocks.scales, where)
    if grid.has_scales:
        status = lattice.judge(values, blocks, dtype)
        if (status == lattice.EXACT).all():
            return status, 0.0
    stored = grid.dequantize(blocks)
    if not grid.has_scales or np.asarray(blocks.scales).dtype != np.float16:
        grids.check_finite(stored, where)
    if not grid.has_scales:
        size = grid.block_size if grid.block_size > 1 else values.shape[1]
        same = (lattice.round_to(stored, dtype) == values).reshape(len(values), -1, size).all(-1)
        status = np.where(same, lattice.EXACT, lattice.OFF_LATTICE).astype(np.uint8)
        if isinstance(grid, MlxAffine):
            _add_rounded_scales(status, values, blocks, grid, dtype)
    wrong = status != lattice.EXACT
    if not wrong.any():
        return status, 0.0
    shape = (*status.shape, -1)
    if wrong.all():
        return status, _largest(stored, values)
    return status, _largest(stored.reshape(shape)[wrong], values.reshape(shape)[wrong])


def _largest(stored: np.ndarray, values: np.ndarray) -> float:
    """The largest difference, exact: float64."""
    return float(np.abs(np.subtract(stored, values, dtype=np.float64)).max())


def _add_rounded_scales(status: np.ndarray, values: np.ndarray, blocks: Blocks, grid: MlxAffine, dtype: str) -> None:
    """Of MLX's symmetric groups that are not exact: those with the right codes on a scale that had to be rounded."""
    assert blocks.scales is not None and blocks.mins is not None
    scales = blocks.scales.astype(np.float32)
    off = (status != lattice.EXACT) & (blocks.mins == scales * np.float32(-grid.zero))
    codes = (blocks.codes[off].astype(np.int16) - grid.zero).astype(np.int8)
    w = values.reshape(*status.shape, -1)[off]
    judged = lattice.judge(w, Blocks(codes=codes[:, None], scales=scales[off][:, None]), dtype)[:, 0]
    status[off] = np.minimum(judged, lattice.WITHIN_SCALE_ROUNDING)
