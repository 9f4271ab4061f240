"""How often the job's answers agree with those of a stronger model, on items drawn at random, with intervals.

The draw is the n items whose keyed hash is smallest: it needs no more memory than n numbers however many items there
are, does not depend on the order in which they were answered, and a larger n keeps the items of a smaller one. Items
are judged whole (the same text, or the same JSON value), and again with case, spacing, and punctuation at the ends set
aside; an answer that follows a schema is judged field by field too. Agreement is not truth: the reference errs too.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lowbit.measure import statistics
from lowbit.measure.record import Figure

_LONGEST = 2000  # characters of an answer in a sample
_ENDS = " \t\n\r.,;:!?\"'`*"


T = TypeVar("T")


def draw(items: Iterable[tuple[T, str]], n: int, seed: int) -> list[T]:
    """n of the items (what is wanted of it, custom_id), each as likely as any other, in the order of their hashes."""
    key = seed.to_bytes(8, "big", signed=True)

    def hashed() -> Iterable[tuple[bytes, T]]:
        for item, custom_id in items:
            yield hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest(), item

    return [item for _, item in heapq.nsmallest(n, hashed(), key=lambda pair: pair[0])]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one item. fields: of the JSON object that was asked for, none of one without names; None for free
    text."""

    custom_id: str
    question: str
    ours: str
    reference: str
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An item on which the two differ. fields: in which, where there is a schema."""

    custom_id: str
    question: str
    ours: str
    reference: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """exact: the same answer. normalised: the same but for case, spacing and punctuation at the ends. fields: by
    field of the schema, normalised. samples: of all that differ, in the order of the draw. failed: drawn items that
    the reference did not answer."""

    reference: str
    seed: int
    population: int
    failed: int
    exact: Figure
    normalised: Figure
    fields: dict[str, Figure]
    samples: tuple[Sample, ...]

    def shares(self) -> list[tuple[str, Figure]]:
        """The figures with their names, for tables and plots."""
        return [("same answer", self.exact), ("normalised", self.normalised), *self.fields.items()]

    def as_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "seed": self.seed,
            "population": self.population,
            "checked": self.exact.n,
            "failed": self.failed,
            "exact": self.exact.as_json(),
            "normalised": self.normalised.as_json(),
            "fields": {name: figure.as_json() for name, figure in self.fields.items()},
            "disagreements": [
                {
                    "custom_id": s.custom_id,
                    "question": s.question,
                    "answer": s.ours,
                    "reference": s.reference,
                    "fields": list(s.fields),
                }
                for s in self.samples
            ],
        }


def agreement(
    pairs: Sequence[Pair], *, reference: str, seed: int, population: int, failed: int = 0, most_samples: int = 100
) -> Agreement | None:
    """None where no pair is there to be judged. Intervals are Wilson's, 95%."""
    if not pairs:
        return None
    exact: list[bool] = []
    normalised: list[bool] = []
    samples: list[Sample] = []
    fields: dict[str, list[bool]] = {}
    for pair in pairs:
        ours, theirs = _value(pair.ours, pair.fields), _value(pair.reference, pair.fields)
        exact.append(_canonical(ours) == _canonical(theirs))
        same = normal(ours) == normal(theirs)
        normalised.append(same)
        differing = []
        for name in pair.fields or ():
            agree = _field(ours, name) == _field(theirs, name)
            fields.setdefault(name, []).append(agree)
            if not agree:
                differing.append(name)
        if not same and len(samples) < most_samples:
            samples.append(Sample(
                custom_id=pair.custom_id, question=_cut(pair.question), ours=_cut(pair.ours),
                reference=_cut(pair.reference), fields=tuple(differing),
            ))  # fmt: skip
    return Agreement(
        reference=reference,
        seed=seed,
        population=population,
        failed=failed,
        exact=statistics.share(np.array(exact)),
        normalised=statistics.share(np.array(normalised)),
        fields={name: statistics.share(np.array(same)) for name, same in fields.items()},
        samples=tuple(samples),
    )


def normal(value: Any) -> Any:
    """What is compared where spelling does not count: texts without case, runs of spaces and punctuation at the ends
    (NFKC); numbers by value; objects without their order."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split()).strip(_ENDS)
    if isinstance(value, dict):
        return {key: normal(inner) for key, inner in value.items()}
    return [normal(inner) for inner in value] if isinstance(value, list) else value


def _value(text: str, fields: tuple[str, ...] | None) -> Any:
    """The answer as JSON where that was asked for, else as text."""
    if fields is not None:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text.strip()


def _canonical(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


_ABSENT = object()


def _field(value: Any, name: str) -> Any:
    return normal(value[name]) if isinstance(value, dict) and name in value else _ABSENT


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
