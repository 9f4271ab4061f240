"""The arithmetic of every storage format, one file a format: a new file here is a new grid of that name."""

from __future__ import annotations

import functools

from lowbit import registry
from lowbit.errors import BadFile, BadOption, Unsupported
from lowbit.grid._array import check_finite
from lowbit.grid.base import Array, Blocks, Grid, namespace

__all__ = ["Array", "Blocks", "Grid", "by_ggml_type", "check_finite", "discover", "get", "names", "namespace"]

_CLASS_VARIABLES: dict[str, tuple[type, ...]] = {
    "name": (str,), "ggml_type": (int, type(None)), "block_size": (int,), "block_bytes": (int,),
}  # fmt: skip
_MISSING = object()


def get(name: str) -> Grid:
    """The grid of that name ('q4_0'). Raises BadOption, which lists the names, if there is none."""
    try:
        return _grids()[name]
    except KeyError:
        raise BadOption("no such grid", found=repr(name), expected="one of " + ", ".join(names())) from None


def names() -> tuple[str, ...]:
    """Every grid's name, sorted."""
    return tuple(_grids())


def by_ggml_type(ggml_type: int) -> Grid:
    """The grid of a gguf.GGMLQuantizationType value. Raises Unsupported if lowbit has none."""
    of_ggml = [grid for grid in _grids().values() if grid.ggml_type is not None]
    for grid in of_ggml:
        if grid.ggml_type == ggml_type:
            return grid
    expected = "one of " + ", ".join(grid.name for grid in of_ggml)
    raise Unsupported("no grid for this ggml type", found=int(ggml_type), expected=expected)


def discover(package: str) -> dict[str, Grid]:
    """The grids that the files of ``package`` define, by file name. Raises BadFile where one breaks the contract."""
    found = registry.instances(package, "GRID", Grid)  # type: ignore[type-abstract]
    for name, grid in found.items():
        _check(grid, f"{package}.{name}")
    return found


@functools.cache
def _grids() -> dict[str, Grid]:
    return discover(__name__)


def _check(grid: Grid, where: str) -> None:
    for variable, kinds in _CLASS_VARIABLES.items():
        if not isinstance(getattr(grid, variable, _MISSING), kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise BadFile(f"a grid needs the class variable {variable}", where=where, expected=expected)
    codes = f"{grid.min_code}..{grid.max_code}"
    if not -128 <= grid.min_code <= 0 <= grid.max_code <= 127:
        raise BadFile("a grid's codes are int8, and zero is among them", where=where, found=codes)
    if grid.has_scales and not grid.min_code < 0 < grid.max_code:
        raise BadFile("codes that are times a scale run from below to above zero", where=where, found=codes)
