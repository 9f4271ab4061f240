"""What is proved of a folder, MLX's or compressed-tensors', against the checkpoint that it was made from.

Both are read as checkpoints: a folder's tensors have Hugging Face's names, layout and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.errors import BadFile
from lowbit.grid._mlx_affine import MlxAffine
from lowbit.grid.base import Blocks, Grid
from lowbit.pack import lattice, model_folder

_SAME_SOURCE = "Is it made from this source?"


@dataclass(frozen=True, kw_only=True)
class Counted:
    """type: the artifact's. rounded_to: the dtype in which the two were compared. counts: blocks by status, (3,).
    max_error: the largest difference of a weight in blocks that are not exact."""

    type: str
    rounded_to: str
    counts: np.ndarray
    max_error: float


def check(artifact: Checkpoint, source: Checkpoint) -> None:
    """Raises BadFile where the folder is of another model than ``source``."""
    theirs, ours = artifact.family.arch, source.family.arch
    if theirs != ours:
        raise BadFile("not the source's model", where=artifact.path, found=theirs, expected=ours)
    for spec in source.specs.values():
        found, where = artifact.specs.get(spec.name), f"{artifact.path}: {spec.name}"
        if found is None:
            raise BadFile("a tensor of the source is missing", where=where, hint=_SAME_SOURCE)
        if found.shape != spec.shape:
            raise BadFile(
                "not the source's shape", where=where, found=list(found.shape), expected=list(spec.shape),
                hint=_SAME_SOURCE,
            )  # fmt: skip


def count(artifact: Checkpoint, source: Checkpoint, spec: TensorSpec) -> Counted:
    """Compares one tensor, a slice of rows at a time. Raises BadFile where the artifact has NaN or Inf."""
    dtype = model_folder.precision_of(source, spec)
    counts, max_error, kind = np.zeros(3, np.int64), 0.0, artifact.info(spec.name).dtype.lower()
    for start, stop in model_folder.slices(spec):
        values = model_folder.values(source, spec, start, stop)
        coded = artifact.coded_rows(spec.name, start, stop)
        if coded is None:
            stored = model_folder.values(artifact, spec, start, stop)
            status = _same(values, stored, values.shape[1], dtype)
        else:
            kind = coded[0]
            grid, where = grids.get(kind), f"{artifact.path}: {spec.name}"
            grids.check_finite(coded[1].scales, where)
            stored = grid.dequantize(coded[1])
            grids.check_finite(stored, where)
            status = _judged(values, stored, coded[1], grid, dtype)
        counts += np.bincount(status.reshape(-1), minlength=3)
        wrong = status != lattice.EXACT
        if wrong.any():
            shape = (*status.shape, -1)
            differences = stored.reshape(shape)[wrong].astype(np.float64) - values.reshape(shape)[wrong]
            max_error = max(max_error, float(np.abs(differences).max()))
    return Counted(type=kind, rounded_to=dtype, counts=counts, max_error=max_error)


def _judged(values: np.ndarray, stored: np.ndarray, blocks: Blocks, grid: Grid, dtype: str) -> np.ndarray:
    """Statuses (rows, n_blocks) of codes and scales as they are stored."""
    if grid.has_scales:
        return lattice.judge(values, blocks, dtype)
    status = _same(values, stored, grid.block_size, dtype)
    if isinstance(grid, MlxAffine):
        assert blocks.scales is not None and blocks.mins is not None
        scales = blocks.scales.astype(np.float32)
        # A symmetric group that is off may have the lattice's codes on a scale that 16 bits had to round.
        off = (status != lattice.EXACT) & (blocks.mins == scales * np.float32(-grid.zero))
        codes = (blocks.codes[off].astype(np.int16) - grid.zero).astype(np.int8)
        w = values.reshape(*status.shape, -1)[off]
        judged = lattice.judge(w, Blocks(codes=codes[:, None], scales=scales[off][:, None]), dtype)[:, 0]
        status[off] = np.minimum(judged, lattice.WITHIN_SCALE_ROUNDING)
    return status


def _same(values: np.ndarray, stored: np.ndarray, size: int, dtype: str) -> np.ndarray:
    """EXACT or OFF_LATTICE (rows, n / size): whether ``stored``, rounded to ``dtype``, is what the source has."""
    same = (lattice.round_to(stored, dtype) == values).reshape(len(values), -1, size).all(-1)
    return np.where(same, lattice.EXACT, lattice.OFF_LATTICE).astype(np.uint8)
