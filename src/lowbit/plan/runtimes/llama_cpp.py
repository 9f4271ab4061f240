"""llama.cpp on a CPU, started as llama-server starts it.

The cache follows from the config by formula (_llama_kv.py). Weights as loaded and compute buffers are llama.cpp's own
figures: it lays the model out without allocating anything (_llama_layout.py), from the GGUF or from a header written
for the config. Where the installed llama.cpp cannot be asked they are estimates, and the rows say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowbit.checkpoint.families.base import TARGET
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.projectors.base import Projector
from lowbit.checkpoint.resolve import resolve
from lowbit.errors import BadOption, Unsupported
from lowbit.plan.model import PlanModel, PlannedTensor, open_model
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan, Row
from lowbit.plan.runtimes import _llama_kv, _llama_layout, _llama_rows
from lowbit.plan.runtimes._llama_layout import Layout, Loaded
from lowbit.plan.runtimes.base import Runtime
from lowbit.run._kv_types import KV_TYPES, UNQUANTIZED
from lowbit.units import format_bytes

DEFAULT_RECIPE = "q4_0"
_DEFAULT_KV = "f16"
_AUTO_SLOTS = 4  # of llama-server, with a unified cache
_DRAFTED = 3  # --spec-draft-n-max: tokens that a slot's drafter proposes, scored with the one before them
_CHECKPOINTS = 32  # --ctx-checkpoints
_NOT_GGUF = ("mlx_", "int4_")


class LlamaCpp(Runtime):
    name = "llama.cpp"
    kv_types = (_DEFAULT_KV, *(name for name in KV_TYPES if name != _DEFAULT_KV))
    usual_kv_types = (_DEFAULT_KV, "q8_0", "q4_0")
    recipes = ("q4_0", "q4_k_m", "q8_0", "bf16")
    margin_why = "llama.cpp's own: --fit leaves 1024 MiB free"

    def resident(self, plan: Plan, *, gpu: bool) -> tuple[Row, ...]:
        """One of the two copies of repacked weights: pages of a mapped file that were copied are not read again, and
        the system lets go of them first. On a GPU nothing is copied."""
        twice = _llama_rows.REPACKED if plan.settings["mmap"] else None
        return tuple(row for row in super().resident(plan, gpu=gpu) if not (twice and row.what.endswith(twice)))

    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        room, (type_k, type_v) = room_of(model, options), cache_types(options)
        return {
            "context": room.context,
            "context_per_slot": room.per_slot,
            "slots": room.slots,
            "kv_unified": room.unified,
            "kv_type_k": type_k,
            "kv_type_v": type_v,
            "flash_attention": _flash(options),
            "swa_full": options.swa_full,
            "batch": room.batch,
            "ubatch": room.ubatch,
            "mmap": options.mmap,
            "recipe": options.recipe or (None if model.gguf else DEFAULT_RECIPE),
        }

    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        type_k, type_v = cache_types(options)
        parts = self._parts(model, dataclasses.replace(options, kv_type_k=type_k, kv_type_v=type_v))
        rows = [row for part in parts for row in _llama_rows.rows(part)]
        if options.mmproj is not None:
            rows += _projector_rows(model, options)
        return (*rows, *_llama_rows.process(parts[0].layout))

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        room, found = room_of(model, options), []
        if room.per_slot > model.trained_context:
            found.append(f"a slot can go beyond the {model.trained_context:,} tokens that the model was trained for")
        windows = [
            group.token_bytes * group.cells
            for group in _groups(model, options)
            if group.window is not None and not options.swa_full
        ]
        if windows:
            each = format_bytes(sum(windows))
            found.append(
                f"llama-server may keep up to {_CHECKPOINTS} checkpoints of the sliding layers for each slot "
                f"(--ctx-checkpoints), each at most {each}: not counted"
            )
        found.append("llama-server may keep up to 8 GiB of finished prompts' caches (--cache-ram): not counted")
        return tuple(found)

    def _parts(self, model: PlanModel, options: PlanOptions) -> list[_llama_rows.Part]:
        """The target, and its drafter if there is one."""
        room = room_of(model, options)
        every = [(model, options, room.slots, 0)]
        if options.drafter is not None:
            drafter = model.keep(("drafter", str(options.drafter)), lambda: open_model(options.drafter or ""))
            states = _shared_states(model, drafter)
            drafts = min(room.batch, room.slots * (1 + _DRAFTED))
            own = dataclasses.replace(options, kv_type_k=_DEFAULT_KV, kv_type_v=_DEFAULT_KV, context=room.context)
            every = [
                (model, options, drafts, states * room.batch),
                (drafter, own, room.slots, states * room.slots),
            ]
        loaded = [
            Loaded(
                model=one, tensors=_tensors(one, own), context=context_params(one, own, outputs),
                path=one.gguf if own.recipe is None else None, cells=room_of(one, own).context,
            )
            for one, own, outputs, _ in every
        ]  # fmt: skip
        layouts: Sequence[Layout | None] = _llama_layout.lay_out(model, loaded) or [None] * len(loaded)
        return [
            _llama_rows.Part(
                model=one, options=own, room=room_of(one, own), flash=_flash(own), tensors=load.tensors, layout=layout,
                outputs=outputs, state_floats=states, drafter=one is not model,
            )
            for (one, own, outputs, states), load, layout in zip(every, loaded, layouts, strict=True)
        ]  # fmt: skip


def room_of(model: PlanModel, options: PlanOptions) -> _llama_kv.Cells:
    """The cells that these options make room for. Raises BadOption."""
    cache_types(options)
    slots = _AUTO_SLOTS if options.slots is None else options.slots
    unified = options.slots is None if options.kv_unified is None else options.kv_unified
    context = options.context or model.trained_context
    return _llama_kv.cells(context, slots=slots, unified=unified, batch=options.batch, ubatch=options.ubatch)


def cache_types(options: PlanOptions) -> tuple[str, str]:
    """The types of cached keys and values. Raises BadOption."""
    types = options.kv_type_k or _DEFAULT_KV, options.kv_type_v or _DEFAULT_KV
    for name, kind in zip(("kv_type_k", "kv_type_v"), types, strict=True):
        if kind not in KV_TYPES:
            raise BadOption(f"unknown {name}", found=repr(kind)[:40], expected="one of " + ", ".join(LlamaCpp.kv_types))
    return types


def context_params(model: PlanModel, options: PlanOptions, outputs: int | None = None) -> dict[str, Any]:
    """Fields of llama_context_params, as llama-server sets them. outputs: tokens scored at a time, one a slot."""
    room, (type_k, type_v) = room_of(model, options), cache_types(options)
    outputs = room.slots if outputs is None else outputs
    return {
        "n_ctx": options.context,
        "n_batch": options.batch,
        "n_ubatch": options.ubatch,
        "n_seq_max": room.slots,
        "n_outputs_max": min(options.batch, outputs),
        "n_outputs_max_per_seq": -(-outputs // room.slots),
        "type_k": KV_TYPES[type_k],
        "type_v": KV_TYPES[type_v],
        "flash_attn_type": _flash_type(options),
        "swa_full": options.swa_full,
        "kv_unified": room.unified,
    }


def _flash(options: PlanOptions) -> bool:
    """Flash attention, which llama.cpp turns on by itself on a CPU. Raises BadOption where the cache needs it."""
    if options.flash_attention is False and cache_types(options)[1] not in UNQUANTIZED:
        raise BadOption(
            "llama.cpp keeps quantized values only with flash attention", found=f"kv_type_v {cache_types(options)[1]}",
            hint="Leave flash attention on, or keep the values in f16",
        )  # fmt: skip
    return options.flash_attention is not False


def _flash_type(options: PlanOptions) -> int:
    return {None: -1, True: 1, False: 0}[options.flash_attention]


def _tensors(model: PlanModel, options: PlanOptions) -> tuple[PlannedTensor, ...]:
    if options.recipe and options.recipe.startswith(_NOT_GGUF):
        raise BadOption("llama.cpp does not run this format", found=options.recipe, expected="one of GGUF's")
    if options.recipe is None and model.gguf:
        return model.stored
    return model.packed(options.recipe or DEFAULT_RECIPE)


def _groups(model: PlanModel, options: PlanOptions) -> list[_llama_kv.Group]:
    type_k, type_v = cache_types(options)
    return _llama_kv.groups(
        model.cache, room_of(model, options), type_k=type_k, type_v=type_v,
        swa_full=options.swa_full, flash=_flash(options),
    )  # fmt: skip


def _shared_states(model: PlanModel, drafter: PlanModel) -> int:
    """Width of the hidden states that a drafter without a cache of its own takes from its target, else 0.

    Raises BadOption where it is a drafter for another model.
    """
    if not any(layer.owner == TARGET for layer in drafter.cache):
        return 0
    width, backbone = model.config.get("hidden_size"), drafter.config["backbone_hidden_size"]
    if model.architecture != "gemma4" or width != backbone:
        raise BadOption(
            "this drafter is for another model", found=f"{drafter.path}: a target of width {backbone}",
            expected=f"width {width}" if model.architecture == "gemma4" else "a Gemma 4",
        )  # fmt: skip
    return int(backbone)


def _projector_rows(model: PlanModel, options: PlanOptions) -> list[Row]:
    path = resolve(options.mmproj or "")
    if path.is_dir():
        raise Unsupported("not an mmproj", where=path, hint="Give the GGUF that lowbit pack --mmproj writes")
    file = GgufFile(path)
    try:
        found = file.values.get("general.architecture")
        if found != Projector.arch:
            raise Unsupported("not an mmproj", where=path, found=str(found)[:40], expected=Projector.arch)
        both = _llama_layout.projector_bytes(model, path, flash=_flash_type(options))
        return list(_llama_rows.projector(file, both))
    finally:
        file.close()


RUNTIME = LlamaCpp()
