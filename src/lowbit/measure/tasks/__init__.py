"""Tasks on packed artifacts, in the runtime that will run them, each model on the same items: what quantization did to
answers, item by item.

A kind of task is a file here, found by name (base.py has the contract).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit import console, registry
from lowbit.errors import NotFound
from lowbit.measure import opening
from lowbit.measure.record import Figure
from lowbit.measure.tasks import _compare, _source
from lowbit.measure.tasks._endpoint import Endpoint
from lowbit.measure.tasks._engine import Engine, InProcess
from lowbit.measure.tasks._journal import Journal
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions
from lowbit.run.openai import OpenAi

__all__ = [
    "Item",
    "Metric",
    "Model",
    "Outcome",
    "Task",
    "TaskOptions",
    "kinds",
    "model_of",
    "open_tasks",
    "run",
    "sets",
]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that tasks are put to. path: as it is named in the result. key: what its answers depend on (hash of the
    artifact, runtime, its version and options). open: gives an engine."""

    path: str
    key: str
    open: Callable[[], AbstractContextManager[Engine]]


def model_of(artifact: opening.Artifact, described: Mapping[str, Any], options: TaskOptions) -> Model:
    """An artifact that is opened for tasks; ``described`` is what the result says of it."""
    context = {"context": options.context} if "context" in artifact.options else {}
    ubatch = {"ubatch": 512} if "ubatch" in artifact.options else {}
    opened = replace(artifact, options={**artifact.options, **context, **ubatch})

    @contextlib.contextmanager
    def open_it() -> Iterator[Engine]:
        with opened.open() as model:
            yield Endpoint(model) if isinstance(model, OpenAi) else InProcess(model)

    identity = [described["sha256"], described["runtime"], opened.options, str(artifact.target)]
    key = json.dumps(identity, sort_keys=True, default=str)
    return Model(path=described["path"], key=key, open=open_it)


@functools.cache
def kinds() -> dict[str, type[Task]]:
    """Every kind of task, by its own name. Raises BadFile for a file that misses the contract."""
    return registry.classes(__name__, "TASK", Task, has=("metrics", "main"), named="kind")  # type: ignore[type-abstract]


def sets() -> dict[str, str]:
    """The sets that come with lowbit: name -> one line."""
    return {name: line for kind in kinds().values() for name, line in kind.sets.items()}


def open_tasks(options: TaskOptions) -> list[Task]:
    """Reads every set that the options name. Raises NotFound for what no kind knows, BadText, BadOption."""
    return [_open(source, options) for source in dict.fromkeys(options.tasks)]


def _open(source: str, options: TaskOptions) -> Task:
    for kind in kinds().values():
        if source in kind.sets:
            return kind.open(source, options)
    path = Path(source)
    head = _source.head(path) if path.suffix in (".jsonl", ".json") else None
    for kind in kinds().values():
        if kind.suits(source, head):
            return kind.open(source, options)
    if head is not None:
        raise _source.Line(where=f"{path}: line 1", fields=head).wrong(
            "no kind of task has such questions", sorted(head), "the keys of one of them"
        )
    raise NotFound("no such task", where=source, expected=f"a file (.jsonl, .yaml) or one of {', '.join(sets())}")


def run(tasks: Sequence[Task], models: Sequence[Model], options: TaskOptions) -> list[dict[str, Any]]:
    """Puts every set to every model, one model in memory at a time, and compares them.

    Returns an entry a set: {"name", "kind", "source", "items", "total", "shots", "settings", "metrics", "main",
    "results": [{"path", "way", "scores", "groups", "outcomes"}], "pairs": [...]}; a pair has "baseline", "artifact",
    "metrics" (name -> Comparison.as_json()), "won", "lost", "changed" and "flips".
    A run that was killed goes on from its journal. Raises what the engines raise.
    """
    found: list[list[tuple[Outcomes, str]]] = [[] for _ in tasks]
    journals = []
    with console.progress("Tasks", total=sum(len(t.items) for t in tasks) * len(models), unit="items") as bar:
        done = 0
        for model in models:
            with contextlib.ExitStack() as stack:
                engine = stack.enter_context(model.open())
                for task, results in zip(tasks, found, strict=True):
                    journal = stack.enter_context(Journal(task.key, model.key, task.way(engine)))
                    journals.append(journal)
                    bar.update(done, f"{task.name}: {Path(model.path).name}")
                    journal.listener = functools.partial(_tell, bar, done, len(task.items))
                    for _ in _answered(task, engine, journal):
                        pass
                    done += len(task.items)
                    results.append((dict(journal.done), task.way(engine)))
    entries = [_entry(task, models, results, options) for task, results in zip(tasks, found, strict=True)]
    for journal in journals:
        journal.remove()
    return entries


Outcomes = Mapping[str, Outcome]


def _tell(bar: console.Progress, before: int, most: int, n: int) -> None:
    bar.update(before + min(n, most))


def _answered(task: Task, engine: Engine, journal: Journal) -> Iterator[None]:
    if len(journal.done.keys() & {item.id for item in task.items}) < len(task.items):
        yield from task.outcomes(engine, journal)


def _entry(
    task: Task, models: Sequence[Model], results: Sequence[tuple[Outcomes, str]], options: TaskOptions
) -> dict[str, Any]:
    runs = [(model.path, outcomes) for model, (outcomes, _) in zip(models, results, strict=True)]
    return {
        "name": task.name, "kind": task.kind, "source": task.source, "items": len(task.items), "total": task.total,
        "shots": task.shots, "settings": task.settings, "main": task.main,
        "metrics": {key: {"label": m.label, "note": m.note} for key, m in task.shown().items()},
        "results": [
            {
                "path": model.path,
                "way": way,
                "scores": _json(_compare.figures(task, outcomes, task.items)),
                "groups": {name: _json(f) for name, f in _compare.groups(task, outcomes).items()},
                "outcomes": [{"id": item.id, "group": item.group, **outcomes[item.id]} for item in task.items],
            }
            for model, (outcomes, way) in zip(models, results, strict=True)
        ],
        "pairs": _compare.pairs(task, runs, flips=options.flips),
    }  # fmt: skip


def _json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: figure.as_json() for name, figure in figures.items()}
