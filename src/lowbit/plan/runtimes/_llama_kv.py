"""The KV cache that llama.cpp allocates, to the byte.

Read from llama.cpp in October 2026: cells from llama_context's constructor (src/llama-context.cpp) and
llama_kv_cache_iswa (src/llama-kv-cache-iswa.cpp), rows from llama_kv_cache (src/llama-kv-cache.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lowbit.checkpoint.families.base import LayerCache
from lowbit.errors import BadOption

MOST_SLOTS = 256  # LLAMA_MAX_SEQ
_PAD = 256


@dataclass(frozen=True, kw_only=True)
class Cells:
    """How many tokens the caches of a context have room for.

    context: of all slots together, as llama.cpp rounds it. per_slot: that one slot can reach. streams: caches side by
    side, one a slot, or one that all share. ubatch: tokens computed at a time, at most the context.
    """

    context: int
    per_slot: int
    streams: int
    slots: int
    unified: bool
    ubatch: int
    batch: int

    def of_layer(self, window: int | None, *, swa_full: bool) -> int:
        """Cells that a layer keeps in each stream."""
        if window is None or swa_full:
            return self.per_slot
        return pad(min(self.per_slot, window * (self.slots if self.unified else 1) + self.ubatch))


def cells(context: int, *, slots: int, unified: bool, batch: int, ubatch: int) -> Cells:
    """``context`` is -c (not 0). Raises BadOption for more slots than llama.cpp has."""
    if not 1 <= slots <= MOST_SLOTS:
        raise BadOption("llama.cpp does not have so many slots", found=slots, expected=f"1 to {MOST_SLOTS}")
    batch = min(context, batch)
    rounded = pad(context)
    per_slot = rounded if unified else pad(rounded // slots)
    return Cells(
        context=rounded if unified else per_slot * slots, per_slot=per_slot, streams=1 if unified else slots,
        slots=slots, unified=unified, ubatch=min(batch, ubatch), batch=batch,
    )  # fmt: skip


def pad(n: int) -> int:
    return -(-n // _PAD) * _PAD


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of one kind. layers: how many have a cache of their own. sharing: how many use another's. cells: in each
    stream. token_bytes: keys and values of one token in all of these layers."""

    window: int | None
    layers: int
    sharing: int
    cells: int
    token_bytes: int
    n_bytes: int


def groups(
    cache: Sequence[LayerCache], room: Cells, *, type_k: str, type_v: str, swa_full: bool, flash: bool
) -> list[Group]:
    """The caches, global layers first. ``flash`` off turns the values over, so that every layer's get the room of the
    widest. Raises BadOption where a head is not whole blocks of a quantized type."""
    if flash:  # which reads a head at a time
        for layer in cache:
            row_bytes(layer.k_dim, type_k, "a head")
            row_bytes(layer.v_dim, type_v, "a head")
    widest = max((layer.kv_heads * layer.v_dim for layer in cache), default=0)
    found = []
    for window in sorted({layer.window for layer in cache}, key=lambda window: window or 0):
        alike = [layer for layer in cache if layer.window == window]
        own = [layer for layer in alike if layer.owner is None]
        n_cells = room.of_layer(window, swa_full=swa_full)
        token_bytes = 0
        for layer in own:
            values = layer.kv_heads * layer.v_dim if flash else widest
            token_bytes += row_bytes(layer.kv_heads * layer.k_dim, type_k) + row_bytes(values, type_v)
        found.append(
            Group(
                window=window, layers=len(own), sharing=len(alike) - len(own), cells=n_cells,
                token_bytes=token_bytes, n_bytes=token_bytes * n_cells * room.streams,
            )
        )  # fmt: skip
    return found


def row_bytes(n: int, kv_type: str, of: str = "a token") -> int:
    """Bytes of ``n`` cached elements. Raises BadOption where they are not whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kv_type.upper()]]
    if n % block:
        found = f"{n} elements of {of}"
        raise BadOption(f"a {kv_type} cache is whole blocks", found=found, expected=f"a multiple of {block}")
    return n // block * size
