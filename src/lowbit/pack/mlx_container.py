"""The MLX container: a folder that mlx-lm loads, with affine codes in groups.

A matrix on a lattice keeps its codes: a group of code x scale, codes from -8 to 7, is stored exactly as scale d and
bias -8 d; groups off the lattice, and all with ``naive``, get MLX's own rounding. Source: save_model, quantize_model
and load_model in mlx_lm/utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.mlx_affine import modules_of, stored_parts
from lowbit.errors import Unsupported
from lowbit.grid._mlx_affine import MlxAffine
from lowbit.grid.base import Blocks
from lowbit.pack import lattice, model_folder
from lowbit.pack.guide import Guide, refuse
from lowbit.pack.model_folder import Part
from lowbit.pack.rows import plain_precision_of, plain_rows

RECIPE = "mlx_affine4_g32"
_FLOATS = ("f32", "f16", "bf16")


def holds(grid: str) -> bool:
    return grid in _FLOATS or isinstance(grids.get(grid), MlxAffine)


def write(
    checkpoint: Checkpoint,
    types: Mapping[str, str],
    out: Path,
    *,
    file_type: str,
    naive: bool,
    threads: int | None = None,
    guide: Guide | None = None,
    check: Callable[[Path], None] | None = None,
) -> int:
    """See containers.Container. Vectors and other tensors on 'f32' lie in 16 bits where nothing of them is lost."""
    refuse(guide, "MLX")
    quantized = {name: grid for name, kind in types.items() if isinstance(grid := grids.get(kind), MlxAffine)}
    _check_shapes(checkpoint, quantized)
    preferred = model_folder.preferred_dtype(checkpoint, tuple(quantized))

    def parts_of(spec: TensorSpec) -> Iterator[Part]:
        if spec.name not in quantized:
            yield model_folder.float_part(checkpoint, spec, types[spec.name], preferred)
            return
        grid = quantized[spec.name]
        yield from _parts(spec, grid, _coded(checkpoint, spec, grid, naive=naive, threads=threads), preferred)

    return model_folder.write(
        checkpoint,
        out,
        config=_config(checkpoint, quantized, preferred),
        parts_of=parts_of,
        names_of=lambda spec: _names(spec) if spec.name in quantized else (spec.name,),
        written_by="mlx",
        asked={"types": dict(types), "naive": naive},
        check=check,
    )


def _check_shapes(checkpoint: Checkpoint, quantized: Mapping[str, MlxAffine]) -> None:
    for name, grid in quantized.items():
        spec = checkpoint.specs[name]
        if spec.shape[-1] % grid.block_size:
            raise Unsupported(
                f"rows are not a multiple of {grid.block_size}, which {grid.name} needs",
                where=spec.name, found=spec.shape[-1], hint="Choose a float recipe such as f16",
            )  # fmt: skip


def _config(checkpoint: Checkpoint, quantized: Mapping[str, MlxAffine], preferred: str) -> dict[str, Any]:
    config = checkpoint.family.mlx_config(checkpoint.config) | {"tie_word_embeddings": checkpoint.tied}
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "_name_or_path")}
    config["dtype"] = model_folder.CONFIG_DTYPES[preferred]
    if quantized:
        kinds = [(grid.block_size, grid.bits) for grid in quantized.values()]
        most = max(set(kinds), key=kinds.count)
        described: dict[str, Any] = {"group_size": most[0], "bits": most[1], "mode": "affine"}
        for name, (group, bits) in zip(quantized, kinds, strict=True):
            for module in modules_of(name) if (group, bits) != most else ():
                described[module] = {"group_size": group, "bits": bits, "mode": "affine"}
        # The second spelling is what model hubs look at.
        config |= {"quantization": described, "quantization_config": described}
    return dict(sorted(config.items()))


def _names(spec: TensorSpec) -> tuple[str, ...]:
    return tuple(part for module in modules_of(spec.name) for part in stored_parts(module))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Coded rows of a matrix: codes' bytes; float32 scales and mins (rows, n_groups); which groups must keep theirs as
    they are, bool (rows, n_groups)."""

    words: np.ndarray
    scales: np.ndarray
    mins: np.ndarray
    exact: np.ndarray


def _coded(
    checkpoint: Checkpoint, spec: TensorSpec, grid: MlxAffine, *, naive: bool, threads: int | None
) -> list[_Group]:
    """The matrix in slices of rows: the source's own codes, those found again in its values, or MLX's rounding."""
    own = not naive and _as_affine(checkpoint, spec, grid, 0, 1) is not None
    dtype = "F32" if own or naive else plain_precision_of(checkpoint, spec)

    def encode(start: int, stop: int) -> _Group:
        blocks = _as_affine(checkpoint, spec, grid, start, stop) if own else None
        if blocks is not None:
            grids.check_finite(blocks.scales, f"{checkpoint.path}: {spec.name}")
            grids.check_finite(blocks.mins, f"{checkpoint.path}: {spec.name}")
            exact = np.ones(np.asarray(blocks.scales).shape, bool)
        else:
            blocks, exact = _rounded(plain_rows(checkpoint, spec, start, stop), grid, dtype, naive=naive)
        words = grid.pack_codes(blocks.codes).reshape(len(exact), -1)
        assert blocks.scales is not None and blocks.mins is not None
        scales, mins = blocks.scales.astype(np.float32), blocks.mins.astype(np.float32)
        return _Group(words=words, scales=scales, mins=mins, exact=exact)

    return model_folder.each_slice(spec, encode, threads)


def _parts(spec: TensorSpec, grid: MlxAffine, found: list[_Group], preferred: str) -> Iterator[Part]:
    kept = [part[group.exact] for group in found for part in (group.scales, group.mins)]
    others = [part[~group.exact] for group in found for part in (group.scales, group.mins)]
    dtype = model_folder.scale_dtype(kept, others, preferred)
    n_groups = spec.shape[-1] // grid.block_size
    n_words = n_groups * grid.block_size * grid.bits // 32
    words, scales, biases = (
        [group.words for group in found],
        [model_folder.as_bytes(group.scales, dtype) for group in found],
        [model_folder.as_bytes(group.mins, dtype) for group in found],
    )
    modules = modules_of(spec.name)
    for i, module in enumerate(modules):
        for name, kind, width, arrays in zip(
            stored_parts(module),
            ("U32", dtype, dtype),
            (n_words, n_groups, n_groups),
            (words, scales, biases),
            strict=True,
        ):
            *lead, rows = spec.shape[:-1]
            shape = (*lead, rows // len(modules), width)
            if len(modules) > 1:  # each expert's rows are shared out
                shared = np.concatenate(arrays).reshape(*lead, len(modules), -1)[:, i]
                yield Part(name=name, dtype=kind, shape=shape, arrays=[shared])
            else:
                yield Part(name=name, dtype=kind, shape=shape, arrays=arrays)


def _rounded(rows: np.ndarray, grid: MlxAffine, dtype: str, *, naive: bool) -> tuple[Blocks, np.ndarray]:
    """MLX's rounding of ``rows``, on float32 scales; the lattice's codes and scales in the groups that are on one."""
    blocks = grid.quantize(rows, "F32")
    if naive:
        return blocks, np.zeros(np.asarray(blocks.scales).shape, bool)
    found, status = lattice.recover(rows, dtype, grid.symmetric)
    exact = status != lattice.OFF_LATTICE
    ours = symmetric_blocks(grid, found)
    merged = Blocks(
        codes=np.where(exact[..., None], ours.codes, blocks.codes),
        scales=np.where(exact, ours.scales, blocks.scales),
        mins=np.where(exact, ours.mins, blocks.mins),
    )
    return merged, exact


def symmetric_blocks(grid: MlxAffine, blocks: Blocks) -> Blocks:
    """Codes from ``-grid.zero`` up times a scale, as the same values on ``grid``: scale d and bias -zero x d, exact."""
    assert blocks.scales is not None
    scales = blocks.scales.astype(np.float32)
    codes = (blocks.codes.astype(np.int16) + grid.zero).astype(np.uint8)
    return Blocks(codes=codes, scales=scales, mins=scales * np.float32(-grid.zero))


def _as_affine(checkpoint: Checkpoint, spec: TensorSpec, grid: MlxAffine, start: int, stop: int) -> Blocks | None:
    """The source's own codes and scales where ``grid`` holds them as they are, else None."""
    coded = checkpoint.coded_rows(spec.name, start, stop)
    if coded is None:
        return None
    source, blocks = grids.get(coded[0]), coded[1]
    if source.name == grid.name:
        return blocks
    times, rest = divmod(source.block_size, grid.block_size)
    if rest or blocks.scales is None or blocks.sub_scales is not None:
        return None
    if source.has_scales and -grid.zero <= source.min_code and source.max_code < grid.zero:
        blocks = symmetric_blocks(grid, blocks)
    elif blocks.mins is None or (source.top if isinstance(source, MlxAffine) else source.max_code) > grid.top:
        return None
    shape = (stop - start, spec.shape[-1] // grid.block_size, grid.block_size)
    scales, mins = (np.repeat(np.asarray(part), times, axis=-1) for part in (blocks.scales, blocks.mins))
    return Blocks(codes=blocks.codes.reshape(shape).view(np.uint8), scales=scales, mins=mins)
