"""The question turned round: given so much memory, the longest context, and which models and formats fit.

Every answer is found by asking for plans: there is no second formula. A longer context never takes less, so the search
is by halves, and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbit import console
from lowbit.errors import BadOption, Unsupported
from lowbit.plan import catalogue, runtimes
from lowbit.plan.catalogue import Listed
from lowbit.plan.made import plan_open
from lowbit.plan.model import PlanModel, open_listed, open_model
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan
from lowbit.plan.runtimes.base import Runtime
from lowbit.units import format_bytes

SLOTS = (1, 2, 4, 8)
AS_ASKED = "as asked"
LEAST = 256  # tokens a slot: below that nothing is said to fit


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How much memory there is.

    room:     bytes in all
    margin:   bytes of it that stay free; None means the runtime's own habit (llama.cpp: 1 GiB, as its --fit)
    gpu:      the memory is a GPU's, and what the program itself takes lies elsewhere
    kv_types: None means the usual ones of the runtime
    slots:    None means 1, 2, 4, 8 for a model, and 1 for a family
    recipes:  of a family's models; None means the usual ones of the runtime
    """

    room: int
    margin: int | None = None
    gpu: bool = False
    kv_types: Sequence[str] | None = None
    slots: Sequence[int] | None = None
    recipes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.room <= 0:
            raise BadOption("there is no memory to fit into", found=self.room)
        if self.margin is not None and not 0 <= self.margin < self.room:
            found = f"{format_bytes(self.margin)} of {format_bytes(self.room)}"
            raise BadOption("the margin leaves no memory", found=found, expected="less than all of it")


@dataclass(frozen=True, kw_only=True)
class Best:
    """The longest context of one choice. context_per_slot: 0 where not even a short one fits. limit: 'memory',
    'training' where it reaches what the model was trained for, or a sentence where the runtime refuses the choice.
    least_bytes: what the shortest context takes."""

    model: str
    recipe: str | None
    kv_type: str
    slots: int
    context_per_slot: int
    limit: str
    total_bytes: int
    weights_bytes: int
    least_bytes: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fits. usable_bytes: what is left of ``room_bytes`` beside the margin."""

    name: str
    runtime: str
    room_bytes: int
    margin_bytes: int
    margin_why: str
    gpu: bool
    best: tuple[Best, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def usable_bytes(self) -> int:
        return self.room_bytes - self.margin_bytes

    @property
    def is_family(self) -> bool:
        """Whether it is about more than one model."""
        return len({best.model for best in self.best}) > 1

    def to_json(self) -> dict[str, Any]:
        """name, runtime, room_bytes, margin_bytes, margin_why, usable_bytes, gpu, best (a Best each), notes."""
        found = asdict(self) | {"usable_bytes": self.usable_bytes}
        return found | {"best": [asdict(best) for best in self.best], "notes": list(self.notes)}


def fit(model: str | Path, options: PlanOptions, fit_options: FitOptions) -> Fit:
    """What of ``model`` fits: a model as ``lowbit.plan`` takes it, or the name of a family ('gemma-4').

    Raises Unsupported, saying what would fit, where nothing does; and what ``lowbit.plan`` raises.
    """
    known = catalogue.find(model) if isinstance(model, str) and not Path(model).expanduser().exists() else ()
    if len(known) > 1:
        found = fit_family(str(model), known, options, fit_options)
    else:
        with open_model(model) as opened:
            found = fit_model(opened, options, fit_options)
    if refused := nothing_fits(found):
        raise refused
    return found


def fit_model(model: PlanModel, options: PlanOptions, fit: FitOptions) -> Fit:
    """The longest context of one model for each KV type and number of slots."""
    runtime = _runtime(options, fit)
    best = [
        _choice(model, replace(options, slots=slots, kv_type_k=kv_type, kv_type_v=kv_type), fit)
        for kv_type in fit.kv_types or runtime.usual_kv_types
        for slots in fit.slots or SLOTS
    ]
    return _fit(model.name, runtime, fit, best)


def fit_family(name: str, models: Sequence[Listed], options: PlanOptions, fit: FitOptions) -> Fit:
    """The longest context of every model of a family in every usual format and KV type."""
    runtime = _runtime(options, fit)
    choices = [
        {"recipe": recipe, "kv_type_k": kv_type, "kv_type_v": kv_type, "slots": slots}
        for recipe in fit.recipes or runtime.recipes
        for kv_type in fit.kv_types or runtime.usual_kv_types
        for slots in fit.slots or (1,)
    ]
    best: list[Best] = []
    with console.progress(f"planning {name}", len(models) * len(choices), "choices") as bar:
        for listed in models:
            with open_listed(listed) as model:
                for choice in choices:
                    best.append(_choice(model, replace(options, **choice), fit))  # type: ignore[arg-type]
                    bar.advance(1)
    # A KV type that no model of the family can have is a remark, not a column.
    possible = {b.kv_type for b in best if b.least_bytes}
    found = _fit(name, runtime, fit, best)
    return replace(found, best=tuple(b for b in best if b.kv_type in possible or not possible))


def longest(model: PlanModel, options: PlanOptions, fit: FitOptions) -> Best:
    """The longest context that leaves the margin free, at most what the model was trained for. Raises BadOption or
    Unsupported where the runtime refuses the options."""
    runtime, slots = runtimes.get(options.runtime), options.slots or 1
    usable = fit.room - _margin(runtime, fit)[0]
    caches = 1 if options.kv_unified else slots  # slots share a unified cache, and one may have all of it
    made: dict[int, Plan] = {}

    def bytes_of(per_slot: int) -> int:
        if per_slot not in made:
            made[per_slot] = plan_open(model, replace(options, context=per_slot * caches))
        return sum(row.bytes for row in runtime.resident(made[per_slot], gpu=fit.gpu))

    low, high = min(LEAST, model.trained_context), model.trained_context
    least = bytes_of(low)
    if least > usable:
        low = high = 0
    elif bytes_of(high) <= usable:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= usable else (low, middle)
    found = made[low] if low else made[min(LEAST, model.trained_context)]
    rows = runtime.resident(found, gpu=fit.gpu)
    return Best(
        model=model.name, recipe=found.settings["recipe"], kv_type=options.kv_type_k, slots=slots,
        context_per_slot=low, limit="training" if low == model.trained_context else "memory",
        total_bytes=sum(row.bytes for row in rows), least_bytes=least,
        weights_bytes=sum(row.bytes for row in rows if row.part == "weights"),
    )  # fmt: skip


def _choice(model: PlanModel, options: PlanOptions, fit: FitOptions) -> Best:
    """The longest context, or one of 0 with the sentence in which the runtime refuses the choice."""
    try:
        return longest(model, options, fit)
    except (BadOption, Unsupported) as refused:
        found = f"; found {refused.found}" if refused.found else ""
        return Best(
            model=model.name, recipe=options.recipe, kv_type=options.kv_type_k, slots=options.slots or 1,
            context_per_slot=0, limit=f"{refused.what}{found}", total_bytes=0, weights_bytes=0, least_bytes=0,
        )  # fmt: skip


def _runtime(options: PlanOptions, fit: FitOptions) -> Runtime:
    """The runtime, if it has the KV types that are asked for."""
    runtime = runtimes.get(options.runtime)
    for kv_type in fit.kv_types or ():
        if kv_type not in runtime.kv_types:
            expected = ", ".join(runtime.kv_types)
            raise BadOption(f"{runtime.name} has no such KV type", found=kv_type[:40], expected=expected)
    return runtime


def _margin(runtime: Runtime, fit: FitOptions) -> tuple[int, str]:
    if fit.margin is not None:
        return fit.margin, AS_ASKED
    return min(runtime.margin(fit.room), fit.room), runtime.margin_why


def _fit(name: str, runtime: Runtime, fit: FitOptions, best: Sequence[Best]) -> Fit:
    margin, why = _margin(runtime, fit)
    return Fit(
        name=name, runtime=runtime.name, room_bytes=fit.room, margin_bytes=margin, margin_why=why, gpu=fit.gpu,
        best=tuple(best), notes=_notes(best),
    )  # fmt: skip


def _notes(best: Sequence[Best]) -> tuple[str, ...]:
    """What the marks of a table mean: all of the trained context, nothing, and what the runtime refuses."""
    found = []
    if any(b.limit == "training" for b in best):
        found.append("*: all of the context that the model was trained for")
    if any(b.least_bytes and not b.context_per_slot for b in best):
        found.append(f"–: not even {LEAST} tokens fit")
    refused = dict.fromkeys(one.limit for one in best if not one.least_bytes)
    found += [f"no: {why}" for why in refused]
    return tuple(found)


def nothing_fits(fit: Fit) -> Unsupported | None:
    """The error of a model of which no choice fits, saying what would; None where something does."""
    if any(best.context_per_slot for best in fit.best):
        return None
    asked = [best for best in fit.best if best.least_bytes]
    if not asked:
        return Unsupported(fit.best[0].limit, where=fit.name)
    least = min(asked, key=lambda best: best.least_bytes)
    needs = least.least_bytes + fit.margin_bytes
    if fit.margin_why != AS_ASKED:  # of a larger room a larger part stays free
        needs = least.least_bytes
        for _ in range(64):
            needs = least.least_bytes + runtimes.get(fit.runtime).margin(needs)
    return Unsupported(
        "nothing fits", where=fit.name,
        found=f"{format_bytes(fit.room_bytes)}, of which {format_bytes(fit.margin_bytes)} stay free",
        expected=f"{format_bytes(needs)} for {least.model} in {least.recipe or 'its own types'} with {LEAST} tokens of "
        f"context in {least.kv_type}, {least.slots} slot{'s' if least.slots > 1 else ''}",
        hint="Take a smaller --recipe or model, or a smaller --margin",
    )  # fmt: skip
