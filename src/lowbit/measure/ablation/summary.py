"""From outcomes to figures: each set of layers, and its difference from the whole harness, paired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowbit.measure import statistics
from lowbit.measure.bootstrap import Bootstrap

Outcome = Mapping[str, Any]
Outcomes = Mapping[str, Mapping[str, Outcome]]  # by question, then by set of layers
_MEANS = {"tries": "requests", "tokens": "tokens", "seconds": "s"}


def of_model(name: str, done: Outcomes, *, whole: str, bare: str, left_out: int) -> dict[str, Any]:
    """{"name", "questions", "left_out", "variants": [...], "groups": {...}, "faults": {...}}.

    A variant is {"name", "valid", "right", "unsafe", "errors", "tries", "tokens", "seconds", "events", "against":
    {"valid", "right"}}. valid and right are shares with Wilson's interval; unsafe is the share of answers that were
    handed on and are not valid; errors counts honest errors by code. against is the paired difference from the whole
    harness (McNemar, Newcombe's interval), corrected (Holm) for how many sets there are. groups has valid and right of
    each group and variant; faults the same of each kind of damage that the bare model's first answer had.
    """
    listed = list(done.values())
    names = list(listed[0]) if listed else []
    variants = [_variant(v, [outcomes[v] for outcomes in listed]) for v in names]
    for metric in ("valid", "right"):
        others = [v for v in names if v != whole]
        compared = [statistics.of_items(_flags(listed, whole, metric), _flags(listed, v, metric)) for v in others]
        fixed = dict(zip(others, statistics.corrected(compared), strict=True))
        for entry in variants:
            if entry["name"] in fixed:
                entry["against"][metric] = fixed[entry["name"]].as_json()
    return {
        "name": name, "questions": len(listed), "left_out": left_out, "variants": variants,
        "groups": _by(listed, names, lambda outcomes: str(outcomes[whole]["group"])),
        "faults": _by([o for o in listed if _fault(o, bare)], names, lambda outcomes: _fault(outcomes, bare)),
    }  # fmt: skip


def _variant(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    errors, events = Counter[str](), Counter[str]()
    for outcome in outcomes:
        errors.update([outcome["error"]] if outcome["error"] else [])
        events.update(outcome["events"])
    found: dict[str, Any] = {"name": name, "errors": dict(errors), "events": dict(events), "against": {}}
    found["unsafe"] = statistics.share(np.array([not o["valid"] and not o["error"] for o in outcomes])).as_json()
    for metric in ("valid", "right"):
        found[metric] = statistics.share(np.array([o[metric] for o in outcomes])).as_json()
    for metric, unit in _MEANS.items():
        values = [o[metric] for o in outcomes]
        if any(value is None for value in values):
            found[metric] = None
        else:
            found[metric] = Bootstrap(len(values), 1).mean(np.array(values, np.float64), unit).as_json()
    return found


def _flags(listed: Sequence[Mapping[str, Outcome]], variant: str, metric: str) -> np.ndarray:
    return np.array([bool(outcomes[variant][metric]) for outcomes in listed])


def _fault(outcomes: Mapping[str, Outcome], bare: str) -> str:
    """The damage of the first answer, "" where it had none."""
    return str(next(iter(outcomes[bare]["faults"]), ""))


def _by(
    listed: Sequence[Mapping[str, Outcome]], names: Sequence[str], key: Callable[[Mapping[str, Outcome]], str]
) -> dict[str, Any]:
    """{key: {"n", "variants": {variant: {"valid", "right"}}}}"""
    parts: dict[str, list[Mapping[str, Outcome]]] = {}
    for outcomes in listed:
        parts.setdefault(key(outcomes), []).append(outcomes)
    return {
        part: {
            "n": len(some),
            "variants": {
                v: {m: statistics.share(_flags(some, v, m)).as_json() for m in ("valid", "right")} for v in names
            },
        }
        for part, some in sorted(parts.items())
    }
