"""The contract of a kind of task: items, how one is put to a model, and what counts as right.

A kind is a file here with ``TASK``, a subclass of ``Task``; ``lowbit.measure.tasks`` finds it by that. Files that begin
with an underscore are what kinds share.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import lowbit
from lowbit.errors import BadOption
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks._journal import Journal

# Outcome: what came of one item, as JSON holds it. "scores": metric -> 0..1 or None where it does not apply; "answer":
# what the model said or chose, in a few words; whatever else the kind wants to keep.
Outcome = dict[str, Any]
T = TypeVar("T")
MAX_ANSWER = 300  # characters of an answer that are kept


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks, and how.

    tasks:       names of sets that come with lowbit, of lm-eval's tasks, or files (JSONL, lm-eval's YAML)
    limit:       items of each set, evenly spread over it; None means all
    shots:       worked examples before each question, where the kind takes them; None means the set's own number
    max_tokens:  of a generated answer; None means the kind's own
    context:     tokens of context that models are opened with
    chat:        questions go through the model's chat template
    allow_code:  lm-eval task files may run the Python that they name (``!function``)
    flips:       how many flips a pair of models lists at most
    """

    tasks: Sequence[str]
    limit: int | None = None
    shots: int | None = None
    max_tokens: int | None = None
    context: int = 4096
    chat: bool = False
    allow_code: bool = False
    flips: int = 50

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise BadOption("no task was named", expected="names or files, with commas between them")
        for name, least in (("limit", 1), ("shots", 0), ("max_tokens", 1), ("context", 16), ("flips", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadOption(f"impossible {name}", found=value, expected=f"at least {least}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. id: its own within the set; group: what its figures are also listed by; question, expected: for
    the list of flips; fields: what the kind reads."""

    id: str
    question: str
    expected: str
    fields: Mapping[str, Any]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """label: as people read it; note: what exactly is counted; unit: "share" for what is right or wrong."""

    label: str
    note: str = ""
    unit: str = "share"
    higher_is_better: bool = True


@dataclass(kw_only=True)
class Task(abc.ABC):
    """A set of items of one kind, ready to be put to any number of models.

    name, source: as it was asked for, and where its items come from
    items:        those to be scored, in their order
    total:        how many the source has
    shots:        worked examples before each
    settings:     what else an outcome depends on; goes into the result and the journal's key
    """

    kind: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    main: ClassVar[str]  # the metric whose flips are listed
    sets: ClassVar[Mapping[str, str]] = {}  # name -> its line; the sets that come with lowbit

    name: str
    source: str
    items: list[Item]
    total: int
    shots: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @abc.abstractmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        """Whether this kind reads the source: a name, or a JSONL file of which ``head`` is the first line."""

    @classmethod
    @abc.abstractmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        """Reads and checks the whole set. Raises NotFound, BadText (naming the line), BadOption, Unsupported."""

    @abc.abstractmethod
    def outcome(self, item: Item, engine: Engine) -> Outcome:
        """Puts one item to the model. Deterministic; depends on nothing but the item, the set and the model."""

    def outcomes(self, engine: Engine, journal: Journal) -> Iterator[None]:
        """Puts every item to the model that the journal does not have, and adds its outcome there."""
        self.prepare(engine)
        for item in self.items:
            if item.id not in journal.done:
                journal.add(item.id, self.outcome(item, engine))
                yield

    def prepare(self, engine: Engine) -> None:  # noqa: B027 - most share nothing
        """Before the first item: what all of them share."""

    def way(self, engine: Engine) -> str:
        """How this model is asked, for people: "log-likelihood of each choice"."""
        return "greedy generation"

    def shown(self) -> Mapping[str, Metric]:
        """The metrics of this set."""
        return self.metrics

    @property
    def key(self) -> str:
        """A hash of everything about the set that an outcome depends on."""
        fields = [[i.id, dict(i.fields)] for i in self.items]
        what = json.dumps([self.kind, self.shots, self.settings, fields], sort_keys=True, default=str)
        return hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()


def data_file(name: str) -> Path:
    """A file that comes with lowbit."""
    return Path(lowbit.__file__).parent / "data" / name


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` of the items, evenly spread over them, in their order: the same ones every time."""
    n = len(items)
    if limit is None or limit >= n:
        return list(items)
    return [items[i * n // limit] for i in range(limit)]


def shortened(text: str, most: int = MAX_ANSWER) -> str:
    """The first characters of a text, with a mark where some were cut."""
    return text if len(text) <= most else text[: most - 1] + "…"
