"""How a family of models writes tool calls in text, and how tools and their results are written for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowbit.harness.answer import Call


@dataclass
class Parsed:
    """content: the text without the calls. calls: as written, names and arguments not healed. notes: what the parser
    had to put up with ("no closing mark"), for the trace."""

    content: str
    calls: list[Call] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Dialect(ABC):
    """One syntax; subclasses set the class variables and write the methods.

    name:  the file's name
    marks: what a call begins with; from there on, streamed text is held back
    opens: what a call may begin with where it is the first thing that is said
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    opens: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        """Every call in a text, whole or broken off. Never raises. tools: the names that there are: a syntax without
        marks of its own (bare JSON) takes nothing for a call that names none of them."""

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        """Whether a text that begins with one of the marks, or as ``opens`` has it, is or may still become a call.

        False is final: whatever follows, parse() takes nothing for a call that begins here. What is streamed is let
        through then."""
        return True

    @abstractmethod
    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        """The tools, in OpenAI's form, as a system message for a chat template that knows none."""

    @abstractmethod
    def call_text(self, calls: Sequence[Call]) -> str:
        """Calls as the model itself would have written them."""

    @abstractmethod
    def result_text(self, name: str, content: str) -> str:
        """A tool's result, as the text of a user's message for a chat template that knows no tools."""
