"""The tasks of a measurement as what the page and the terminal show. The record is untrusted (see view.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.report.figures import Figure, figure, mapping, number, sequence, text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric: its label, what is counted, and a figure for each model, in percent where it is a share."""

    key: str
    label: str
    note: str
    figures: list[Figure | None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One model against another by one metric. change: in points of percent, or in the metric's unit."""

    baseline: str
    artifact: str
    label: str
    change: Figure
    verdict: str
    smallest: str
    p_value: str
    won: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An item that one model has right and the other wrong. turned: 'right' or 'wrong', for the later one."""

    question: str
    expected: str
    before: str
    after: str
    turned: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """flips: those that the record lists; total: how many there were; changed: items with another answer."""

    baseline: str
    artifact: str
    differences: list[Difference]
    flips: list[Flip]
    total: int
    changed: int


@dataclass(frozen=True, kw_only=True)
class TaskView:
    """One set. models: names; rows: metrics; groups: (name, the main metric's figures)."""

    name: str
    kind: str
    about: str
    ways: list[str]
    models: list[str]
    rows: list[Row]
    groups: list[tuple[str, list[Figure | None]]]
    pairs: list[Pair]


def build(measured: dict[str, Any]) -> list[TaskView]:
    """The sets of a `lowbit measure` result; never raises on what a record may hold."""
    if not mapping(measured.get("machine")):  # a figure without its machine is not shown
        return []
    return [_task(mapping(entry)) for entry in sequence(measured.get("tasks")) if mapping(entry).get("results")]


def _task(entry: dict[str, Any]) -> TaskView:
    results = [mapping(r) for r in sequence(entry.get("results"))]
    names = _distinct([text(r.get("path")) for r in results])
    by_path = {text(r.get("path")): name for r, name in zip(results, names, strict=True)}
    metrics = {key: mapping(m) for key, m in mapping(entry.get("metrics")).items()}
    main = text(entry.get("main"))
    rows = [
        Row(
            key=key, label=text(metric.get("label")) or key, note=text(metric.get("note")),
            figures=[_figure(mapping(r.get("scores")).get(key)) for r in results],
        )
        for key, metric in metrics.items()
    ]  # fmt: skip
    groups = {group for r in results for group in mapping(r.get("groups"))}
    return TaskView(
        name=text(entry.get("name")), kind=text(entry.get("kind")), about=_about(entry),
        ways=list(dict.fromkeys(text(r.get("way")) for r in results)), models=names,
        rows=[row for row in rows if any(row.figures)],
        groups=[
            (name, [_figure(mapping(mapping(r.get("groups")).get(name)).get(main)) for r in results])
            for name in sorted(groups)
        ],
        pairs=[_pair(mapping(p), by_path, metrics) for p in sequence(entry.get("pairs"))],
    )  # fmt: skip


def _about(entry: dict[str, Any]) -> str:
    items, total, shots = (number(entry.get(key)) for key in ("items", "total", "shots"))
    said = f"{items or 0:,.0f} items" + (f" of {total:,.0f}" if total and items and total > items else "")
    return said + (f", {shots:.0f} shots" if shots else "")


def _pair(pair: dict[str, Any], by_path: dict[str, str], metrics: dict[str, dict[str, Any]]) -> Pair:
    baseline, artifact = (by_path.get(text(pair.get(key)), text(pair.get(key))) for key in ("baseline", "artifact"))
    won, lost, changed = (int(number(pair.get(key)) or 0) for key in ("won", "lost", "changed"))
    found = []
    for key, raw in mapping(pair.get("metrics")).items():
        change = _figure(raw, points=True)
        if change is None:
            continue
        smallest, p = number(mapping(raw).get("smallest_detectable")), number(mapping(raw).get("p_adjusted"))
        share = mapping(raw).get("unit") == "share"
        found.append(
            Difference(
                baseline=baseline, artifact=artifact, label=text(mapping(metrics.get(key)).get("label")) or key,
                change=change, verdict=text(mapping(raw).get("verdict")),
                smallest="" if smallest is None else f"{smallest * (100 if share else 1):.3g}",
                p_value="" if p is None else (f"{p:.2g}" if p >= 1e-4 else "<0.0001"), won=won, lost=lost,
            )
        )  # fmt: skip
    flips = [_flip(mapping(raw)) for raw in sequence(pair.get("flips"))]
    return Pair(baseline=baseline, artifact=artifact, differences=found, flips=flips, total=won + lost, changed=changed)


def _flip(raw: dict[str, Any]) -> Flip:
    keys = ("question", "expected", "baseline_answer", "artifact_answer", "turned")
    question, expected, before, after, turned = (text(raw.get(key)) for key in keys)
    return Flip(question=question, expected=expected, before=before, after=after, turned=turned)


def _figure(raw: Any, *, points: bool = False) -> Figure | None:
    share = mapping(raw).get("unit") == "share"
    found = figure(raw, percent=share)
    if found is not None and points and share:
        return Figure(value=found.value, low=found.low, high=found.high, n=found.n)
    return found


def _distinct(paths: list[str]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    parts = [Path(p).parts or (p,) for p in paths]
    depth = 1
    while depth < 4 and len({p[-depth:] for p in parts}) < len(set(paths)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
