"""Streamed text that may hold tool calls: what is surely text is let through, what may be a call is held back."""

from __future__ import annotations

from collections.abc import Collection

from lowbit.harness import dialects


class Splitter:
    """tools: the names that there are; with none, everything goes through. dialect: the only one to look for; None
    means all; "" means none."""

    def __init__(self, tools: Collection[str], dialect: str | None = None) -> None:
        names = () if dialect == "" or not tools else ((dialect,) if dialect else dialects.names())
        self._marks = tuple({mark: None for name in names for mark in dialects.get(name).marks})
        self._opens = tuple({mark: None for name in names for mark in dialects.get(name).opens})
        self._begun = False  # whether anything but white space has been said
        self._held: list[str] = []
        self._open = ""  # the end of the text that may be the beginning of a mark
        self._in_call = False

    def feed(self, text: str) -> str:
        """What of the text so far can go out now."""
        if not self._marks:
            return text
        if not self._begun and (begun := (self._open + text).lstrip()):
            if any(mark.startswith(begun) and mark != begun for mark in self._opens):
                self._open += text
                return ""
            self._begun = True
            self._in_call = begun.startswith(self._opens)
        if self._in_call:
            self._held.append(self._open + text)
            self._open = ""
            return ""
        text = self._open + text
        found = min((at for mark in self._marks if (at := text.find(mark)) >= 0), default=-1)
        if found >= 0:
            self._in_call, self._open = True, ""
            self._held.append(text[found:])
            return text[:found]
        keep = max((_overlap(text, mark) for mark in self._marks), default=0)
        self._open = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, for when it turned out to be no call."""
        return "".join(self._held) + self._open


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that is a beginning of the mark."""
    for n in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:n]):
            return n
    return 0
