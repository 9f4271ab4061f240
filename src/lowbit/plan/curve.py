"""Memory against context: what a plot of a plan is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit.errors import BadOption, Unsupported
from lowbit.plan import runtimes
from lowbit.plan.made import plan_open
from lowbit.plan.model import PlanModel
from lowbit.plan.options import PlanOptions

_EARLY = (256, 1024, 2048, 4096)  # tokens: where windows fill up
_EVEN = 16


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: what it is of, and its points (tokens of context a slot, bytes in all), the shortest context first."""

    label: str
    points: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "points": [list(point) for point in self.points]}


def curves(
    model: PlanModel, options: PlanOptions, *, gpu: bool = False, kv_types: Sequence[str] | None = None
) -> tuple[Curve, ...]:
    """A line for each usual KV type of the runtime, and for the one that was asked for; none for those it refuses."""
    runtime = runtimes.get(options.runtime)
    asked = (options.kv_type_k,) if options.kv_type_k and options.kv_type_k == options.kv_type_v else ()
    found = []
    for kv_type in dict.fromkeys((*asked, *(kv_types or runtime.usual_kv_types))):
        try:
            points = _points(model, replace(options, kv_type_k=kv_type, kv_type_v=kv_type), gpu)
        except (BadOption, Unsupported):
            continue
        found.append(Curve(label=kv_type, points=points))
    return tuple(found)


def _points(model: PlanModel, options: PlanOptions, gpu: bool) -> tuple[tuple[int, int], ...]:
    runtime, most = runtimes.get(options.runtime), model.trained_context
    caches = 1 if options.kv_unified or options.slots is None else options.slots
    found = []
    for context in sorted({min(n, most) for n in _EARLY} | {most * i // _EVEN for i in range(1, _EVEN + 1)} - {0}):
        made = plan_open(model, replace(options, context=context * caches))
        found.append((context, sum(row.bytes for row in runtime.resident(made, gpu=gpu))))
    return tuple(found)
