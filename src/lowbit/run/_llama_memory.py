"""What llama.cpp says a context takes, to the byte: llama_get_memory_breakdown of src/llama-ext.h.

It is a C++ function that returns a std::map by value, so its layout is that of the C++ library. Only libstdc++'s is
known here (bits/stl_tree.h: a header of colour, parent, left, right; the count; nodes of the same four words before
the pair). Elsewhere it is not called.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_uint64, c_void_p
from typing import NamedTuple

from lowbit.errors import Unsupported
from lowbit.run import _llama_h

_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_MOST_BUFFERS = 64
_LEAF = 0


class Memory(NamedTuple):
    """Bytes in one kind of buffer ('CPU', 'CPU_REPACK', 'CPU_Mapped'): weights, KV cache or state, compute."""

    model: int
    context: int
    compute: int


class _Node(ctypes.Structure):
    """A node of the map: key (ggml_backend_buffer_type_t) and llama_memory_breakdown_data."""

    _fields_ = [
        ("color", c_uint64), ("parent", c_uint64), ("left", c_uint64), ("right", c_uint64),
        ("buffer_type", c_void_p), ("model", c_uint64), ("context", c_uint64), ("compute", c_uint64),
    ]  # fmt: skip


class _Map(ctypes.Structure):
    """The map itself; the comparison that it begins with takes a word."""

    _fields_ = [
        ("compare", c_uint64), ("color", c_uint64), ("root", c_uint64), ("first", c_uint64), ("last", c_uint64),
        ("count", c_uint64), ("spare", c_uint64 * 8),
    ]  # fmt: skip


def breakdown(llama: _llama_h.Llama, context: int) -> dict[str, Memory]:
    """The memory of a context and its model by kind of buffer. Raises Unsupported where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        raise Unsupported("llama.cpp's memory breakdown is read on Linux only", found=sys.platform)
    lib = llama.lib
    try:
        ask, name_of = getattr(lib, _BREAKDOWN), lib.ggml_backend_buft_name
    except AttributeError as error:
        raise Unsupported("this llama.cpp has no memory breakdown", found=error) from error
    ask.restype, ask.argtypes = None, [c_void_p, c_void_p]  # a large result is written where the first argument points
    name_of.restype, name_of.argtypes = c_char_p, [c_void_p]
    found = _Map()
    ask(ctypes.addressof(found), context)
    if not 0 < found.count <= _MOST_BUFFERS:
        raise _llama_h.mismatch(f"a memory breakdown of {found.count} buffers")
    rows: dict[str, Memory] = {}
    pending = [found.root]
    while pending:
        address = pending.pop()
        if address == _LEAF:
            continue
        node = _Node.from_address(address)
        pending += [node.left, node.right]
        rows[name_of(node.buffer_type).decode()] = Memory(node.model, node.context, node.compute)
        if len(rows) > found.count:
            break
    if len(rows) != found.count:
        raise _llama_h.mismatch(f"{len(rows)} of {found.count} buffers in a memory breakdown")
    return rows
