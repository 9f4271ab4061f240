"""Folders whose matrices are codes and scales in tensors of their own: what every such scheme answers.

A scheme is one file (compressed_tensors.py, mlx_affine.py). It is made from config.json, and then asked about the
tensors of the folder by the names of the matrices they belong to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import safetensors_file
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.errors import BadFile, Unsupported
from lowbit.grid.base import Blocks

Files = Mapping[str, SafetensorsFile]
SCALE_DTYPES = ("BF16", "F16", "F32")


class Scheme(ABC):
    """How a folder stores its quantized matrices. ``name`` is a matrix's stored name, 'X.weight'."""

    kind: ClassVar[str]  # the container: 'mlx' or 'compressed-tensors'

    @abstractmethod
    def matrices(self, files: Files) -> set[str]:
        """The names of the matrices that are stored in parts."""

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """The stored names of one matrix's tensors, that of its codes first."""

    @abstractmethod
    def describe(self, files: Files, name: str) -> tuple[str, tuple[int, ...]]:
        """The format in words ('int4_g32', 'mlx_affine6_g128') and the matrix's shape, as the header tells them."""

    @abstractmethod
    def check(self, files: Files, name: str, shape: tuple[int, ...]) -> None:
        """Raises BadFile where the parts are not there in the sizes that ``shape`` gives; Unsupported."""

    @abstractmethod
    def grid(self, files: Files, name: str) -> str:
        """The grid that ``coded_rows`` is of."""

    @abstractmethod
    def coded_rows(self, files: Files, name: str, start: int, stop: int) -> Blocks:
        """Rows of the codes and scales as they are stored; scales float16, or float32 where BF16 or F32 is stored."""

    def block_grid(self, files: Files, name: str) -> str | None:
        """The grid whose blocks ``block_rows`` gives."""
        return None

    def block_rows(self, files: Files, name: str, start: int, stop: int) -> np.ndarray | None:
        """The same codes as blocks of ``block_grid``, uint8 (stop - start, row_bytes), where there is one."""
        return None

    def activation_scales(self, files: Files, name: str) -> dict[str, np.float32]:
        """Those of static int8 activations that lie beside the matrix, by ``static_activations``' names."""
        return {}

    def read_rows(self, files: Files, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of the matrix's values, float32 (stop - start, n)."""
        with np.errstate(over="ignore", invalid="ignore"):  # whoever reads the values checks that they are finite
            coded = self.coded_rows(files, name, start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever uses the values checks that they are finite
            values: np.ndarray = grids.get(self.grid(files, name)).dequantize(coded)
        return values


def check_part(files: Files, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises BadFile where a tensor is not there in one of ``dtypes`` and in ``shape``."""
    entry = files[part].entries[part] if part in files else None
    if entry is None or entry.dtype not in dtypes or entry.shape != shape:
        raise BadFile(
            "a part of a packed matrix is not what the config gives",
            where=part,
            found=f"{entry.dtype} {list(entry.shape)}" if entry else "nothing",
            expected=f"{' or '.join(dtypes)} {list(shape)}",
        )


def rows_of(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and weights a row. Raises BadFile where a tensor in parts is a vector, Unsupported where it is experts or a
    convolution."""
    if len(shape) < 2:
        raise BadFile("codes and scales of what is no matrix", where=name, found=list(shape))
    if len(shape) > 2:
        raise Unsupported("only matrices are read from codes and scales", where=name, found=list(shape))
    return shape[0], shape[1]


def check_groups(name: str, n: int, group: int) -> None:
    """Raises Unsupported where rows of ``n`` weights are not whole groups."""
    if n % group:
        raise Unsupported("rows are not whole groups", where=name, found=n, expected=f"a multiple of {group}")


# A layer's experts: Hugging Face's name of their weight (experts, rows, n), and the matrices that an expert has of it
# where its rows are shared out.
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def experts_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Of the weight of a layer's experts 'X.experts', and the matrices that an expert has of it; None of another."""
    base, _, last = name.rpartition(".")
    return (base, EXPERTS[last]) if base.endswith(".experts") and last in EXPERTS else None


def expert_runs(start: int, stop: int, each: int, matrices: int) -> Iterator[tuple[int, int, int, int]]:
    """Where rows ``start`` to ``stop`` of experts' weight, seen as (rows, n), lie: (expert, which of its matrices,
    first row, last row) in order. each: rows of a matrix."""
    while start < stop:
        expert, row = divmod(start, each * matrices)
        which, first = divmod(row, each)
        end = min(each, first + stop - start)
        yield expert, which, first, end
        start += end - first


def scale_rows(files: Files, part: str, start: int, stop: int) -> np.ndarray:
    """Rows of scales or biases (stop - start, n_groups): float16 of F16, float32 of BF16 and F32."""
    raw, entry = files[part].read_rows(part, start, stop), files[part].entries[part]
    if entry.dtype == "F16":
        return raw.view("<f2")
    return safetensors_file.to_float32(raw.reshape(-1), entry.dtype, (len(raw), entry.shape[-1]), part)
