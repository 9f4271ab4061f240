"""compressed-tensors checkpoints of 4-bit weights (w4a16-ct): codes and scales as they are stored.

A matrix ``X.weight`` is three tensors: ``X.weight_packed`` int32 (rows, n / 8), eight codes plus 8 in a word, the first
in the lowest bits; ``X.weight_scale`` (rows, n / 32) floating point; ``X.weight_shape`` int64 (2). A weight is code x
scale with codes from -8 to 7: Q4_0's own arithmetic, so the codes go into a Q4_0 block as they are. Source:
compressed_tensors/compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import safetensors_file
from lowbit.checkpoint.safetensors_file import Entry, SafetensorsFile
from lowbit.errors import BadConfig, BadFile, Unsupported
from lowbit.grid.base import Blocks

KEY = "quantization_config"
GRID = "q4_0"
_GROUP = 32
_PER_WORD = 8
_SUFFIXES = ("_packed", "_scale", "_shape")
_EXPECTED: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP, "dynamic": False,
    "actorder": None, "block_structure": None,
}  # fmt: skip


def check_scheme(config: Mapping[str, Any], where: object) -> bool:
    """Whether the config says that weights are stored this way; False where they are not quantized.

    Raises Unsupported for any other quantization, naming what differs, and BadConfig for a malformed description.
    """
    described = config.get(KEY)
    if described is None:
        return False
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
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise BadConfig(f"{KEY}.{name} has no weights", where=where)
        for key, expected in _EXPECTED.items():
            if weights.get(key, False if key == "dynamic" else None) != expected:
                found = f"{name}.weights.{key} = {weights.get(key)!r}"
                raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
        if group.get("input_activations") is not None:
            raise Unsupported("quantized activations are not read", where=where, found=f"{name}.input_activations")
    return True


def matrices(files: Mapping[str, SafetensorsFile]) -> set[str]:
    """The names of the matrices that are stored in parts."""
    ending = f".weight{_SUFFIXES[0]}"
    return {name.removesuffix(_SUFFIXES[0]) for name in files if name.endswith(ending)}


def parts(name: str) -> tuple[str, ...]:
    """The stored names of one matrix: its codes, its scales, its shape."""
    return tuple(name + suffix for suffix in _SUFFIXES)


def check_parts(files: Mapping[str, SafetensorsFile], name: str, shape: tuple[int, ...]) -> None:
    """Raises BadFile where the parts of a matrix are not there in the sizes that ``shape`` gives."""
    if len(shape) != 2:
        raise BadFile("a tensor that is no matrix is stored packed", where=parts(name)[0])
    rows, n = shape
    if n % _GROUP:
        raise Unsupported("rows are not whole groups", where=name, found=n, expected=f"a multiple of {_GROUP}")
    expected = (("I32",), (rows, n // _PER_WORD)), (("BF16", "F16", "F32"), (rows, n // _GROUP)), (("I64",), (2,))
    for part, (dtypes, part_shape) in zip(parts(name), expected, strict=True):
        entry = files[part].entries[part] if part in files else None
        if entry is None or entry.dtype not in dtypes or entry.shape != part_shape:
            raise BadFile(
                "a part of a packed matrix is not what the config gives",
                where=part,
                found=f"{entry.dtype} {list(entry.shape)}" if entry else "nothing",
                expected=f"{' or '.join(dtypes)} {list(part_shape)}",
            )
    stored = tuple(int(size) for size in _bytes(files, parts(name)[2])[1].view("<i8"))
    if stored != shape:
        raise BadFile("weight_shape is not the shape", where=parts(name)[2], found=list(stored), expected=list(shape))


def read(files: Mapping[str, SafetensorsFile], name: str) -> np.ndarray:
    """The matrix's values, codes x scales, float32 (rows, n)."""
    codes, scales = _codes(files, name), _scales(files, name)
    with np.errstate(over="ignore"):  # whoever reads the values checks that they are finite
        return (codes.astype(np.float32) * scales[..., None]).reshape(len(codes), -1)


def blocks(files: Mapping[str, SafetensorsFile], name: str) -> np.ndarray:
    """The same codes as Q4_0 blocks, uint8 (rows, row_bytes), on the scales rounded to float16.

    bfloat16 scales from 2^-17 to 65504 are float16 numbers as they are. Raises BadFile where one is beyond float16.
    """
    with np.errstate(over="ignore"):
        scales = _scales(files, name).astype(np.float16)
    if not np.isfinite(scales).all():
        raise BadFile("a scale is NaN, Inf or beyond float16", where=parts(name)[1])
    return grids.get(GRID).pack(Blocks(codes=_codes(files, name), scales=scales))


def _codes(files: Mapping[str, SafetensorsFile], name: str) -> np.ndarray:
    """int8 (rows, n / 32, 32), -8 to 7."""
    entry, raw = _bytes(files, parts(name)[0])
    rows = entry.shape[0]
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).view(np.int8)  # a word's bytes lie lowest first
    return nibbles.reshape(rows, -1, _GROUP) - np.int8(8)


def _scales(files: Mapping[str, SafetensorsFile], name: str) -> np.ndarray:
    """float32 (rows, n / 32)."""
    entry, raw = _bytes(files, parts(name)[1])
    return safetensors_file.to_float32(raw, entry.dtype, entry.shape, parts(name)[1])


def _bytes(files: Mapping[str, SafetensorsFile], part: str) -> tuple[Entry, np.ndarray]:
    return files[part].entries[part], files[part].raw(part)
