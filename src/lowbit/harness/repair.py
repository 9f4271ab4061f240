"""Broken JSON mended, or refused: never read as something that the model may not have meant.

json-repair always finds some value: it drops what it does not understand, merges objects, keeps one of two equal keys
and closes what was cut off. So what it proposes is taken only where a second reader, the one below, which knows the few
slips that leave no doubt and gives up at anything else, reads the same value from the same text. White space at the
ends of strings, which json-repair drops, is kept.
"""

from __future__ import annotations

import json
import re
from typing import Any

_DEEPEST = 64
_SPACE = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?(?=[\s,\]}/]|$)")
_LITERAL = re.compile(r"(true|false|null|True|False|None)(?=[\s,\]}/]|$)")
_NAME = re.compile(r"([A-Za-z_$][\w$-]*)(?=\s*:)")
_ESCAPE = re.compile(r'\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')
_LITERALS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_BEFORE = re.compile(r'[{}\[\]]|"\s*:|[\w"]$')  # no prose in front of a value has these
_BEHIND = re.compile(r'[{}\[\]]|"\s*:|^[\w"]')  # nor these behind it


def mended(text: str, schema: Any = None) -> tuple[Any, str | None]:
    """A JSON value out of text that is not JSON, and a word for what it took ("json_extracted", "json_repaired");
    (None, None) where there is none, or a doubt about which.

    schema: a JSON Schema, which decides whether brackets that are missing at the end may be put there: they may where
    what they close is whole by it. Without one they may not: the text may have been cut.
    """
    found = _extracted(text)
    if found is not None:
        return found[0], "json_extracted"
    inner = unfenced(text)
    start = min((i for i in (inner.find("{"), inner.find("[")) if i >= 0), default=-1)
    if start < 0 or _BEFORE.search(inner[:start]):
        return None, None
    reader = _Reader(inner[start:])
    try:
        value = reader.whole()
        if not reader.closed and not complete(value, schema, schema):
            return None, None
        end = reader.at
        if _BEHIND.search(inner[start + end :]) or _bare(value) != _bare(_proposed(inner[start : start + end])):
            return None, None
    except (_Doubt, ValueError, RecursionError):
        return None, None
    return value, "json_repaired"


def loads(text: str) -> Any:
    """json.loads, but for what JSON leaves open: a key twice, NaN, a number beyond float64. Raises ValueError."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def dumps(value: Any) -> str:
    """JSON text, readable where it can be sent as it is: half of a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class TwoKeys(ValueError):
    """An object has a key twice: which one counts is anybody's guess."""


def unfenced(text: str) -> str:
    """What stands in the one code fence, or the whole text."""
    begin = text.find("```")
    line_end = text.find("\n", begin)
    # Behind a bracket it may stand within a string of the JSON.
    if begin < 0 or line_end < 0 or text.count("```") > 2 or _BEFORE.search(text[:begin]):
        return text.strip()
    end = text.find("```", line_end)
    return text[line_end + 1 : end if end >= 0 else len(text)].strip()


def complete(value: Any, schema: Any, root: Any) -> bool:
    """Whether the containers at the end of a value, which were not closed, can hold nothing more by the schema: an
    object has every property that is named, an array is as long as it may be."""
    for _ in range(8):  # of $refs that lead to $refs
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        schema = _at(root, reference)
    if not isinstance(schema, dict):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not value or not properties.keys() <= value.keys():
            return False
        last = next(reversed(value))
        return not isinstance(value[last], dict | list) or complete(value[last], properties.get(last), root)
    if isinstance(value, list):
        if not value or schema.get("maxItems") != len(value):
            return False
        return not isinstance(value[-1], dict | list) or complete(value[-1], schema.get("items"), root)
    return True


class _Doubt(Exception):
    """The text can be read in more than one way, or in none."""


class _Reader:
    """Reads JSON with these slips: quotes of another kind, keys without quotes, Python's literals, comments, line
    breaks in strings, a comma missing before a quote or too many before a closing bracket, no closing brackets at the
    end. closed: whether none of those was missing. at: where the value ended."""

    def __init__(self, text: str) -> None:
        self._text, self.at, self.closed = text, 0, True

    def whole(self) -> Any:
        value = self._value(0)
        # A container that was left open is only taken for whole where its last part is seen to have ended.
        if not self.closed and not re.search(r"[^\s,:\[\]{}][\"'”’]\s*$|[a-z]\s*$", self._text):
            raise _Doubt
        return value

    def _value(self, depth: int) -> Any:
        self._skip()
        here = self._text[self.at : self.at + 1]
        if depth > _DEEPEST:
            raise _Doubt
        if here == "{":
            return self._object(depth)
        if here == "[":
            return self._array(depth)
        if here in _QUOTES and here:
            return self._string()
        if match := _LITERAL.match(self._text, self.at):
            self.at = match.end()
            return _LITERALS[match[1]]
        if match := _NUMBER.match(self._text, self.at):
            self.at = match.end()
            return loads(match[0])
        raise _Doubt

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.at += 1
        before = ""
        while not self._ends("}", before, found):
            self._skip()
            if match := _NAME.match(self._text, self.at):
                key, self.at = match[1], match.end()
            else:
                key = self._string()
            if key in found or key.strip()[:1] == "," or not self._take(":"):
                raise _Doubt
            found[key] = self._value(depth + 1)
            before = self._separator()
        return found

    def _array(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self.at += 1
        before = ""
        while not self._ends("]", before, found):
            found.append(self._value(depth + 1))
            before = self._separator()
            if before == "," and isinstance(found[-1], int | float | None) and self._peek() in ("]", ""):
                raise _Doubt  # [1, 2,] may have lost a digit behind its comma
        return found

    def _ends(self, closing: str, before: str, found: Any) -> bool:
        """Whether the container ends here. before: what separated it from the last element."""
        here = self._peek()
        if here == closing:
            if before == "," and not found:
                raise _Doubt
            self.at += 1
            return True
        if here == "":
            if not found or before == ",":
                raise _Doubt
            self.closed = False
            return True
        if found and before != ",":
            # A comma is missing. Before a quote that is plain to see, unless the comma is in one of the strings.
            if here not in _QUOTES or before == "no":
                raise _Doubt
            follows = self._text[self.at + 1 : self.at + 2]
            if follows in (",", ":"):
                raise _Doubt
        return False

    def _separator(self) -> str:
        """A comma where one was taken, "no" where one may not be missing, "" where it may."""
        last = self._text[self.at - 2 : self.at]
        if self._take(","):
            return ","
        return "no" if last[:1] in (",", ":") and last[1:] in _QUOTES.values() else ""

    def _string(self) -> str:
        closing = _QUOTES.get(self._text[self.at : self.at + 1])
        if closing is None:
            raise _Doubt
        pieces, at = [], self.at + 1
        plain = re.compile(rf"[^\\{closing}]+")
        while (char := self._text[at : at + 1]) != closing:
            if char == "":
                raise _Doubt
            if char == "\\":
                escape = _ESCAPE.match(self._text, at)
                if escape is None and self._text[at + 1 : at + 2] == closing == "'":
                    pieces.append("'")
                    at += 2
                    continue
                if escape is None:
                    raise _Doubt
                pieces.append(escape[0])
                at = escape.end()
                continue
            match = plain.match(self._text, at)
            assert match is not None
            pieces.append(json.dumps(match[0])[1:-1])
            at = match.end()
        if self._text[at - 1] == "\n" and self._text.count("\n", self.at, at) == 1:
            raise _Doubt  # the line may have ended behind the string
        self.at = at + 1
        text: str = json.loads('"' + "".join(pieces) + '"')
        return text

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self.at)
        self.at = match.end() if match else self.at

    def _peek(self) -> str:
        self._skip()
        return self._text[self.at : self.at + 1]

    def _take(self, char: str) -> bool:
        taken = self._peek() == char
        self.at += taken
        return taken


def _extracted(text: str) -> tuple[Any] | None:
    """The one value that is whole JSON in a text of other words, in a tuple."""
    inner = unfenced(text)
    if inner != text.strip():
        try:
            return (loads(inner),)
        except (ValueError, RecursionError):
            pass
    decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    start = min((i for i in (text.find("{"), text.find("[")) if i >= 0), default=-1)
    if start < 0:
        return None
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    # More brackets around it would make it a part of something, or one of several.
    return None if _BEFORE.search(text[:start]) or _BEHIND.search(text[end:]) else (value,)


def _proposed(text: str) -> Any:
    import json_repair

    try:
        return json_repair.loads(text, skip_json_loads=True)
    except (RecursionError, TypeError, KeyError, IndexError) as error:
        raise ValueError(str(error)) from None


def _bare(value: Any) -> Any:
    """A value without the white space at the ends of its strings, which json-repair drops."""
    if isinstance(value, dict):
        return {key.strip(): _bare(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return value.strip() if isinstance(value, str) else value


def _at(root: Any, reference: str) -> Any:
    """What a reference within the schema (RFC 6901 behind a #) points to; None where it is nothing."""
    if not reference.startswith("#"):
        return None
    node = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise TwoKeys(f"the key {twice[:60]!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
