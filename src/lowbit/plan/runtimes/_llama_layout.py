"""What llama.cpp is asked: how it lays out a model, its contexts, a drafter beside it and a projector."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CannotWrite, RuntimeFailed, Unsupported
from lowbit.plan.header import header_only
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.run._dry_run import ContextMemory, DryRun, LaidOut

_MOST_CELLS = 1 << 22  # llama.cpp lists every cell even where it allocates no cache
_NOT_TO_BE_ASKED = ("unknown model architecture", "memory breakdown")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that will be loaded: its tensors, the file that stands for them (None: a header is written), the fields
    of llama_context_params that its context gets, and the cells that it makes."""

    model: PlanModel
    tensors: Sequence[PlannedTensor]
    path: Path | None
    context: Mapping[str, Any]
    cells: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What llama.cpp said of a model and its context. process_bytes: of a process with the library and no model."""

    model: LaidOut
    context: ContextMemory
    process_bytes: int


def lay_out(keeper: PlanModel, loaded: Sequence[Loaded]) -> list[Layout] | None:
    """The layouts of models that are loaded together, a drafter after its target. ``keeper`` keeps the process.

    None where no llama.cpp is installed that can be asked, or where it does not know an architecture. Raises BadFile or
    Unsupported where it refuses a model.
    """
    dry = _dry_run(keeper)
    if dry is None or any(one.cells > _MOST_CELLS for one in loaded):
        return None
    try:
        models = [_laid_out(keeper, dry, one) for one in loaded]
        contexts = dry.contexts([(model, one.context) for model, one in zip(models, loaded, strict=True)])
    except CannotWrite:  # no room for a header, or no holes in this file system
        return None
    except Unsupported as error:
        if any(said in str(error) for said in _NOT_TO_BE_ASKED):
            return None
        raise
    return [
        Layout(model=model, context=context, process_bytes=dry.process_bytes)
        for model, context in zip(models, contexts, strict=True)
    ]


def projector_bytes(keeper: PlanModel, path: Path, *, flash: int) -> int | None:
    """Weights and compute buffers of an mmproj for the largest image; None where it cannot be asked."""
    dry = _dry_run(keeper)
    return None if dry is None else dry.projector(path, flash=flash)


def _dry_run(keeper: PlanModel) -> DryRun | None:
    try:
        return keeper.keep("dry run", DryRun)
    except RuntimeFailed:
        return None


def _laid_out(keeper: PlanModel, dry: DryRun, one: Loaded) -> LaidOut:
    path = one.path
    if path is None:
        key = ("header", one.model.path, tuple((tensor.name, tensor.dtype) for tensor in one.tensors))
        path = keeper.keep(key, lambda: header_only(one.model, one.tensors))
    return keeper.keep(("laid out", path), lambda: contextlib.nullcontext(dry.model(path, one.model.path)))
