"""What a check of a release is, and what it finds.

A check is one file here: a class called ``CHECK``, a subclass of ``Check`` whose ``name`` is the file's with hyphens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowbit.errors import LowbitError
from lowbit.release.release_set import ReleaseSet

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "n/a"


@dataclass(kw_only=True)
class Findings:
    """What one check finds: problems make it fail; notes say what was compared; ``runtimes`` took part in it, as
    {name: version}."""

    quick: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    runtimes: dict[str, str] = field(default_factory=dict)

    def problem(self, what: str, advice: str | None = None) -> None:
        """Something that does not belong together, and what to do about it."""
        self.problems.append(what)
        if advice and advice not in self.advice:
            self.advice.append(advice)

    def note(self, what: str) -> None:
        self.notes.append(what)

    @contextmanager
    def problems_of(self, what: object, advice: str | None = None) -> Iterator[None]:
        """A LowbitError in the block is a problem of ``what``."""
        try:
            yield
        except LowbitError as error:
            self.problem(f"{what}: {error}" if str(what) not in str(error) else str(error), advice)


class NotApplicable(Exception):
    """Raised by a check that finds nothing to compare; its text says why."""


class Check(ABC):
    """One question about a release.

    name:     the file's, with hyphens; what ``--only`` takes
    question: what it answers, in a line
    rank:     where it stands among the others
    after:    checks that must not have failed, or this one would only repeat what they say (or run what is not safe)
    measured: whether a runtime computes for it, which --quick leaves out
    roles:    whose files it reads; () means all of the folder
    """

    name: ClassVar[str]
    question: ClassVar[str]
    rank: ClassVar[int]
    after: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, release: ReleaseSet, found: Findings) -> None:
        """Looks, and tells ``found``. Raises NotApplicable; a LowbitError counts as a problem."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A check's result. status: 'pass', 'fail' or 'n/a'. detail: what was found or compared. advice: what to do."""

    name: str
    status: str
    detail: str
    advice: str = ""
    seconds: float = 0.0
    runtimes: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        found = {"name": self.name, "status": self.status, "detail": self.detail, "advice": self.advice}
        return found | {"seconds": round(self.seconds, 3), "runtimes": dict(self.runtimes)}


def shortened(items: list[str], most: int = 4) -> str:
    """A list in a sentence: the first few, and how many more."""
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest} more" if rest > 0 else "")


def printable(text: object, most: int = 60) -> str:
    """Something from a stranger's file in a sentence."""
    return repr(text)[: most - 1] + "…" if len(repr(text)) > most else repr(text)
