"""The C library that executes the formats, as the wheel of xllamacpp carries it: its own rounding, on the CPU.

Naive baselines and the golden blocks come from here. The extension module exports ggml.h and llama.h; it is loaded
with ctypes, without importing the package.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import threads
from lowbit.errors import BadFile, Unsupported
from lowbit.grid.base import Grid

_HINT = "Install it with: pip install 'xllamacpp>=2026.10,<2026.11'"
_KNOWN = frozenset(int(member) for member in GGMLQuantizationType)
# What the C library keeps activations and integers in; its quantizer aborts the process on them.
_NOT_FOR_WEIGHTS = frozenset({9, 15, 24, 25, 26, 27, 28})  # Q8_1, Q8_K, I8, I16, I32, I64, F64


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded C library, with argument types set for the ggml functions used here. Raises Unsupported."""
    threads.wait_passively()
    path = _find()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unsupported("the C library of xllamacpp does not load", where=path, found=error, hint=_HINT) from error
    i64, type_, void = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    try:
        _declare(lib.ggml_quantize_chunk, ctypes.c_size_t, type_, void, void, i64, i64, i64, void)
        _declare(lib.ggml_validate_row_data, ctypes.c_bool, type_, void, ctypes.c_size_t)
        _declare(lib.ggml_type_size, ctypes.c_size_t, type_)
        _declare(lib.ggml_blck_size, i64, type_)
        _declare(lib.ggml_row_size, ctypes.c_size_t, type_, i64)
        _declare(lib.ggml_type_name, ctypes.c_char_p, type_)
        _declare(lib.ggml_quantize_requires_imatrix, ctypes.c_bool, type_)
        _declare(lib.ggml_get_type_traits, ctypes.POINTER(_TypeTraits), type_)
    except AttributeError as error:
        raise Unsupported("this xllamacpp does not export ggml", where=path, found=error, hint=_HINT) from error
    return lib


def is_installed() -> bool:
    """Whether there is a C library to load."""
    return importlib.util.find_spec("xllamacpp") is not None


def quantize(
    x: np.ndarray, ggml_type: int, importance: np.ndarray | None = None, *, checked: bool = False
) -> np.ndarray:
    """Rounds ``x`` (rows, n) float32 as llama-quantize does. importance: (n,) float32, as of an importance matrix.
    checked: the values are known to be finite.

    Returns (rows, row_bytes) uint8. Raises BadFile on NaN or Inf, Unsupported where n is not a multiple of the block
    size or the type cannot be made this way.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows, n = x.shape
    raw = np.empty((rows, row_bytes(n, ggml_type)), np.uint8)
    lib = library()
    if ggml_type in _NOT_FOR_WEIGHTS:
        raise Unsupported("ggml cannot quantize to this type", found=type_name(ggml_type))
    if importance is None and lib.ggml_quantize_requires_imatrix(ggml_type):
        raise Unsupported("this ggml type needs an importance matrix", found=type_name(ggml_type))
    if not checked and not np.isfinite(x).all():
        raise BadFile("the weights are not finite", found="NaN or Inf", expected="finite numbers")
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (n,):
            raise BadFile("an importance is not the row's", found=importance.shape, expected=(n,))
    weights = None if importance is None else importance.ctypes.data
    if raw.size:
        written = lib.ggml_quantize_chunk(ggml_type, x.ctypes.data, raw.ctypes.data, 0, rows, n, weights)
        if written != raw.size:
            raise Unsupported("ggml cannot quantize to this type", found=type_name(ggml_type))
    if weights is not None and not lib.ggml_validate_row_data(ggml_type, raw.ctypes.data, raw.size):
        raise BadFile("ggml makes NaN or Inf of these weights under this importance", found=type_name(ggml_type))
    return raw


def dequantize(raw: np.ndarray, ggml_type: int, n: int) -> np.ndarray:
    """(rows, row_bytes) uint8 -> (rows, n) float32, by ggml's reference code. Raises Unsupported."""
    raw = np.ascontiguousarray(raw, dtype=np.uint8)
    rows = raw.shape[0]
    if raw.shape != (rows, row_bytes(n, ggml_type)):
        raise BadFile("the bytes do not fit the row", found=raw.shape[1:], expected=f"{row_bytes(n, ggml_type)} a row")
    if ggml_type == 0:
        return raw.view(np.float32).copy()
    to_float = library().ggml_get_type_traits(ggml_type).contents.to_float
    if not to_float:
        raise Unsupported("ggml cannot dequantize this type", found=type_name(ggml_type))
    x = np.empty((rows, n), np.float32)
    if x.size:
        to_float(raw.ctypes.data, x.ctypes.data, x.size)
    return x


def type_of(grid: Grid) -> int:
    """A grid's number in ggml. Raises Unsupported for one of another library's."""
    if grid.ggml_type is None:
        raise Unsupported("GGUF does not have this format", found=grid.name)
    return grid.ggml_type


def type_size(ggml_type: int) -> int:
    """Bytes a block."""
    return int(library().ggml_type_size(_checked(ggml_type)))


def blck_size(ggml_type: int) -> int:
    """Weights a block."""
    return int(library().ggml_blck_size(_checked(ggml_type)))


def row_bytes(n: int, ggml_type: int) -> int:
    """Bytes of a row of ``n`` weights. Raises Unsupported where ``n`` is not a whole number of blocks."""
    block = blck_size(ggml_type)
    if n % block:
        name = type_name(ggml_type)
        raise Unsupported(f"{name} rows are whole blocks", found=f"{n} weights", expected=f"a multiple of {block}")
    return n // block * type_size(ggml_type)


def type_name(ggml_type: int) -> str:
    """ggml's own spelling: 'q4_0', 'q6_K'."""
    return (library().ggml_type_name(ggml_type) or b"?").decode()


class _TypeTraits(ctypes.Structure):
    """The head of ggml_type_traits in ggml.h, and the one function used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def _declare(function: ctypes._NamedFuncPointer, result: type, *arguments: type) -> None:  # type: ignore[name-defined]
    function.restype, function.argtypes = result, arguments


def _find() -> Path:
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for pattern in ("xllamacpp*.so", "xllamacpp*.pyd", "xllamacpp*.dylib"):
            for path in sorted(Path(folder).glob(pattern)):
                return path
    raise Unsupported("the runtime is not installed", found="no package xllamacpp", hint=_HINT)


def _checked(ggml_type: int) -> int:
    # The C functions abort the process on a number past their table; retired types have blocks of 0 weights.
    if ggml_type not in _KNOWN or library().ggml_blck_size(ggml_type) <= 0:
        raise Unsupported("no such ggml type", found=ggml_type)
    return ggml_type
