"""MLX folders: matrices of 4 or 8 bits with a scale and a bias a group, as mlx-lm writes and loads them.

A matrix ``X.weight`` is three tensors: ``X.weight`` uint32 (rows, n * bits / 32), the first code in the lowest bits;
``X.scales`` and ``X.biases`` (rows, n / group) floating point. config.json has ``quantization``: bits, group_size and
mode, and under the name of a module its own where they differ; what a matrix has, its shapes tell. Source: load_model
and infer_quant_config in mlx_lm/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit import grid as grids
from lowbit.checkpoint.packed import SCALE_DTYPES, Files, Scheme, check_groups, check_part, rows_of, scale_rows
from lowbit.errors import BadConfig, BadFile, Unsupported
from lowbit.grid._mlx_affine import MlxAffine
from lowbit.grid.base import Blocks

KEY, _OLD_KEY = "quantization", "quantization_config"
_WORD_BITS = 32


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
        return {f"{module}.weight" for module in modules if f"{module}.weight" in files}

    def parts(self, name: str) -> tuple[str, ...]:
        module = name.removesuffix(".weight")
        return name, f"{module}.scales", f"{module}.biases"

    def describe(self, files: Files, name: str) -> tuple[str, tuple[int, ...]]:
        *rows, words = files[name].entries[name].shape or (0,)
        return self.grid(files, name), (*rows, words * _WORD_BITS // self._layout(files, name)[0])

    def check(self, files: Files, name: str, shape: tuple[int, ...]) -> None:
        rows, n = rows_of(name, shape)
        words, scales, biases = self.parts(name)
        bits, group = self._found[name] = self._find(files, name, n)
        if self.grid(files, name) not in grids.names():
            raise Unsupported(
                "this quantization is not read", where=name, found=f"{bits} bits in groups of {group}",
                expected="4 or 8 bits in groups of 32 or 64",
            )  # fmt: skip
        check_groups(name, n, group)
        check_part(files, words, ("U32",), (rows, n * bits // _WORD_BITS))
        check_part(files, scales, SCALE_DTYPES, (rows, n // group))
        check_part(files, biases, (files[scales].entries[scales].dtype,), (rows, n // group))

    def grid(self, files: Files, name: str) -> str:
        bits, group = self._layout(files, name)
        return f"mlx_affine{bits}_g{group}"

    def coded_rows(self, files: Files, name: str, start: int, stop: int) -> Blocks:
        words, scales, biases = self.parts(name)
        grid = grids.get(self.grid(files, name))
        assert isinstance(grid, MlxAffine)
        raw = files[words].read_rows(words, start, stop)
        return Blocks(
            codes=grid.unpack_codes(raw.reshape(len(raw), -1, grid.block_size * grid.bits // 8)),
            scales=scale_rows(files, scales, start, stop),
            mins=scale_rows(files, biases, start, stop),
        )

    def _layout(self, files: Files, name: str) -> tuple[int, int]:
        """bits and group_size: what ``check`` found, else what the config says of this module or of all."""
        if name in self._found:
            return self._found[name]
        own = self._described.get(name.removesuffix(".weight"))
        own = own if isinstance(own, dict) else self._described
        bits, group = own.get("bits"), own.get("group_size")
        if not isinstance(bits, int) or not isinstance(group, int) or not 0 < bits <= 8 or not 0 < group <= 1024:
            found = f"{bits!r} bits, groups of {group!r}"[:60]
            raise BadConfig(f"bad value for {KEY}", where=name, found=found, expected="bits and group_size")
        return bits, group

    def _find(self, files: Files, name: str, n: int) -> tuple[int, int]:
        """bits and group_size of rows of ``n`` weights, from the shapes, as mlx-lm takes them; the config's own entry
        of this module must say the same."""
        words, scales = (files[part].entries[part].shape for part in self.parts(name)[:2])
        n_words, n_groups = words[-1] if words else 0, scales[-1] if scales else 0
        bits, group = n_words * _WORD_BITS // n, n // max(1, n_groups)
        named = isinstance(self._described.get(name.removesuffix(".weight")), dict)
        if (named and (bits, group) != self._layout(files, name)) or (bits * n, group * n_groups) != (
            n_words * _WORD_BITS, n,
        ):  # fmt: skip
            found = f"{n_words} words and {n_groups} scales for {n} weights a row"
            expected = "{} bits, groups of {}".format(*self._layout(files, name))
            raise BadFile("codes and scales do not fit", where=name, found=found, expected=expected)
        return bits, group
