"""The rows of a plan for llama.cpp: what each allocation is, how large, why, and how that was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import Unsupported
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Row
from lowbit.plan.runtimes import _llama_kv, _llama_scratch
from lowbit.plan.runtimes._llama_layout import Layout
from lowbit.units import GIB, MIB, format_bytes

REPACKED = "repacked weights"
FORMULA, ESTIMATE, MEASURED, DRY = "formula", "estimate", "measured", "llama.cpp's own layout"
_LAZY = (("gemma4", "per_layer_token_embd.weight"),)  # TENSOR_READ_LAZY in src/models
_LAZY_BYTES = 4 * GIB  # LLAMA_LAZY_MODE_AUTO: larger ones of these are read row by row as they are asked for
# src/llama-kv-cells.h: position, shift, 2D position, sequences; two tree nodes once the cell is used
_CELL_BYTES = 52 + 2 * 48
_CANDIDATE_BYTES = 12  # llama_token_data: id, logit, probability
# Seen on Linux, x86-64: pages of the library that the first graph faults in, and what the server itself allocates.
_SERVER_BYTES = 8 * MIB
_PROGRAM_BYTES = 22 * MIB
_TOKEN_BYTES, _MERGE_BYTES = 230, 270  # of a vocabulary in llama.cpp
_MERGES = {"gemma3": 0, "gemma3n": 0, "gemma4": 2}  # for each token; others have about one


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a plan: the target, or with ``drafter`` the one that drafts for it.

    outputs: tokens scored at a time. state_floats: hidden states that the server takes out for a drafter.
    """

    model: PlanModel
    options: PlanOptions
    room: _llama_kv.Cells
    flash: bool
    tensors: Sequence[PlannedTensor]
    layout: Layout | None
    outputs: int
    state_floats: int = 0
    drafter: bool = False

    def row(self, part: str, what: str, size: int, why: str, found: str) -> Row:
        if self.drafter:
            part, what = "drafter", f"drafter: {what}"
        return Row(part=part, what=what, bytes=size, why=why, found=found)


def rows(part: Part) -> Iterator[Row]:
    """Weights, caches, compute and output buffers, and what the process keeps for them."""
    yield from _weights(part)
    yield from _caches(part)
    yield from _scratch(part)
    yield from _kept(part)


def process(layout: Layout | None) -> Iterator[Row]:
    """What the program takes whatever the model."""
    why = "code that computing reads, threads, HTTP, chat template"
    yield Row(part="process", what="server", bytes=_SERVER_BYTES, why=why, found=ESTIMATE)
    size, why, found = _PROGRAM_BYTES, "a process with llama.cpp loaded", ESTIMATE
    if layout:
        size, why, found = layout.process_bytes, "a bare process with llama.cpp loaded, on this machine", MEASURED
    yield Row(part="process", what="program", bytes=size, why=why, found=found)


def projector(file: GgufFile, both: int | None) -> Iterator[Row]:
    """``both``: weights and compute buffers as llama.cpp lays them out."""
    weights = sum(entry.n_bytes for entry in file.entries.values())
    why = f"{len(file.entries)} tensors of {file.path.name}, read from the file"
    yield Row(part="projector", what="projector: weights", bytes=weights, why=why, found="file")
    if both is not None:
        why = "the graph of the largest image"
        yield Row(
            part="projector", what="projector: compute buffer", bytes=max(0, both - weights), why=why, found=DRY
        )  # fmt: skip


def _weights(part: Part) -> Iterator[Row]:
    model, mmap = part.model, part.options.mmap
    lazy = [t for t in part.tensors if mmap and (model.architecture, t.name) in _LAZY and t.n_bytes > _LAZY_BYTES]
    size = sum(t.n_bytes for t in part.tensors) - sum(t.n_bytes for t in lazy)
    types: dict[str, int] = {}
    for tensor in part.tensors:
        types[tensor.dtype] = types.get(tensor.dtype, 0) + tensor.n_bytes
    mostly = ", ".join(f"{name} {format_bytes(types[name])}" for name in sorted(types, key=lambda t: -types[t])[:3])
    repacked = part.layout.context.memory.get("CPU_REPACK") if part.layout else None
    if not mmap and repacked:
        size -= repacked.model
    how = "mapped from the file, resident once read" if mmap else "read from the file"
    n = sum(t.n_weights for t in part.tensors)
    as_is = part.options.recipe is None and model.gguf
    yield part.row("weights", "weights", size, f"{n:,} weights ({mostly}), {how}", "file" if as_is else FORMULA)
    for tensor in lazy:
        why = f"{format_bytes(tensor.n_bytes)} stay on disk; rows are read as their tokens come"
        yield part.row("weights", tensor.name, 0, why, FORMULA)
    if repacked:
        why = "copies in an order that this CPU computes faster with"
        why += "; the mapped pages they came from can be given back" if mmap else ""
        yield part.row("weights", REPACKED, repacked.model, why, DRY)


def _caches(part: Part) -> Iterator[Row]:
    told = part.layout.context.total("context") if part.layout else None
    if not part.model.family:
        if told is None:
            raise Unsupported(
                "neither lowbit nor the installed llama.cpp knows this architecture", where=part.model.path
            )
        why = "this architecture's cache or state, as llama.cpp lays it out"
        yield part.row("kv", "KV cache", told, why, DRY)
        return
    options = part.options
    groups = _llama_kv.groups(
        part.model.cache, part.room, type_k=options.kv_type_k, type_v=options.kv_type_v, swa_full=options.swa_full,
        flash=part.flash,
    )  # fmt: skip
    size = sum(group.n_bytes for group in groups)
    if told not in (None, size):
        why = f"as llama.cpp lays it out; lowbit's formula gives {size:,} bytes"
        yield part.row("kv", "KV cache", told or 0, why, DRY)
        return
    if not size:
        yield part.row("kv", "KV cache", 0, "it attends to the target's", FORMULA)
    for group in groups:
        if group.layers:
            kind = "global" if group.window is None else "sliding"
            yield part.row("kv", f"KV cache, {group.layers} {kind} layers", group.n_bytes, _why(group, part), FORMULA)


def _why(group: _llama_kv.Group, part: Part) -> str:
    room, options = part.room, part.options
    if group.window is None:
        reason = f"{group.cells:,} cells"
    elif options.swa_full:
        reason = f"{group.cells:,} cells, all of the context (--swa-full)"
    elif group.cells >= room.per_slot:
        reason = f"{group.cells:,} cells: the context is no longer than the window and a ubatch"
    else:
        windows = f"{room.slots} windows" if room.unified and room.slots > 1 else "a window"
        reason = f"{group.cells:,} cells ({windows} of {group.window:,} and a ubatch of {room.ubatch}, rounded up)"
    streams = f" for each of {room.streams} slots" if room.streams > 1 else ""
    kinds = (options.kv_type_k, options.kv_type_v)
    types = kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} and {kinds[1]}"
    padded = "" if part.flash else ", every value as wide as the widest layer's without flash attention"
    shared = f"; {group.sharing} more layers use these" if group.sharing else ""
    return f"{reason}{streams} x {group.token_bytes:,} bytes a token in {types}{padded}{shared}"


def _scratch(part: Part) -> Iterator[Row]:
    room, vocab = part.room, part.model.vocab_size
    why = f"the largest graph: {room.ubatch} tokens at {room.per_slot:,} of context, {part.outputs} scored"
    if part.layout:
        size, found = part.layout.context.total("compute"), DRY
    else:
        size, found = _scratch_estimate(part), _llama_scratch.FOUND[part.flash]
    yield part.row("scratch", "compute buffer", size, why, found)
    work, why = _llama_scratch.work_buffer(part.model, part.tensors, room, part.options.kv_type_v, flash=part.flash)
    yield part.row("scratch", "work buffer", work, why, FORMULA)
    why = f"{part.outputs} tokens x {vocab:,} scores in f32"
    if part.state_floats:
        why += f", and {part.state_floats:,} hidden values for the drafter"
    yield part.row("scratch", "output buffer", (part.outputs * vocab + part.state_floats) * 4, why, FORMULA)


def _scratch_estimate(part: Part) -> int:
    swa_full = part.options.swa_full
    return _llama_scratch.estimate(part.model, part.room, part.outputs, flash=part.flash, swa_full=swa_full)


def _kept(part: Part) -> Iterator[Row]:
    room, vocab, layout = part.room, part.model.vocab_size, part.layout
    why = f"what is kept of each of {room.context:,} cells in use"
    yield part.row("process", "cells", room.context * _CELL_BYTES, why, ESTIMATE)
    why = f"{room.slots} slots x {vocab:,} candidates of {_CANDIDATE_BYTES} bytes"
    yield part.row("process", "samplers", room.slots * vocab * _CANDIDATE_BYTES, why, FORMULA)
    if layout and part.model.gguf == layout.model.path:
        why = f"{vocab:,} tokens and the file's other metadata, here"
        yield part.row("process", "vocabulary", layout.model.metadata_bytes, why, MEASURED)
    else:
        each = _TOKEN_BYTES + _MERGES.get(part.model.architecture, 1) * _MERGE_BYTES
        yield part.row("process", "vocabulary", vocab * each, f"{vocab:,} tokens, about {each} bytes each", ESTIMATE)
