"""compressed-tensors checkpoints of integer weights (w4a16-ct, or a scale a row): codes and scales as they are stored.

A matrix ``X.weight`` is three tensors: ``X.weight_packed`` int32 (rows, n / 8), eight codes plus 8 in a word, the first
in the lowest bits; ``X.weight_scale`` (rows, n / group) floating point; ``X.weight_shape`` int64 (2). A weight is code
x scale with codes from -8 to 7: Q4_0's own arithmetic, so the codes go into a Q4_0 block as they are; a scale of 128
weights goes into four. With the strategy ``channel`` a row has one scale, and codes may have 2, 4 or 8 bits, plus 2, 8
or 128, as many in a word as fit: the grids channelwise2, 4 and 8. Of a layer's experts, one weight in Hugging Face,
each has matrices of its own: ``X.experts.7.gate_proj.weight``, up and down. Of activations, static int8 ones are read
(``static_activations``). Source:
compressed_tensors/compressors/pack_quantized; experts as vLLM reads them (model_executor/models/gemma4.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint.packed import (
    EXPERTS,
    SCALE_DTYPES,
    Files,
    Scheme,
    check_groups,
    check_part,
    expert_runs,
    experts_of,
    rows_of,
    scale_rows,
)
from lowbit.checkpoint.static_activations import is_static, names_of, scalar
from lowbit.errors import BadConfig, BadFile, Unsupported
from lowbit.grid._channelwise import Channelwise
from lowbit.grid._int4 import Int4
from lowbit.grid.base import Blocks, Grid

KEY = "quantization_config"
GROUPS = (32, 128)
_BLOCK_GRID = "q4_0"
_WORD = 32  # bits
_CHANNEL_BITS = (2, 4, 8)
_SUFFIXES = ("_packed", "_scale", "_shape")
_OF_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(\w+)\.weight")
_EXPECTED: dict[str, Any] = {
    "type": "int", "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None,
}  # fmt: skip


def matrices_of(name: str, experts: Iterable[int]) -> tuple[str, ...]:
    """The stored names of the matrices of Hugging Face's weight ``name``: itself, or those of each of ``experts``."""
    found = experts_of(name)
    if found is None:
        return (name,)
    return tuple(f"{found[0]}.{i}.{matrix}.weight" for i in experts for matrix in found[1])


def stored_parts(matrix: str) -> tuple[str, str, str]:
    """The stored names of a matrix's parts: codes, scales, shape."""
    packed, scale, shape = (matrix + suffix for suffix in _SUFFIXES)
    return packed, scale, shape


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
    for key in ("transform_config", "sparsity_config"):
        if described.get(key):  # rotated or sparse weights would be read as if they were not
            raise Unsupported("this quantization is not read", where=where, found=f"{KEY}.{key}", expected="null")
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadConfig(f"{KEY} has no config_groups", where=where)
    kinds = {_kind(name, group, where) for name, group in groups.items()}
    static = is_static(described.get("kv_cache_scheme"), where, "kv_cache_scheme")
    for name, group in groups.items():
        for key in ("input_activations", "output_activations"):
            static |= is_static(group.get(key), where, f"{name}.{key}")
    sizes = {size for _, size in kinds if size is not None}
    if len(sizes) > 1:
        raise Unsupported("this quantization is not read", where=where, found=f"groups of {sorted(sizes)}")
    channel = frozenset(bits for bits, size in kinds if size is None)
    return CompressedTensors(next(iter(sizes), None), channel, static=static)


def _kind(name: str, group: Any, where: object) -> tuple[int, int | None]:
    """Bits and group size (None: a row) of one of config_groups, whose weights are of a kind that is read."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise BadConfig(f"{KEY}.{name} has no weights", where=where)
    for key, expected in _EXPECTED.items():
        if weights.get(key, False if key == "dynamic" else None) != expected:
            found = f"{name}.weights.{key} = {weights.get(key)!r}"
            raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if strategy == "channel":
        if type(bits) is not int or bits not in _CHANNEL_BITS:
            found, expected = f"{name}.weights.num_bits = {bits!r}"[:80], " or ".join(map(str, _CHANNEL_BITS))
            raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
        return bits, None
    for key, value, expected in (("strategy", strategy, "group"), ("num_bits", bits, 4)):
        if value != expected:
            found = f"{name}.weights.{key} = {value!r}"[:80]
            raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
    size = weights.get("group_size")
    if not isinstance(size, int) or size not in GROUPS:
        found, expected = f"{name}.weights.group_size = {size!r}"[:80], " or ".join(map(str, GROUPS))
        raise Unsupported("this quantization is not read", where=where, found=found, expected=expected)
    return 4, size


class CompressedTensors(Scheme):
    """pack-quantized, symmetric: 4 bits in groups of ``group`` weights, where there are any, and a scale a row for
    matrices of ``channel`` bits. Which of them a matrix has, its parts' sizes tell. static: activations are int8 on
    scales that lie beside the matrices, some of them at least.
    """

    kind = "compressed-tensors"

    def __init__(self, group: int | None, channel: frozenset[int] = frozenset(), *, static: bool = False) -> None:
        self.group, self.channel, self.static = group, channel, static
        self._beside: dict[str, dict[str, str]] = {}  # of each matrix its activations' scales, by lowbit's names
        self._experts: dict[str, set[int]] = {}  # which there are of each weight of experts

    def matrices(self, files: Files) -> set[str]:
        ending = f".weight{_SUFFIXES[0]}"
        found = set()
        for stored in (name.removesuffix(_SUFFIXES[0]) for name in files if name.endswith(ending)):
            match = _OF_EXPERT.fullmatch(stored)
            whole = next((hf for hf, each in EXPERTS.items() if match and match[3] in each), None)
            if match and whole:
                stored = f"{match[1]}.{whole}"
                self._experts.setdefault(stored, set()).add(int(match[2]))
            found.add(stored)
            named = names_of(stored) if self.static else ()
            self._beside[stored] = {ours: theirs for ours, theirs in named if theirs in files}
        if self.static and not any(self._beside.values()):
            raise BadFile("no scale of the activations that the config says are static", found="no .input_scale")
        return found

    def parts(self, name: str) -> tuple[str, ...]:
        parts = (part for matrix in self._matrices(name) for part in stored_parts(matrix))
        return (*parts, *self._beside.get(name, {}).values())

    def _matrices(self, name: str) -> tuple[str, ...]:
        return matrices_of(name, sorted(self._experts.get(name, ())))

    def describe(self, files: Files, name: str) -> tuple[str, tuple[int, ...]]:
        part = next(part for part in self.parts(name) if part in files)
        *rows, words = files[part].entries[part].shape or (0,)
        bits, _ = self._kind_of(files, name)
        experts = experts_of(name)
        if experts is not None and rows:
            rows = [len(self._experts[name]), rows[0] * len(experts[1])]
        return self.grid(files, name), (*rows, words * _WORD // bits)

    def _kind_of(self, files: Files, name: str) -> tuple[int, int | None]:
        """Bits and group size (None: a row). Raises BadFile where the parts are of none that the config has."""
        if not self.channel:
            return 4, self.group
        packed, scale, shape = stored_parts(
            next((m for m in self._matrices(name) if stored_parts(m)[0] in files), name)
        )
        check_part(files, shape, ("I64",), (2,))
        n = int(files[shape].raw(shape).view("<i8")[1])
        words, scales = (files[p].entries[p].shape[-1:] if p in files else () for p in (packed, scale))
        kinds = [(bits, None) for bits in sorted(self.channel)] + ([(4, self.group)] if self.group else [])
        for bits, group in kinds:
            if words and scales == (1 if group is None else n // group,) and words[0] * _WORD == n * bits:
                return bits, group
        found = f"{list(words)} words and {list(scales)} scales for {n} weights"
        raise BadFile("a packed matrix is of no kind that the config has", where=name, found=found)

    def check(self, files: Files, name: str, shape: tuple[int, ...]) -> None:
        experts = experts_of(name)
        rows, n = rows_of(name, shape if experts is None else shape[1:])
        bits, group = self._kind_of(files, name)
        check_groups(name, n, group or _WORD // bits)
        if name in files:
            raise BadFile("a matrix is stored twice, packed and as it is", where=name)
        if experts is not None:
            rows //= len(experts[1])
            found = self._experts.get(name, set())
            if len(found) != shape[0] or max(found) != shape[0] - 1:
                raise BadFile("not the config's experts", where=name, found=len(found), expected=shape[0])
        for matrix in self._matrices(name):
            packed, scale, stored_shape = stored_parts(matrix)
            check_part(files, packed, ("I32",), (rows, n * bits // _WORD))
            check_part(files, scale, SCALE_DTYPES, (rows, n // group if group else 1))
            check_part(files, stored_shape, ("I64",), (2,))
            stored = tuple(int(size) for size in files[stored_shape].raw(stored_shape).view("<i8"))
            if stored != (rows, n):
                raise BadFile(
                    "weight_shape is not the shape", where=stored_shape, found=list(stored), expected=[rows, n]
                )
        self.activation_scales(files, name)

    def activation_scales(self, files: Files, name: str) -> dict[str, np.float32]:
        return {ours: scalar(files[theirs], theirs) for ours, theirs in self._beside.get(name, {}).items()}

    def grid(self, files: Files, name: str) -> str:
        bits, group = self._kind_of(files, name)
        return f"channelwise{bits}" if group is None else f"int4_g{group}"

    def coded_rows(self, files: Files, name: str, start: int, stop: int) -> Blocks:
        grid = grids.get(self.grid(files, name))
        codes, scales = [], []
        for matrix, first, last in self._runs(files, name, start, stop):
            packed, scale, _ = stored_parts(matrix)
            raw = files[packed].read_rows(packed, first, last)
            codes.append(_codes(grid, raw))
            scales.append(scale_rows(files, scale, first, last))
        if len(codes) == 1:
            return Blocks(codes=codes[0], scales=scales[0])
        # Of float16 and float32 scales, as experts may differ, float32 holds both.
        return Blocks(codes=np.concatenate(codes), scales=np.concatenate(scales))

    def _runs(self, files: Files, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The stored matrices that rows ``start`` to ``stop`` lie in, and which of theirs, in order."""
        matrices, experts = self._matrices(name), experts_of(name)
        if experts is None:
            yield name, start, stop
            return
        part, width = stored_parts(matrices[0])[0], len(experts[1])
        each = files[part].entries[part].shape[0]
        for expert, which, first, last in expert_runs(start, stop, each, width):
            yield matrices[expert * width + which], first, last

    def block_grid(self, files: Files, name: str) -> str:
        grid = self.grid(files, name)
        return grid if isinstance(grids.get(grid), Channelwise) else _BLOCK_GRID

    def block_rows(self, files: Files, name: str, start: int, stop: int) -> np.ndarray:
        """Of a scale a row the grid's own; of groups Q4_0 blocks of the same codes, on the scales rounded to float16.

        bfloat16 scales from 2^-17 to 65504 are float16 numbers as they are. Raises BadFile where one is beyond float16.
        """
        grid, coded = grids.get(self.block_grid(files, name)), self.coded_rows(files, name, start, stop)
        if isinstance(grid, Channelwise):
            return grid.pack(coded)
        assert self.group is not None
        with np.errstate(over="ignore"):
            scales = np.asarray(coded.scales).astype(np.float16)
        if not np.isfinite(scales).all():
            raise BadFile("a scale is NaN, Inf or beyond float16", where=f"{name}_scale")
        codes = coded.codes.reshape(len(scales), -1, grid.block_size)
        return grid.pack(Blocks(codes=codes, scales=np.repeat(scales, self.group // grid.block_size, axis=1)))


def _codes(grid: Grid, raw: np.ndarray) -> np.ndarray:
    """Codes (rows, blocks, weights) int8 of the words' bytes, uint8 (rows, ...)."""
    if isinstance(grid, Channelwise):
        return grid.unpack_codes(words_of(grid, raw))[:, None, :]
    assert isinstance(grid, Int4)
    return grid.unpack_codes(raw.reshape(len(raw), -1, grid.block_size // 2))


def words_of(grid: Channelwise, raw: np.ndarray) -> np.ndarray:
    """The grid's bytes of codes as the words have them, and back: of 8 bits each plus 128, of fewer the same."""
    return raw ^ np.uint8(0x80) if grid.bits == 8 else raw
