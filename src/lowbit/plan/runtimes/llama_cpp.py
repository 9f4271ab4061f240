"""llama.cpp on a CPU, started as llama-server starts it.

The cache follows from the config by formula (_llama_kv.py). Weights as loaded and compute buffers are llama.cpp's own
figures: it lays the model out without allocating anything (lowbit.run._dry_run), from the GGUF or from a header
written for the config. Where the installed llama.cpp cannot, they are estimates, and the rows say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import BadOption, RuntimeFailed, Unsupported
from lowbit.plan.header import header_only
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan, Row
from lowbit.plan.runtimes import _llama_kv, _llama_scratch
from lowbit.plan.runtimes.base import Runtime
from lowbit.run._dry_run import ContextMemory, DryRun, LaidOut
from lowbit.run.llama_cpp import KV_TYPES
from lowbit.units import GIB, MIB, format_bytes

DEFAULT_RECIPE = "q4_0"
_AUTO_SLOTS = 4  # of llama-server, with a unified cache
_FLOATS = ("f16", "f32", "bf16")
REPACKED = "repacked weights"
_FORMULA, _ESTIMATE, _MEASURED, _DRY = "formula", "estimate", "measured", "llama.cpp's own layout"
_LAZY = (("gemma4", "per_layer_token_embd.weight"),)  # TENSOR_READ_LAZY in src/models
_LAZY_BYTES = 4 * GIB  # LLAMA_LAZY_MODE_AUTO: larger ones of these are read row by row as they are asked for
# src/llama-kv-cells.h: position, shift, 2D position, sequences; two tree nodes once the cell is used
_CELL_BYTES = 52 + 2 * 48
_CANDIDATE_BYTES = 12  # llama_token_data: id, logit, probability
# Seen on Linux, x86-64: pages of the library that the first graph faults in, and what the server itself allocates.
_SERVER_BYTES = 7 * MIB
_PROGRAM_BYTES = 22 * MIB
_TOKEN_BYTES, _MERGE_BYTES = 230, 270  # of a vocabulary in llama.cpp
_MERGES = {"gemma3": 0, "gemma3n": 0, "gemma4": 2}  # for each token; others have about one


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What llama.cpp said of a model and a context; ``process_bytes`` of the process that asked it."""

    model: LaidOut
    context: ContextMemory
    process_bytes: int


class LlamaCpp(Runtime):
    name = "llama.cpp"
    kv_types = ("f16", *(name for name in KV_TYPES if name != "f16"))
    usual_kv_types = ("f16", "q8_0", "q4_0")
    recipes = ("q4_0", "q4_k_m", "q8_0", "bf16")
    margin_why = "llama.cpp's own: --fit leaves 1024 MiB free"

    def resident(self, plan: Plan, *, gpu: bool) -> tuple[Row, ...]:
        """One of the two copies of repacked weights: pages of a mapped file that were copied are not read again, and
        the system lets go of them first. On a GPU nothing is copied."""
        twice = REPACKED if plan.settings["mmap"] else None
        return tuple(row for row in super().resident(plan, gpu=gpu) if row.what != twice)

    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        room, flash = _room(model, options), _flash(options)
        return {
            "context": room.context,
            "context_per_slot": room.per_slot,
            "slots": room.slots,
            "kv_unified": room.unified,
            "kv_type_k": options.kv_type_k,
            "kv_type_v": options.kv_type_v,
            "flash_attention": flash,
            "swa_full": options.swa_full,
            "batch": room.batch,
            "ubatch": room.ubatch,
            "mmap": options.mmap,
            "recipe": options.recipe or (None if model.gguf else DEFAULT_RECIPE),
        }

    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        room = _room(model, options)
        tensors = _tensors(model, options)
        layout = _lay_out(model, options, tensors)
        return (
            *_weight_rows(model, tensors, options, layout),
            *_kv_rows(model, options, room, layout),
            *_scratch_rows(model, options, room, layout),
            *_process_rows(model, room, layout),
        )

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        found = []
        room = _room(model, options)
        if room.per_slot > model.trained_context:
            found.append(f"a slot may go beyond the {model.trained_context:,} tokens that the model was trained for")
        found.append("llama-server keeps up to 8 GiB more of finished slots' caches (--cache-ram); not counted here")
        return tuple(found)


def _room(model: PlanModel, options: PlanOptions) -> _llama_kv.Cells:
    for name, kind in (("kv_type_k", options.kv_type_k), ("kv_type_v", options.kv_type_v)):
        if kind not in KV_TYPES:
            raise BadOption(f"unknown {name}", found=repr(kind)[:40], expected="one of " + ", ".join(LlamaCpp.kv_types))
    slots = _AUTO_SLOTS if options.slots is None else options.slots
    unified = options.slots is None if options.kv_unified is None else options.kv_unified
    context = options.context or model.trained_context
    return _llama_kv.cells(context, slots=slots, unified=unified, batch=options.batch, ubatch=options.ubatch)


def _flash(options: PlanOptions) -> bool:
    """Flash attention, which llama.cpp turns on by itself on a CPU. Raises BadOption where the cache needs it."""
    if options.flash_attention is False and options.kv_type_v not in _FLOATS:
        raise BadOption(
            "llama.cpp keeps quantized values only with flash attention", found=f"kv_type_v {options.kv_type_v}",
            hint="Leave flash attention on, or keep the values in f16",
        )  # fmt: skip
    return options.flash_attention is not False


def _tensors(model: PlanModel, options: PlanOptions) -> tuple[PlannedTensor, ...]:
    if options.recipe is None and model.gguf:
        return model.stored
    return model.packed(options.recipe or DEFAULT_RECIPE)


def _lay_out(model: PlanModel, options: PlanOptions, tensors: Sequence[PlannedTensor]) -> _Layout | None:
    """None where no llama.cpp is installed that can be asked, or where it does not know the architecture."""
    try:
        dry = model.keep("dry run", DryRun)
    except RuntimeFailed:
        return None
    try:
        if options.recipe is None and model.gguf:
            path = model.gguf
        else:
            path = model.keep(("header", options.recipe), lambda: header_only(model, tensors))
        laid_out = model.keep(("laid out", path), lambda: contextlib.nullcontext(dry.model(path, model.path)))
        context = dry.contexts([(laid_out, context_params(model, options))])[0]
    except Unsupported as error:
        if "unknown model architecture" in str(error) or "memory breakdown" in str(error):
            return None
        raise
    return _Layout(model=laid_out, context=context, process_bytes=dry.process_bytes)


def context_params(model: PlanModel, options: PlanOptions) -> dict[str, Any]:
    """Fields of llama_context_params, as llama-server sets them."""
    room = _room(model, options)
    return {
        "n_ctx": options.context,
        "n_batch": options.batch,
        "n_ubatch": options.ubatch,
        "n_seq_max": room.slots,
        "n_outputs_max": min(options.batch, room.slots),
        "type_k": KV_TYPES[options.kv_type_k],
        "type_v": KV_TYPES[options.kv_type_v],
        "flash_attn_type": {None: -1, True: 1, False: 0}[options.flash_attention],
        "swa_full": options.swa_full,
        "kv_unified": room.unified,
    }


def _weight_rows(
    model: PlanModel, tensors: Sequence[PlannedTensor], options: PlanOptions, layout: _Layout | None
) -> list[Row]:
    lazy = [t for t in tensors if (model.architecture, t.name) in _LAZY and t.n_bytes > _LAZY_BYTES and options.mmap]
    size = sum(t.n_bytes for t in tensors) - sum(t.n_bytes for t in lazy)
    n = sum(t.n_weights for t in tensors)
    types = {t.dtype: 0 for t in tensors}
    for tensor in tensors:
        types[tensor.dtype] += tensor.n_bytes
    mostly = ", ".join(f"{name} {format_bytes(types[name])}" for name in sorted(types, key=lambda t: -types[t])[:3])
    repacked = layout.context.memory.get("CPU_REPACK") if layout else None
    if not options.mmap and repacked:
        size -= repacked.model
    how = "mapped from the file, and resident once they are read" if options.mmap else "read from the file"
    rows = [Row(part="weights", what="weights", bytes=size, why=f"{n:,} weights ({mostly}), {how}", found="file")]
    for tensor in lazy:
        why = f"{format_bytes(tensor.n_bytes)} stay on disk; rows are read as their tokens come"
        rows.append(Row(part="weights", what=tensor.name, bytes=0, why=why, found=_FORMULA))
    if repacked:
        why = "copies in an order that this CPU computes faster with" + (", beside the mapped file" * options.mmap)
        rows.append(Row(part="weights", what=REPACKED, bytes=repacked.model, why=why, found=_DRY))
    return rows


def _kv_rows(model: PlanModel, options: PlanOptions, room: _llama_kv.Cells, layout: _Layout | None) -> list[Row]:
    if not model.family:
        if layout is None:
            raise Unsupported("neither lowbit nor the installed llama.cpp knows this architecture", where=model.path)
        size, why = layout.context.total("context"), "this architecture's cache or state, as llama.cpp lays it out"
        return [Row(part="kv", what="KV cache", bytes=size, why=why, found=_DRY)]
    groups = _llama_kv.groups(
        model.cache, room, type_k=options.kv_type_k, type_v=options.kv_type_v, swa_full=options.swa_full,
        flash=_flash(options),
    )  # fmt: skip
    rows = [_kv_row(group, room, options) for group in groups if group.layers]
    told = layout.context.total("context") if layout else None
    if told is not None and told != sum(row.bytes for row in rows):
        why = f"as llama.cpp lays it out; lowbit's formula gives {sum(row.bytes for row in rows):,} bytes"
        return [Row(part="kv", what="KV cache", bytes=told, why=why, found=_DRY)]
    return rows


def _kv_row(group: _llama_kv.Group, room: _llama_kv.Cells, options: PlanOptions) -> Row:
    kind = "global" if group.window is None else "sliding"
    if group.window is None:
        reason = f"{group.cells:,} cells"
    elif options.swa_full:
        reason = f"{group.cells:,} cells, all of the context (--swa-full)"
    elif group.cells >= room.per_slot:
        reason = f"{group.cells:,} cells: the context is no longer than the window"
    else:
        windows = f"{room.slots} windows" if room.unified and room.slots > 1 else "a window"
        reason = f"{group.cells:,} cells: {windows} of {group.window:,} and a ubatch of {room.ubatch}, rounded up"
    streams = f" for each of {room.streams} slots" if room.streams > 1 else ""
    types = options.kv_type_k if options.kv_type_k == options.kv_type_v else f"{options.kv_type_k}/{options.kv_type_v}"
    shared = f"; {group.sharing} layers use these" if group.sharing else ""
    return Row(
        part="kv", what=f"KV cache, {group.layers} {kind} layers", bytes=group.n_bytes,
        why=f"{reason}{streams} x {group.token_bytes:,} bytes a token in {types}{shared}", found=_FORMULA,
    )  # fmt: skip


def _scratch_rows(model: PlanModel, options: PlanOptions, room: _llama_kv.Cells, layout: _Layout | None) -> list[Row]:
    vocab = model.vocab_size
    output = Row(
        part="scratch", what="logits", bytes=room.slots * vocab * 4,
        why=f"{room.slots} slots x {vocab:,} scores in f32", found=_FORMULA,
    )  # fmt: skip
    why = f"the largest graph: {room.ubatch} tokens at {room.per_slot:,} of context, {room.slots} scored"
    if layout:
        size, found = layout.context.total("compute"), _DRY
    else:
        size, found = _llama_scratch.estimate(model, room, flash=_flash(options)), _llama_scratch.FOUND
    return [Row(part="scratch", what="compute buffer", bytes=size, why=why, found=found), output]


def _process_rows(model: PlanModel, room: _llama_kv.Cells, layout: _Layout | None) -> list[Row]:
    vocab = model.vocab_size

    def row(what: str, size: int, why: str, found: str) -> Row:
        return Row(part="process", what=what, bytes=size, why=why, found=found)

    rows = [
        row("cells", room.context * _CELL_BYTES, f"what is kept of each of {room.context:,} cells in use", _ESTIMATE),
        row(
            "samplers", room.slots * vocab * _CANDIDATE_BYTES,
            f"{room.slots} slots x {vocab:,} candidates of {_CANDIDATE_BYTES} bytes", _FORMULA,
        ),
        row("server", _SERVER_BYTES, "code that computing reads, threads, HTTP, chat template", _ESTIMATE),
    ]  # fmt: skip
    if layout is None:
        return [*rows, row("program", _PROGRAM_BYTES, "a process with llama.cpp loaded", _ESTIMATE)]
    rows.append(
        row("program", layout.process_bytes, "a bare process with llama.cpp loaded, on this machine", _MEASURED)
    )
    if model.gguf == layout.model.path:
        size = layout.model.metadata_bytes
        rows.append(row("vocabulary", size, f"{vocab:,} tokens and the file's other metadata, here", _MEASURED))
    else:
        each = _TOKEN_BYTES + _MERGES.get(model.architecture, 1) * _MERGE_BYTES
        rows.append(row("vocabulary", vocab * each, f"{vocab:,} tokens, about {each} bytes each", _ESTIMATE))
    return rows


RUNTIME = LlamaCpp()
