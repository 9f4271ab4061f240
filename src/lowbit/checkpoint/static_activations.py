"""Scales of static int8 activations as checkpoints hold them: one for what flows into a matrix, one for what flows out,
one each for the keys and the values in a layer's cache. value = clamp(round(x / scale), -128, 127) * scale.

A folder that lowbit trained names them as transformers' QuantizedLinear does, in a file of their own. In a
compressed-tensors folder they are tensors beside the matrix: a kind of activation (``input_activations``,
``output_activations``, ``kv_cache_scheme``) has num_bits, strategy and so on as ``SCHEME`` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.checkpoint.safetensors_file import SafetensorsFile, to_float32
from lowbit.errors import BadFile, Unsupported

KIND = "static-int8"
SCHEME: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
OF_MATRIX = {"input": "input_activation_scale", "output": "output_activation_scale"}
OF_CACHE = {"k": "k_cache_scale", "v": "v_cache_scale"}


def names_of(matrix: str) -> Iterator[tuple[str, str]]:
    """(in lowbit's folder, in compressed-tensors') of every scale that may lie beside the matrix 'X.weight': a cache's
    two beside the projection of its keys."""
    module = matrix.removesuffix(".weight")
    for kind, ours in OF_MATRIX.items():
        yield f"{module}.{ours}", f"{module}.{kind}_scale"
    attention, _, projection = module.rpartition(".")
    if projection == "k_proj":
        for kind, ours in OF_CACHE.items():
            yield f"{attention}.{ours}", f"{attention}.{kind}_scale"


def is_of_cache(name: str) -> bool:
    """Of a scale's name in lowbit's folder."""
    return name.endswith(tuple(OF_CACHE.values()))


def read(folder: Path, described: Any) -> dict[str, np.float32]:
    """The scales of a folder that lowbit trained, by their names there; 0 is an activation that is not rounded.

    described: what its lowbit.json says under ``activations``. Raises BadFile.
    """
    if described is None:
        return {}
    file = described.get("file") if isinstance(described, dict) else None
    if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
        raise BadFile("no file of scales", where=folder, found=file, expected="a .safetensors file in the folder")
    if described.get("kind") != KIND:
        raise Unsupported("activations of an unknown kind", where=folder, found=described.get("kind"), expected=KIND)
    stored = SafetensorsFile(folder / file)
    try:
        return {name: scalar(stored, name) for name in sorted(stored.entries)}
    finally:
        stored.close()


def scalar(file: SafetensorsFile, name: str) -> np.float32:
    """One number, at least 0. Raises BadFile."""
    entry, where = file.entries[name], f"{file.path}: {name}"
    if entry.shape not in ((), (1,)) or entry.dtype not in ("F32", "BF16", "F16"):
        raise BadFile("not a scale", where=where, found=f"{entry.dtype} {list(entry.shape)}", expected="one float")
    value = np.float32(to_float32(file.raw(name), entry.dtype, (1,), where)[0])
    if not np.isfinite(value) or value < 0:
        raise BadFile("not a scale", where=where, found=value, expected="a number from 0")
    return value


def is_static(described: Any, where: object, name: str) -> bool:
    """Whether compressed-tensors' description of a kind of activation is ``SCHEME``, or None. Raises Unsupported."""
    if described is None:
        return False
    found = described if isinstance(described, Mapping) else {}
    for key, expected in SCHEME.items():
        if found.get(key, False if key == "dynamic" else None) != expected:
            told = f"{name}.{key} = {found.get(key)!r}"[:80]
            raise Unsupported("quantized activations are not read", where=where, found=told, expected=expected)
    return True
