"""The debrief as Markdown and as one HTML page: no script, nothing loaded, every word of the thread escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from debrief_stages import Finding
from hn_thread import Comment, Left, Thread

_HERE = Path(__file__).parent
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~])")  # what Markdown would take for its own
_LINE_START = re.compile(r"^(\s*)([-+>]|\d+[.)])(?=\s)", re.MULTILINE)


@dataclass(frozen=True)
class Debrief:
    """All that the page says. meanings: (term, meaning, the comment that used it). shares: of the moods, in percent."""

    thread: Thread
    summary: str
    mood: str
    shares: Sequence[tuple[str, int]]
    insights: Sequence[Finding]
    actions: Sequence[Finding]
    against: Sequence[Finding]
    meanings: Sequence[tuple[str, str, Comment]]
    left: Left
    model: str

    def cited(self) -> list[Comment]:
        """Every comment that something rests on, in the order of the thread."""
        rests = [c for finding in (*self.insights, *self.actions, *self.against) for c in finding.comments]
        return sorted(set(rests), key=lambda comment: comment.number)


def markdown(debrief: Debrief) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["plain"] = escaped
    return environment.get_template("debrief.md.jinja").render(d=debrief)


def html(debrief: Debrief) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=True,
    )  # fmt: skip
    return environment.get_template("debrief.html.jinja").render(d=debrief)


def escaped(text: str) -> str:
    """Text as Markdown that shows just that text, on one line."""
    one_line = " ".join(text.split())
    return _LINE_START.sub(r"\1\\\2", _MARKS.sub(r"\\\1", one_line).replace("&", "&amp;"))
