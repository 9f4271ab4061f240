"""compressed-tensors checkpoints of 4-bit weights (w4a16-ct): codes and scales as they are stored.

A matrix ``X.weight`` is three tensors: ``X.weight_packed`` int32 (rows, n / 8), eight codes plus 8 in a word, the first
in the lowest bits; ``X.weight_scale`` (rows, n / group) floating point; ``X.weight_shape`` int64 (2). A weight is code
x scale with codes from -8 to 7: Q4_0's own arithmetic, so the codes go into a Q4_0 block as they are; a scale of 128
weights goes into four. Source: compressed_tensors/compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint.packed import SCALE_DTYPES, Files, Scheme, check_groups, check_part, rows_of, scale_rows
from lowbit.errors import BadConfig, BadFile, Unsupported
from lowbit.grid._int4 import Int4
from lowbit.grid.base import Blocks

KEY = "quantization_config"
GROUPS = (32, 128)
_BLOCK_GRID = "q4_0"
_PER_WORD = 8
_SUFFIXES = ("_packed", "_scale", "_shape")
_EXPECTED: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False, "actorder": None,
    "block_structure": None,
}  # fmt: skip


def scheme_of(config: Mapping[str, Any], where: object) -> CompressedTensors | None:
    """The scheme that the config describes; None where it describes none.

    Raises Unsupported for any other quantization, naming what differs, and BadConfig for a malformed description.
    """
    described = config.get(KEY)
    if described is None:
        return None
    if not isinstance(described, dict):
        raise BadConfig(f"bad value for {KEY}", where=where, found=repr(described)[:60], expected="an object")
    method, form = described.get("quant_method"), described.get("format")
    if (method, form) != ("compressed-tensors", "pack-quantized"):
        raise Unsupported(
            "this quantization is not read", where=where, found=f"{method} {form}",
            expected="compressed-tensors pack-quantized", hint="Start from the unquantized checkpoint",
        )  # fmt: skip
    for key in ("transform_config", "sparsity_config", "kv_cache_scheme"):
        if described.get(key):  # rotated or sparse weights would be read as if they were not
            raise Unsupported("this quantization is not read", where=where, found=f"{KEY}.{key}", expected="null")
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadConfig(f"{KEY} has no config_groups", where=where)
    sizes = {_group_size(name, group, where) for name, group in groups.items()}
    if len(sizes) > 1:
        raise Unsupported("this quantization is not read", where=where, found=f"groups of {sorted(sizes)}")
    return CompressedTensors(sizes.pop())


def _group_size(name: str, group: Any, where: object) -> int:
    """The group size of one of config_groups, whose weights are of the kind that is read."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise BadConfig(f"{KEY}.{name} has no weights", where=where)
    for key, expected in _EXPECTED.items():
        if weights.get(key, False if key == "dynamic" else None) != expected:
            found = f"{name}.weights.{key} = {weights.get(key)!r}"
            raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
    if group.get("input_activations") is not None:
        raise Unsupported("quantized activations are not read", where=where, found=f"{name}.input_activations")
    size = weights.get("group_size")
    if not isinstance(size, int) or size not in GROUPS:
        found, expected = f"{name}.weights.group_size = {size!r}"[:80], " or ".join(map(str, GROUPS))
        raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
    return size


class CompressedTensors(Scheme):
    """pack-quantized, 4 bits, symmetric, groups of ``group`` weights."""

    kind = "compressed-tensors"

    def __init__(self, group: int) -> None:
        self.group = group

    def matrices(self, files: Files) -> set[str]:
        ending = f".weight{_SUFFIXES[0]}"
        return {name.removesuffix(_SUFFIXES[0]) for name in files if name.endswith(ending)}

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(name + suffix for suffix in _SUFFIXES)

    def describe(self, files: Files, name: str) -> tuple[str, tuple[int, ...]]:
        part = self.parts(name)[0]
        *rows, words = files[part].entries[part].shape or (0,)
        return f"int4_g{self.group}", (*rows, words * _PER_WORD)

    def check(self, files: Files, name: str, shape: tuple[int, ...]) -> None:
        rows, n = rows_of(name, shape)
        check_groups(name, n, self.group)
        if name in files:
            raise BadFile("a matrix is stored twice, packed and as it is", where=name)
        packed, scale, stored_shape = self.parts(name)
        check_part(files, packed, ("I32",), (rows, n // _PER_WORD))
        check_part(files, scale, SCALE_DTYPES, (rows, n // self.group))
        check_part(files, stored_shape, ("I64",), (2,))
        stored = tuple(int(size) for size in files[stored_shape].raw(stored_shape).view("<i8"))
        if stored != shape:
            raise BadFile("weight_shape is not the shape", where=stored_shape, found=list(stored), expected=list(shape))

    def grid(self, files: Files, name: str) -> str:
        return f"int4_g{self.group}"

    def coded_rows(self, files: Files, name: str, start: int, stop: int) -> Blocks:
        packed, scale, _ = self.parts(name)
        grid = grids.get(self.grid(files, name))
        assert isinstance(grid, Int4)
        raw = files[packed].read_rows(packed, start, stop)
        codes = grid.unpack_codes(raw.reshape(len(raw), -1, self.group // 2))
        return Blocks(codes=codes, scales=scale_rows(files, scale, start, stop))

    def block_grid(self) -> str:
        return _BLOCK_GRID

    def block_rows(self, files: Files, name: str, start: int, stop: int) -> np.ndarray:
        """Q4_0 blocks of the same codes, on the scales rounded to float16.

        bfloat16 scales from 2^-17 to 65504 are float16 numbers as they are. Raises BadFile where one is beyond float16.
        """
        grid, coded = grids.get(_BLOCK_GRID), self.coded_rows(files, name, start, stop)
        with np.errstate(over="ignore"):
            scales = np.asarray(coded.scales).astype(np.float16)
        if not np.isfinite(scales).all():
            raise BadFile("a scale is NaN, Inf or beyond float16", where=self.parts(name)[1])
        codes = coded.codes.reshape(len(scales), -1, grid.block_size)
        return grid.pack(Blocks(codes=codes, scales=np.repeat(scales, self.group // grid.block_size, axis=1)))
