"""MLX folders: matrices of 4 or 8 bits with a scale and a bias a group, as mlx-lm writes and loads them.

A matrix ``X.weight`` is three tensors: ``X.weight`` uint32 (rows, n * bits / 32), the first code in the lowest bits;
``X.scales`` and ``X.biases`` (rows, n / group) floating point. config.json has ``quantization``: bits, group_size and
mode, and under the name of a module its own where they differ; what a matrix has, its shapes tell. The matrices of a
layer's experts are one tensor of three dimensions, gate and up apart. Source: load_model and infer_quant_config in
mlx_lm/utils.py, sanitize in mlx_lm/models/gemma4_text.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from lowbit.errors import BadConfig, BadFile, Unsupported
from lowbit.grid._mlx_affine import MlxAffine
from lowbit.grid.base import Blocks

KEY, _OLD_KEY = "quantization", "quantization_config"
_WORD_BITS = 32


def modules_of(name: str) -> tuple[str, ...]:
    """MLX's modules of Hugging Face's tensor ``name``: one, or those that share the rows of each expert evenly."""
    experts = experts_of(name)
    if experts is not None:
        return tuple(f"{experts[0]}.switch_glu.{module}" for module in experts[1])
    return (name.removesuffix(".weight"),)


def stored_parts(module: str) -> tuple[str, str, str]:
    """The stored names of a module's matrix: codes, scales, biases."""
    return f"{module}.weight", f"{module}.scales", f"{module}.biases"


def scheme_of(config: Mapping[str, Any], where: object) -> Mlx | None:
    """The scheme that the config describes; None where it describes none. Raises BadConfig or Unsupported."""
    described = config.get(KEY)
    if described is None:
        # Old folders say it under transformers' key, whose own schemes name a method.
        described = config.get(_OLD_KEY)
        if not isinstance(described, dict) or "group_size" not in described or "quant_method" in described:
            return None
    if not isinstance(described, dict) or not all(isinstance(described.get(k), int) for k in ("bits", "group_size")):
        found = repr(described)[:60]
        raise BadConfig(f"bad value for {KEY}", where=where, found=found, expected="bits and group_size")
    for name, own in {"": described, **{k: v for k, v in described.items() if isinstance(v, dict)}}.items():
        if own.get("mode", "affine") != "affine":
            found = f"{name or KEY}: mode {str(own['mode'])[:40]}"
            raise Unsupported("this quantization is not read", where=where, found=found, expected="mode affine")
    return Mlx(described)


class Mlx(Scheme):
    """Affine quantization. ``described``: config.json's ``quantization``."""

    kind = "mlx"

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._described = described
        self._found: dict[str, tuple[int, int]] = {}  # bits and group_size of the matrices that were checked

    def matrices(self, files: Files) -> set[str]:
        modules = {name.removesuffix(".scales") for name in files if name.endswith(".scales")}
        return {_tensor_of(module) for module in modules if f"{module}.weight" in files}

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(part for module in modules_of(name) for part in stored_parts(module))

    def describe(self, files: Files, name: str) -> tuple[str, tuple[int, ...]]:
        parts = [files[part].entries[part].shape for part in self.parts(name)[::3] if part in files]
        *rows, words = parts[0] or (0,)
        if len(rows) > 1:
            rows[-1] *= len(modules_of(name))
        return self.grid(files, name), (*rows, words * _WORD_BITS // self._layout(files, name)[0])

    def check(self, files: Files, name: str, shape: tuple[int, ...]) -> None:
        modules, (*rows, n) = modules_of(name), shape
        if modules == (name.removesuffix(".weight"),):
            rows_of(name, shape)
        else:
            rows[-1] //= len(modules)
        for module in modules:
            words, scales, biases = stored_parts(module)
            bits, group = self._found[name] = self._find(files, module, n)
            if self.grid(files, name) not in grids.names():
                raise Unsupported(
                    "this quantization is not read", where=words, found=f"{bits} bits in groups of {group}",
                    expected="4 or 8 bits in groups of 32 or 64",
                )  # fmt: skip
            check_groups(words, n, group)
            check_part(files, words, ("U32",), (*rows, n * bits // _WORD_BITS))
            check_part(files, scales, SCALE_DTYPES, (*rows, n // group))
            check_part(files, biases, (files[scales].entries[scales].dtype,), (*rows, n // group))

    def grid(self, files: Files, name: str) -> str:
        bits, group = self._layout(files, name)
        return f"mlx_affine{bits}_g{group}"

    def coded_rows(self, files: Files, name: str, start: int, stop: int) -> Blocks:
        grid = grids.get(self.grid(files, name))
        assert isinstance(grid, MlxAffine)
        codes, scales, mins = [], [], []
        for module, first, last in _runs(files, name, start, stop):
            words, its_scales, its_biases = stored_parts(module)
            raw = files[words].read_rows(words, first, last)
            codes.append(grid.unpack_codes(raw.reshape(len(raw), -1, grid.block_size * grid.bits // 8)))
            scales.append(scale_rows(files, its_scales, first, last))
            mins.append(scale_rows(files, its_biases, first, last))
        if len(codes) == 1:
            return Blocks(codes=codes[0], scales=scales[0], mins=mins[0])
        return Blocks(codes=np.concatenate(codes), scales=np.concatenate(scales), mins=np.concatenate(mins))

    def _find(self, files: Files, module: str, n: int) -> tuple[int, int]:
        """bits and group_size of rows of ``n`` weights, from the shapes, as mlx-lm takes them; the config's own entry
        of this module must say the same."""
        shapes = [files[part].entries[part].shape if part in files else () for part in stored_parts(module)[:2]]
        n_words, n_groups = (shape[-1] if shape else 0 for shape in shapes)
        bits, group = n_words * _WORD_BITS // n, n // max(1, n_groups)
        said = self._said(module)
        named = isinstance(self._described.get(module), dict)
        if (named and (bits, group) != said) or (bits * n, group * n_groups) != (n_words * _WORD_BITS, n):
            found = f"{n_words} words and {n_groups} scales for {n} weights a row"
            expected = f"{said[0]} bits, groups of {said[1]}"
            raise BadFile("codes and scales do not fit", where=f"{module}.weight", found=found, expected=expected)
        return bits, group

    def _layout(self, files: Files, name: str) -> tuple[int, int]:
        """bits and group_size: what ``check`` found, else what the config says."""
        return self._found.get(name) or self._said(modules_of(name)[0])

    def _said(self, module: str) -> tuple[int, int]:
        """bits and group_size by the config, of this module or of all. Raises BadConfig."""
        own = self._described.get(module)
        own = own if isinstance(own, dict) else self._described
        bits, group = own.get("bits"), own.get("group_size")
        if not isinstance(bits, int) or not isinstance(group, int) or not 0 < bits <= 8 or not 0 < group <= 1024:
            found = f"{bits!r} bits, groups of {group!r}"[:60]
            raise BadConfig(f"bad value for {KEY}", where=module, found=found, expected="bits and group_size")
        return bits, group


def _tensor_of(module: str) -> str:
    """The inverse of ``modules_of``."""
    base, _, last = module.rpartition(".switch_glu.")
    for name, modules in EXPERTS.items():
        if base.endswith(".experts") and last in modules:
            return f"{base}.{name}"
    return f"{module}.weight"


def _runs(files: Files, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Where rows ``start`` to ``stop`` of a tensor, seen as (rows, n), lie: (module, first row, last row) in order."""
    modules = modules_of(name)
    if len(modules) == 1:
        yield modules[0], start, stop
        return
    each = files[f"{modules[0]}.weight"].entries[f"{modules[0]}.weight"].shape[-2]  # of an expert, in each module
    for expert, which, first, end in expert_runs(start, stop, each, len(modules)):
        yield modules[which], expert * each + first, expert * each + end
