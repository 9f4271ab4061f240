"""What Gemma 4 and FunctionGemma share: call:name{key:value,...}, with strings between marks of the vocabulary.

    call:get_weather{city:<|"|>Rome<|"|>,days:3,units:[<|"|>C<|"|>],at:{lat:1.5}}

Keys are bare words, strings need no escapes because their delimiter is a token that text cannot hold, and everything
else is as in JSON. Read from the models' chat templates, which write tools (types in capitals), calls and results
({value:...}) in this form, from llama.cpp's models/templates/gemma4.jinja, and from vLLM's gemma4_tool_parser.py and
functiongemma_tool_parser.py; unlike mlx-lm's function_gemma.py, brackets and commas inside strings end nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import arguments_of, quoted
from lowbit.harness.dialects.base import Dialect, Parsed

_HEAD = re.compile(r"\s*(?:call:)?\s*([\w.\-/]{1,128})\s*(?=\{)")
_BARE = re.compile(r"[^,\[\]{}]*")
_KEY = re.compile(r'\s*"?([^":,{}\[\]]{1,256}?)"?\s*:')
_MAY_BE = re.compile(r"\s*(?:call:?|cal?|c)?\s*(?:\Z|[\w.\-/]{1,128}\s*(?:\Z|\{))")
_DEEPEST = 64
_STRAY = 64  # characters of brackets and white space that may stand between a call and its closing mark


class Broken(Exception):
    """The syntax ends here: position and what was read so far."""


@dataclass
class Reader:
    """Reads one value after the other from ``text``. quotes: a string's delimiters, the model's own first."""

    text: str
    at: int
    quotes: tuple[str, ...]
    end: str = ""  # the mark that ends the call
    broken: bool = False  # whether something was missing that had to be put up with
    cut: bool = False  # whether a string had no end

    def value(self, depth: int = 0) -> Any:
        """Raises Broken where there is none, or it is nested too deep."""
        self._space()
        if depth > _DEEPEST or self.at >= len(self.text):
            raise Broken
        for quote in self.quotes:
            if self.text.startswith(quote, self.at):
                return self._string(quote)
        if self.text[self.at] == "{":
            return self._object(depth)
        if self.text[self.at] == "[":
            return self._array(depth)
        return self._bare()

    def _string(self, quote: str) -> str:
        begin = self.at + len(quote)
        end = self.text.find(quote, begin)
        while quote == '"' and end > 0 and _escaped(self.text, end):
            end = self.text.find(quote, end + 1)
        if end < 0:
            if quote != self.quotes[0] or self.text.find(self.end, begin) >= 0:
                raise Broken
            # A string that was cut off: the arguments are written without their end, for healing to judge.
            self.cut, self.broken, self.at = True, True, len(self.text)
            return self.text[begin:]
        self.at = end + len(quote)
        inner = self.text[begin:end]
        if quote != '"':
            return inner
        try:
            return str(json.loads(f'"{inner}"', strict=False))
        except ValueError:
            return inner

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        while not self._closes("}"):
            key = self._key()
            found[key] = self.value(depth + 1)
        return found

    def _array(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        while not self._closes("]"):
            found.append(self.value(depth + 1))
        return found

    def _key(self) -> str:
        for quote in self.quotes[:1]:
            self._space()
            if self.text.startswith(quote, self.at):
                key = self._string(quote)
                self._space()
                if self.text[self.at : self.at + 1] != ":":
                    raise Broken
                self.at += 1
                return key
        match = _KEY.match(self.text, self.at)
        if match is None:
            raise Broken
        self.at = match.end()
        return match[1].strip()

    def _closes(self, mark: str) -> bool:
        """Whether the object or array ends here; commas between its members are passed over."""
        self._space()
        while self.text[self.at : self.at + 1] == ",":
            self.at += 1
            self._space()
        if self.at >= len(self.text):
            self.broken = True  # only brackets are missing: nothing of the content is
            return True
        if self.text[self.at] == mark:
            self.at += 1
            return True
        if self.text[self.at] in "}]" or any(self.text.startswith(m, self.at) for m in ("<tool_call|>", "<end_func")):
            self.broken = True
            return True
        return False

    def _bare(self) -> Any:
        match = _BARE.match(self.text, self.at)
        word = match[0].split("<")[0] if match else ""
        if not word.strip():
            raise Broken
        self.at += len(word)
        try:
            return json.loads(word, parse_constant=str)
        except ValueError:
            return word.strip()

    def _space(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1


class GemmaDialect(Dialect):
    """begin, end: of a call. quote: of a string. tool, result: what a declaration and a result stand between."""

    begin: ClassVar[str]
    end: ClassVar[str]
    quote: ClassVar[str]
    tool: ClassVar[tuple[str, str]]
    result: ClassVar[tuple[str, str]]

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        parsed, rest, at = Parsed(content=""), [], 0
        last = text.rfind(self.end)
        while (begin := text.find(self.begin, at)) >= 0:
            head = _HEAD.match(text, begin + len(self.begin))
            if head is None or quoted(text, begin):  # the mark in a sentence: no call
                rest.append(text[at : begin + len(self.begin)])
                at = begin + len(self.begin)
                continue
            rest.append(text[at:begin])
            at = self._one(text, head, parsed, last)
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        return _MAY_BE.match(text, len(self.begin)) is not None

    def _one(self, text: str, head: re.Match[str], parsed: Parsed, last: int) -> int:
        """Takes in the call whose name has been read; where the text goes on after it. last: where the last closing
        mark of the text is."""
        reader = Reader(text, head.end(), (self.quote, '"'), self.end)
        try:
            arguments = reader.value()
            written = json.dumps(arguments, ensure_ascii=False)
            if reader.cut:
                written = written.rstrip("}]").removesuffix('"')
                parsed.notes.append("arguments that end in the middle")
            elif reader.broken and reader.at >= len(text):
                written = written.rstrip("}]")
        except Broken:
            end = text.find(self.end, head.end()) if head.end() <= last else -1
            stop = len(text) if end < 0 else end
            written = "{"  # no object, and not to be closed: what was meant cannot be known
            parsed.notes.append("arguments that end in the middle")
            reader.at = stop
        parsed.calls.append(Call(name=head[1], arguments=written))
        if text.startswith(self.end, reader.at):
            return reader.at + len(self.end)
        found = text.find(self.end, reader.at, reader.at + _STRAY + len(self.end))
        if reader.broken or found < 0:
            parsed.notes.append(f"no closing {self.end}")
        return found + len(self.end) if found >= 0 and not text[reader.at : found].strip(" \n}]") else reader.at

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = []
        for tool in tools:
            function = tool["function"]
            body = {key: function[key] for key in ("description", "parameters") if function.get(key)}
            body = _upper(body)
            listed.append(f"{self.tool[0]}declaration:{function['name']}{self.written(body)}{self.tool[1]}")
        words = "You can call these functions. To call one, write: "
        return words + f"{self.begin}call:name{{key:value}}{self.end}\n" + "\n".join(listed)

    def call_text(self, calls: Sequence[Call]) -> str:
        return "".join(f"{self.begin}call:{call.name}{self._arguments(call)}{self.end}" for call in calls)

    def _arguments(self, call: Call) -> str:
        values = arguments_of(call)
        return "{" + call.arguments + "}" if values is None else self.written(values)

    def result_text(self, name: str, content: str) -> str:
        return f"{self.result[0]}response:{name}{self.written({'value': content})}{self.result[1]}"

    def written(self, value: Any) -> str:
        """A value in this syntax."""
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self.written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(self.written(item) for item in value) + "]"
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        return json.dumps(value)


def _upper(schema: Any) -> Any:
    """A schema with its types in capitals, as these templates write them."""
    if isinstance(schema, list):
        return [_upper(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: v.upper() if k == "type" and isinstance(v, str) else _upper(v) for k, v in schema.items()}


def _escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before a position."""
    n = 0
    while text[at - 1 - n : at - n] == "\\":
        n += 1
    return n % 2 == 1
