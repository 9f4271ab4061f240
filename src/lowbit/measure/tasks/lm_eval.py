"""lm-eval's tasks, run through lm-eval's own harness (``pip install 'lowbit[lm-eval]'``).

A task is named as lm-eval names it, or is a YAML file of its form; with local data (``dataset_path: json`` and
``data_files``) it needs no network. lm-eval builds the prompts and the few-shot examples, filters and scores; the
models answer through an engine.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.errors import BadOption, LowbitError, NotFound, Unsupported
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks._journal import Journal
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, shortened, spread

_SEED = 1234  # lm-eval's own
_SHARES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"}


@dataclass(kw_only=True)
class LmEval(Task):
    """tasks: lm-eval's objects by name, one or a group's; about: their metrics; chat: through the chat template."""

    kind = "lm_eval"
    metrics: ClassVar[Mapping[str, Metric]] = {}
    main = "acc"

    tasks: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Metric] = field(default_factory=dict)
    chat: bool = False
    fewshot: int | None = None

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        if head is not None or ":" in source:
            return False
        return Path(source).suffix in (".yaml", ".yml") or ("/" not in source and _known(source))

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        _check_installed(source)
        tasks = _load(source, options)
        items: list[Item] = []
        for name, task in tasks.items():
            items += _items(name, task, several=len(tasks) > 1)
        chosen = spread(items, options.limit)
        about = {key: metric for task in tasks.values() for key, metric in _metrics(task).items()}
        if not about:
            raise Unsupported("the task has no metric of single questions", where=source)
        shots = max((int(task.config.num_fewshot or 0) for task in tasks.values()), default=0)
        made = cls(
            name=Path(source).stem if Path(source).suffix else source, source=source, items=chosen, total=len(items),
            shots=shots, settings={"lm_eval": _version(), "chat": options.chat}, tasks=tasks, about=about,
            chat=options.chat, fewshot=options.shots,
        )  # fmt: skip
        made.main = next(iter(about))  # type: ignore[misc]
        return made

    def shown(self) -> Mapping[str, Metric]:
        return self.about

    def way(self, engine: Engine) -> str:
        return f"lm-eval {_version()}"

    def outcomes(self, engine: Engine, journal: Journal) -> Iterator[None]:
        """lm-eval runs the whole set at once; what is journalled are the model's answers to its requests."""
        from lm_eval import simple_evaluate

        from lowbit.measure.tasks._lm_eval_model import EngineLM

        wanted: dict[str, list[int]] = {name: [] for name in self.tasks}
        for item in self.items:
            wanted[item.fields["task"]].append(item.fields["doc"])
        tasks = [task for name, task in self.tasks.items() if wanted[name]]
        with _quiet():
            found = simple_evaluate(
                model=EngineLM(engine, journal), tasks=tasks, samples={k: v for k, v in wanted.items() if v},
                num_fewshot=self.fewshot, apply_chat_template=self.chat, bootstrap_iters=0, log_samples=True,
                confirm_run_unsafe_code=True, random_seed=_SEED, numpy_random_seed=_SEED, torch_random_seed=_SEED,
                fewshot_random_seed=_SEED, task_manager=_manager(shipped=False),
            )  # fmt: skip
        if found is None:
            raise Unsupported("lm-eval gave no result", where=self.source)
        scored = self._scored(found["samples"])
        for item in self.items:
            journal.add(item.id, scored[item.id])
            yield

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        raise NotImplementedError("lm-eval runs a set at once")

    def _scored(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Outcome]:
        by_place = {(item.fields["task"], item.fields["doc"]): item for item in self.items}
        found: dict[str, Outcome] = {}
        for name, listed in samples.items():
            for sample in listed:
                item = by_place[name, sample["doc_id"]]
                outcome = found.setdefault(item.id, {"scores": {}, "answer": _answer(sample)})
                for metric in sample["metrics"]:
                    outcome["scores"][_key(metric, sample["filter"])] = _value(sample[metric])
        return found


def _load(source: str, options: TaskOptions) -> dict[str, Any]:
    """lm-eval's task objects of a name or a YAML file. Raises one line for whatever fails on the way."""
    from lowbit.measure.tasks import _lm_eval_files

    _lm_eval_files.sandbox()
    path = Path(source)
    with _quiet():
        own = path.suffix in (".yaml", ".yml")
        spec: Any = _lm_eval_files.read(path, allow_code=options.allow_code) if own else source
        try:
            found = _manager(shipped=not own).load([spec])["tasks"]
        except LowbitError:
            raise
        except Exception as error:  # whatever data sets, hubs and task definitions raise
            said = " ".join(str(error).split())[:200]
            hint = "A task whose data lie on a hub needs the network, or the data in its cache"
            raise NotFound("lm-eval cannot set up this task", where=source, found=f"{type(error).__name__}: {said}",
                           hint=hint) from error  # fmt: skip
    if not found:
        raise NotFound("lm-eval has no task of this name", where=source)
    for name, task in found.items():
        if getattr(task.config, "unsafe_code", False) and not options.allow_code:
            raise Unsupported("the task runs what the model writes", where=name,
                              hint="--confirm-run-unsafe-code allows it")  # fmt: skip
        if options.shots is not None:
            task.set_config(key="num_fewshot", value=options.shots)
        task.set_fewshot_seed(seed=_SEED)
    return dict(found)


def _items(name: str, task: Any, *, several: bool) -> list[Item]:
    made = []
    for at, doc in enumerate(task.eval_docs):
        question, target = str(task.doc_to_text(doc)), task.doc_to_target(doc)
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(doc)
            target = choices[target] if 0 <= target < len(choices) else target
        made.append(Item(id=f"{name}/{at}" if several else str(at), question=shortened(question),
                         expected=shortened(str(target)), group=name if several else "",
                         fields={"task": name, "doc": at, "content": doc}))  # fmt: skip
    if not made:
        raise BadOption("the task has no questions", where=name)
    return made


def _metrics(task: Any) -> dict[str, Metric]:
    """Metrics of a task's filters: "acc", or "exact_match,strict-match" where a filter has a name."""
    filters = [f.name for f in getattr(task, "_filters", [])] or ["none"]
    higher = task.higher_is_better()
    found = {}
    for name in task.aggregation():
        for kind in filters:
            share = name in _SHARES
            per = {"word_perplexity": "nats a word", "byte_perplexity": "nats a byte"}.get(name, "")
            found[_key(name, kind)] = Metric(
                label=_key(name, kind), note=per or "lm-eval's", unit="share" if share else per,
                higher_is_better=bool(higher.get(name, True)),
            )  # fmt: skip
    return found


def _key(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _value(value: Any) -> float | None:
    """A sample's own score. A perplexity's is (log-likelihood, words or bytes): nats for each of these."""
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
        return -float(value[0]) / max(1.0, float(value[1]))
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _answer(sample: Mapping[str, Any]) -> str:
    """Of a multiple choice the likeliest; else the filtered answer."""
    answers = sample["filtered_resps"]
    if answers and all(isinstance(a, tuple | list) and len(a) == 2 for a in answers):
        best = max(range(len(answers)), key=lambda i: float(answers[i][0]))
        return shortened(str(sample["arguments"][best][1]).strip())
    return shortened(str(answers[0] if answers else "").strip())


def _known(name: str) -> bool:
    if importlib.util.find_spec("lm_eval") is None:
        return False
    with _quiet():
        manager = _manager()
        return name in manager.all_tasks or name in manager.all_groups or name in manager.all_tags


@functools.cache
def _manager(*, shipped: bool = True) -> Any:
    """lm-eval's index of its thousands of task files, which takes seconds; without them for a file of one's own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=shipped)


def _check_installed(source: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise NotFound("lm-eval is not installed", where=source, hint="pip install 'lowbit[lm-eval]'")


def _version() -> str:
    from importlib import metadata

    return metadata.version("lm_eval")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs what it does, and draws bars; lowbit has its own."""
    import datasets
    import lm_eval.api.task as drawing

    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels, bars = [logger.level for logger in loggers], drawing.tqdm
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    drawing.tqdm = functools.partial(bars, disable=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        drawing.tqdm = bars
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


TASK = LmEval
