"""What llama.cpp says a context takes, to the byte (llama_get_memory_breakdown of src/llama-ext.h), and an mmproj
(mtmd_get_memory_usage of tools/mtmd/mtmd.h).

They are C++ functions that return a std::map by value, so its layout is that of the C++ library. Only libstdc++'s is
known here (bits/stl_tree.h: a header of colour, parent, left, right; the count; nodes of the same four words before
the pair). Elsewhere they are not called.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_char_p, c_uint64, c_void_p
from typing import Any, NamedTuple

from lowbit.errors import BadFile, Unsupported
from lowbit.run import _llama_h, _mtmd_h

_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_PROJECTOR = "_Z21mtmd_get_memory_usagePKc19mtmd_context_params"
_MOST_BUFFERS = 64


class Memory(NamedTuple):
    """Bytes in one kind of buffer ('CPU', 'CPU_REPACK', 'CPU_Mapped'): weights, KV cache or state, compute."""

    model: int
    context: int
    compute: int


class _Node(ctypes.Structure):
    """A node of a map: a key of one word, and as many words of value as the map has."""

    _fields_ = [
        ("color", c_uint64), ("parent", c_uint64), ("left", c_uint64), ("right", c_uint64), ("key", c_void_p),
        ("values", c_uint64 * 3),
    ]  # fmt: skip


class _Map(ctypes.Structure):
    """The map itself; the comparison that it begins with takes a word."""

    _fields_ = [
        ("compare", c_uint64), ("color", c_uint64), ("root", c_uint64), ("first", c_uint64), ("last", c_uint64),
        ("count", c_uint64), ("spare", c_uint64 * 8),
    ]  # fmt: skip


def breakdown(llama: _llama_h.Llama, context: int) -> dict[str, Memory]:
    """The memory of a context and its model by kind of buffer. Raises Unsupported where it cannot be asked."""
    ask = _function(llama.lib, _BREAKDOWN, [c_void_p, c_void_p])
    name_of = llama.lib.ggml_backend_buft_name
    name_of.restype, name_of.argtypes = c_char_p, [c_void_p]
    found = _Map()
    ask(ctypes.addressof(found), context)
    return {name_of(key).decode(): Memory(*values) for key, values in _entries(found, 3).items()}


def projector(llama: _llama_h.Llama, path: str, flash: int) -> int:
    """Bytes of an mmproj's weights and compute buffers on all devices, nothing of it allocated.

    Raises BadFile where mtmd does not load it, Unsupported where it cannot be asked.
    """
    lib = _mtmd_h.load().lib
    ask = _function(llama.lib, _PROJECTOR, [c_void_p, c_char_p, _mtmd_h.ContextParams])
    params = lib.mtmd_context_params_default()
    params.use_gpu, params.flash_attn_type = False, flash
    found = _Map()
    ask(ctypes.addressof(found), os.fsencode(path), params)
    if not found.count:
        raise BadFile("llama.cpp does not load this as an mmproj", where=path, found=llama.log.take() or None)
    return sum(values[0] for values in _entries(found, 1).values())


def _function(lib: ctypes.CDLL, name: str, arguments: list[Any]) -> Any:
    """A C++ function whose result is written where its first argument points."""
    if not sys.platform.startswith("linux"):
        raise Unsupported("llama.cpp's memory breakdown is read on Linux only", found=sys.platform)
    try:
        function = getattr(lib, name)
    except AttributeError as error:
        raise Unsupported("this llama.cpp has no memory breakdown", found=error) from error
    function.restype, function.argtypes = None, arguments
    return function


def _entries(found: _Map, n_values: int) -> dict[int, tuple[int, ...]]:
    """Key and values of every node. Raises RuntimeFailed where the map is none that this file knows."""
    if found.count > _MOST_BUFFERS:
        raise _llama_h.mismatch(f"a memory breakdown of {found.count} buffers")
    entries: dict[int, tuple[int, ...]] = {}
    pending = [found.root] if found.count else []
    while pending and len(entries) <= found.count:
        if address := pending.pop():
            node = _Node.from_address(address)
            pending += [node.left, node.right]
            entries[node.key] = tuple(node.values[:n_values])
    if len(entries) != found.count:
        raise _llama_h.mismatch(f"{len(entries)} of {found.count} buffers in a memory breakdown")
    return entries
