"""Two models on the same items: the difference, whether it is one, and which items flipped."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowbit.measure import statistics
from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.record import Figure
from lowbit.measure.tasks.base import Item, Outcome, Task

Outcomes = Mapping[str, Outcome]  # by item


def figures(task: Task, outcomes: Outcomes, items: Sequence[Item]) -> dict[str, Figure]:
    """Each metric's mean over the items that have it: a share with Wilson's interval where all are right or wrong,
    else a mean with a bootstrap interval."""
    found = {}
    for metric in task.shown():
        values = _values(outcomes, items, metric)
        if len(values):
            unit = task.shown()[metric].unit
            found[metric] = (
                statistics.share(values == 1) if unit == "share" and _binary(values) else _mean(values, unit)
            )
    return found


def groups(task: Task, outcomes: Outcomes) -> dict[str, dict[str, Figure]]:
    """The figures of each group of items; empty where there is but one."""
    names = list(dict.fromkeys(item.group for item in task.items))
    if len(names) < 2:
        return {}
    return {name: figures(task, outcomes, [i for i in task.items if i.group == name]) for name in names}


def pairs(task: Task, runs: Sequence[tuple[str, Outcomes]], *, flips: int) -> list[dict[str, Any]]:
    """Every two models, the earlier as baseline. For each metric a comparison, corrected (Holm) for how many pairs
    there are; then the items whose main metric differs."""
    couples = list(itertools.combinations(runs, 2))
    made: list[dict[str, Any]] = [
        {"baseline": a, "artifact": b, "metrics": {}, **_flips(task, x, y, flips)} for (a, x), (b, y) in couples
    ]
    for metric in task.shown():
        compared = [_compared(task, x, y, metric) for (_, x), (_, y) in couples]
        there = [c for c in compared if c is not None]
        corrected = iter(statistics.corrected(there))
        for entry, comparison in zip(made, compared, strict=True):
            if comparison is not None:
                entry["metrics"][metric] = next(corrected).as_json()
    return made


def _compared(task: Task, baseline: Outcomes, artifact: Outcomes, metric: str) -> statistics.Comparison | None:
    items = [
        i for i in task.items if _score(baseline, i, metric) is not None and _score(artifact, i, metric) is not None
    ]
    if not items:
        return None
    x, y = _values(baseline, items, metric), _values(artifact, items, metric)
    about = task.shown()[metric]
    if about.unit == "share" and _binary(x) and _binary(y):
        return statistics.of_items(x == 1, y == 1)
    draws = Bootstrap(len(items), 1)
    return statistics.of_means((y - x)[:, None], draws, higher_is_better=about.higher_is_better, unit=about.unit)


def _flips(task: Task, baseline: Outcomes, artifact: Outcomes, most: int) -> dict[str, Any]:
    """won, lost: how many items turned right and wrong. changed: how many got another answer, right or not."""
    listed, counts = [], {"won": 0, "lost": 0, "changed": 0}
    for item in task.items:
        x, y = _score(baseline, item, task.main), _score(artifact, item, task.main)
        before, after = baseline[item.id].get("answer"), artifact[item.id].get("answer")
        counts["changed"] += before != after
        if x is None or y is None or x == y:
            continue
        counts["won" if y > x else "lost"] += 1
        listed.append({
            "id": item.id, "group": item.group, "question": item.question, "expected": item.expected,
            "baseline_answer": before, "artifact_answer": after, "turned": "right" if y > x else "wrong",
        })  # fmt: skip
    listed.sort(key=lambda flip: flip["turned"] == "right")  # what was lost first
    return {**counts, "flips": listed[:most]}


def _score(outcomes: Outcomes, item: Item, metric: str) -> float | None:
    value = outcomes[item.id]["scores"].get(metric)
    return None if value is None else float(value)


def _values(outcomes: Outcomes, items: Sequence[Item], metric: str) -> np.ndarray:
    found = (_score(outcomes, item, metric) for item in items)
    return np.array([value for value in found if value is not None], np.float64)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _mean(values: np.ndarray, unit: str) -> Figure:
    return Bootstrap(len(values), 1).mean(values, unit)
