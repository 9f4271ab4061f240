"""Streamed text that may hold tool calls: what is surely text is let through, what may be a call is held back."""

from __future__ import annotations

import re
from collections.abc import Collection

from lowbit.harness import dialects
from lowbit.harness.thoughts import overlap

_LINES = 64  # beginnings of lines that are looked at for a call without marks, as bare_json.py does
_EVERY = 256  # characters up to which what is held is looked at with every piece; then each time it has doubled
_SPACE = 4096  # characters of white space that are held back at most


class Splitter:
    """tools: the names that there are; with none, everything goes through. dialect: the only one to look for; None
    means all; "" means none.

    All that feed() gives, in order, is a beginning of the text; white space before a call is not in it.
    """

    def __init__(self, tools: Collection[str], dialect: str | None = None) -> None:
        names = () if dialect == "" or not tools else ((dialect,) if dialect else dialects.names())
        self._tools, self._dialects = tools, tuple(dialects.get(name) for name in names)
        self._marks = tuple({mark: None for d in self._dialects for mark in d.marks})
        opens = "|".join(sorted({re.escape(mark) for d in self._dialects for mark in d.opens}))
        marks = "|".join(map(re.escape, self._marks))
        line = rf"(?P<line>\n[ \t]*(?={opens}))" if opens else ""
        self._any = re.compile("|".join(filter(None, (line, marks))) or r"(?!)")
        self._first = re.compile(rf"\s*(?={opens})") if opens else re.compile(r"(?!)")
        self._begun = False  # whether anything but white space has been said
        self._lines = _LINES
        self._open = ""  # the end of the text that cannot be told yet
        self._held: list[str] = []  # from white space before what may be a call on
        self._at = self._length = self._look = 0  # where in it that begins; characters held; when to look again
        self._starts_line = False

    def feed(self, text: str) -> str:
        """What of the text so far can go out now."""
        if not self._dialects:
            return text
        if self._held:
            self._held.append(text)
            self._length += len(text)
            if self._length < self._look:
                return ""
            text = self._take()
            if self._may_be(text):
                self._hold(text)
                return ""
            out = text[: self._at + 1]  # no call begins here; one may begin at the next character
            return out + self._scan(text[self._at + 1 :])
        text, self._open = self._open + text, ""
        return self._scan(text)

    def rest(self) -> str:
        """What was held back, for when it turned out to be no call."""
        return "".join(self._held) + self._open

    def _scan(self, text: str) -> str:
        done = 0
        while (found := self._candidate(text, done)) is not None:
            self._at, self._starts_line = found
            if self._may_be(text):
                begin = done + len(text[done : self._at].rstrip())
                held = text[begin:]
                self._at -= begin
                self._hold(held)
                return text[:begin]
            done = self._at + 1
            self._begun = True
        keep = self._kept(text, done)
        self._open = text[keep:]
        self._begun = self._begun or bool(text[:keep].strip())
        return text[:keep]

    def _candidate(self, text: str, begin: int) -> tuple[int, bool] | None:
        """Where a call may begin, and whether that is the beginning of a line."""
        if not self._begun and begin == 0 and (first := self._first.match(text)):
            return first.end(), True
        at = begin
        while found := self._any.search(text, at):
            line = bool(self._first.pattern != "(?!)" and found.groupdict().get("line"))
            if not line:
                return found.start(), False
            if any(text.startswith(mark, found.end()) for mark in self._marks):
                return found.end(), True
            if self._lines > 0:
                self._lines -= 1
                return found.end(), True
            at = found.end()
        return None

    def _may_be(self, text: str) -> bool:
        """Whether what begins at ``self._at`` may be a call of any dialect."""
        said = text[self._at :]
        for dialect in self._dialects:
            marks = (*dialect.marks, *(dialect.opens if self._starts_line else ()))
            if any(mark.startswith(said) and mark != said for mark in marks):
                return True
            if said.startswith(marks) and dialect.may_be(said, self._tools):
                return True
        return False

    def _kept(self, text: str, begin: int) -> int:
        """From where on the text cannot be told: what may be the beginning of a mark, and white space before it."""
        end = len(text) - max((overlap(text[begin:], mark) for mark in self._marks), default=0)
        ticks = len(text) - len(text[begin:].rstrip("`")) - begin
        if 0 < ticks <= 2:
            end = min(end, len(text) - ticks)
        words = begin + len(text[begin:end].rstrip())
        return words if end - words <= _SPACE else end

    def _hold(self, text: str) -> None:
        self._held, self._length = [text], len(text)
        self._look = len(text) + 1 if len(text) < _EVERY else 2 * len(text)

    def _take(self) -> str:
        text = "".join(self._held)
        self._held = []
        return text
