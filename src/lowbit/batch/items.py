"""IN as items, without holding it in memory: OpenAI's Batch JSONL, a request a line, found again by its place.

https://platform.openai.com/docs/api-reference/batch/request-input: {"custom_id", "method", "url", "body"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lowbit.errors import BadFile
from lowbit.units import MIB, format_bytes

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LONGEST_LINE = 32 * MIB  # as a body that `lowbit serve` takes
_LONGEST_ID = 1024  # characters
_PIECE = 1 * MIB
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item stands in IN. line: from 1. offset, length: bytes. problem: why it is none; custom_id is None
    where it has none that can be used."""

    line: int
    offset: int
    length: int
    custom_id: str | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """A request. body: of the request, url: which of URLS it goes to. check: says what else is wrong with a value that
    follows the schema, or None. shared: whether others that come with it begin alike."""

    custom_id: str
    url: str
    body: dict[str, Any]
    check: Callable[[Any], str | None] | None = None
    shared: bool = False


class NoItem(Exception):
    """What stands there is no request; the text says why."""


class Reader(Protocol):
    """What a form of IN can do: batch_lines() below, and the tables."""

    path: Path

    def places(self, begin: int, line: int) -> Iterator[Place]:
        """Those from a byte offset on, which is the beginning of the numbered line."""

    def item(self, raw: bytes, custom_id: str) -> Item:
        """The item whose bytes these are. Raises NoItem."""


class BatchLines:
    """Batch JSONL. Blank lines, a BOM and CRLF are no part of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def places(self, begin: int = 0, line: int = 1) -> Iterator[Place]:
        """Raises BadFile where IN cannot be read."""
        for number, offset, raw, length in lines(self.path, begin, line):
            if raw is None:
                said = f"longer than {format_bytes(LONGEST_LINE)}"
                yield Place(number, offset, length, None, said)
            elif raw.strip():
                yield _place(number, offset, length, raw)

    def item(self, raw: bytes, custom_id: str) -> Item:
        request = _request(raw)
        if request.get("custom_id") != custom_id:
            raise BadFile(
                "another item stands there now",
                where=self.path,
                found=str(request.get("custom_id"))[:60],
                expected=custom_id[:60],
                hint="Put the file back as it was, or begin anew with --restart",
            )
        return Item(custom_id=custom_id, url=request["url"], body=request["body"])


def read_place(path: Path, offset: int, length: int) -> bytes:
    """The bytes of an item. Raises BadFile."""
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            raw = handle.read(length)
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    if len(raw) != length:
        raise BadFile("shorter than when the batch began", where=path, hint="Put the file back, or use --restart")
    return raw


def lines(path: Path, begin: int, number: int) -> Iterator[tuple[int, int, bytes | None, int]]:
    """(number, offset, bytes without a BOM, length) of each line; None for the bytes of one that is too long. Only one
    line is in memory. Raises BadFile."""
    try:
        with open(path, "rb") as handle:
            handle.seek(begin)
            offset = begin
            while raw := handle.readline(LONGEST_LINE + 1):
                length = len(raw)
                whole = length <= LONGEST_LINE
                while not raw.endswith(b"\n") and not whole and (raw := handle.readline(_PIECE)):
                    length += len(raw)
                skip = len(_BOM) if whole and offset == 0 and raw.startswith(_BOM) else 0
                yield number, offset + skip, raw[skip:] if whole else None, length - skip
                offset += length
                number += 1
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None


def loads(raw: bytes | str) -> Any:
    """JSON from a stranger, or NoItem that says what is wrong with it."""
    try:
        return json.loads(raw if isinstance(raw, str) else raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise NoItem(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise NoItem("nested too deep") from None
    except ValueError as error:
        raise NoItem(f"not JSON: {' '.join(str(error).split())[:120]}") from None


def usable_id(value: Any) -> str:
    """A custom_id. Raises NoItem."""
    if not isinstance(value, str) or not value:
        raise NoItem("custom_id must be a text" if value is not None else "custom_id is missing")
    if len(value) > _LONGEST_ID:
        raise NoItem(f"custom_id is longer than {_LONGEST_ID} characters")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise NoItem("custom_id has half a surrogate pair")
    return value


def _place(line: int, offset: int, length: int, raw: bytes) -> Place:
    custom_id = None
    try:
        given = loads(raw)
        if not isinstance(given, dict):
            raise NoItem("not an object")
        custom_id = usable_id(given.get("custom_id"))
        _check(given)
    except NoItem as error:
        return Place(line, offset, length, custom_id, str(error))
    return Place(line, offset, length, custom_id)


def _request(raw: bytes) -> dict[str, Any]:
    given = loads(raw)
    if not isinstance(given, dict):
        raise NoItem("not an object")
    _check(given)
    return given


def _check(given: dict[str, Any]) -> None:
    if given.get("method") != "POST":
        raise NoItem(f"method must be POST; found {_shown(given.get('method'))}")
    if given.get("url") not in URLS:
        raise NoItem(f"url must be one of {', '.join(URLS)}; found {_shown(given.get('url'))}")
    if not isinstance(given.get("body"), dict):
        raise NoItem("body must be an object")


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value)[:60]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
