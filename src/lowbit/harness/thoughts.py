"""Thoughts that a runtime left in the text: <think>...</think>, Gemma 4's <|channel>thought ... <channel|>, [THINK].

A mark counts where it is the first thing that is said, or comes right after other thoughts; Gemma 4's, whose marks are
tokens of its vocabulary, anywhere where a line ends after them. In a sentence it is text. Read from the chat templates
of Qwen 3, Gemma 4 (llama.cpp's models/templates/gemma4.jinja, strip_thinking) and Magistral.
"""

from __future__ import annotations

from lowbit.harness.answer import Answer

_MARKS = {"<think>": "</think>", "<|channel>thought": "<channel|>", "[THINK]": "[/THINK]"}
_ANYWHERE = "<|channel>thought\n"


class ThoughtSplitter:
    """Feed it text in pieces of any size: what comes out, put together, is the same for every cutting."""

    def __init__(self) -> None:
        self._open = ""  # what cannot be told yet
        self._closing = ""  # the mark that ends the thoughts; "" outside of them
        self._first = True  # whether a mark may come now
        self._thought = False  # whether there have been thoughts
        self._begun_thought = False  # whether these thoughts have said anything yet

    def feed(self, text: str) -> tuple[str, str]:
        """What of the text so far is surely content, and what is surely thought."""
        return self._split(self._open + text, whole=False)

    def rest(self) -> tuple[str, str]:
        """The same for what was not told yet, now that nothing more comes."""
        return self._split(self._open, whole=True)

    def _split(self, text: str, *, whole: bool) -> tuple[str, str]:
        content: list[str] = []
        thoughts: list[str] = []
        while True:
            before = text, self._closing, self._first
            if self._closing:
                text = self._inside(text, thoughts, whole)
            elif self._first:
                text = self._beginning(text, content, whole)
            else:
                text = self._outside(text, content, whole)
            if not text or before == (text, self._closing, self._first):
                break
        self._open = text
        return "".join(content), "".join(thoughts)

    def _beginning(self, text: str, content: list[str], whole: bool) -> str:
        words = text.lstrip()
        for mark, closing in _MARKS.items():
            if words.startswith(mark):
                self._closing = closing
                return words[len(mark) :]
        if not whole and any(mark.startswith(words) for mark in _MARKS):
            return text
        self._first = False
        if not words and not self._thought:
            content.append(text)
        return words if self._thought or not words else text

    def _inside(self, text: str, thoughts: list[str], whole: bool) -> str:
        if not self._begun_thought:
            text = text.lstrip()
        end = text.find(self._closing)
        if end >= 0:
            thoughts.append(text[:end].rstrip())
            text = text[end + len(self._closing) :]
            self._closing, self._first, self._thought, self._begun_thought = "", True, True, False
            return text
        kept = "" if whole else text[len(text) - overlap(text, self._closing) :]
        said = text[: len(text) - len(kept)]
        sure = said.rstrip()
        if sure:
            thoughts.append(sure)
            self._begun_thought = True
        return "" if whole else said[len(sure) :] + kept

    def _outside(self, text: str, content: list[str], whole: bool) -> str:
        found = text.find(_ANYWHERE)
        if found >= 0:
            content.append(text[:found])
            self._closing = _MARKS[_ANYWHERE.rstrip()]
            return text[found + len(_ANYWHERE) :]
        keep = 0 if whole else overlap(text, _ANYWHERE)
        content.append(text[: len(text) - keep])
        return text[len(text) - keep :]


def separate(answer: Answer) -> bool:
    """Moves thoughts out of an answer's content, in place; whether there were any."""
    if not any(mark in answer.content for mark in _MARKS):
        return False
    splitter = ThoughtSplitter()
    pieces = [splitter.feed(answer.content), splitter.rest()]
    thoughts = "".join(thought for _, thought in pieces)
    answer.content = "".join(content for content, _ in pieces)
    answer.reasoning += thoughts
    return True


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that is a beginning of a mark, and not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
