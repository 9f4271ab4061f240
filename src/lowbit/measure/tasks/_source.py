"""Task files: JSONL, a question a line, from people who may never have run them. Every complaint names its line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import BadText, NotFound
from lowbit.units import MIB, format_bytes

LARGEST_FILE = 256 * MIB
LONGEST_LINE = 4 * MIB
_HINT = "docs/tasks.md shows what a line looks like"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line's object; where: "file: line 3", for errors."""

    where: str
    fields: Mapping[str, Any]

    def wrong(self, what: str, found: object = None, expected: object = None) -> BadText:
        """The error to raise about it."""
        return BadText(what, where=self.where, found=None if found is None else _brief(found), expected=expected,
                       hint=_HINT)  # fmt: skip

    def text(self, key: str, default: str | None = None, *, empty: bool = False) -> str:
        """The string under a key. Raises BadText where it is missing (without a default), empty or something else."""
        value = self.fields.get(key, default)
        if not isinstance(value, str) or not (value.strip() or empty):
            raise self.wrong(f'bad "{key}"', value, "a string" if empty else "a string that is not empty")
        return value

    def texts(self, key: str, least: int = 1) -> list[str]:
        """The list of strings under a key; a single string is a list of one."""
        value = self.fields.get(key)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) < least or not all(isinstance(v, str) for v in value):
            raise self.wrong(f'bad "{key}"', value, f"a list of at least {least} string{'s' if least > 1 else ''}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """The object under a key."""
        value = self.fields.get(key)
        if not isinstance(value, dict):
            raise self.wrong(f'bad "{key}"', value, "an object")
        return value

    def name(self, at: int) -> str:
        """The item's own "id", else its line number."""
        value = self.fields.get("id", at)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong('bad "id"', value, "a string or a number")
        return str(value)

    def group(self) -> str:
        """What its figures are listed by: "group", "category" or "subject"."""
        key = next((k for k in ("group", "category", "subject") if k in self.fields), None)
        return "" if key is None else self.text(key, empty=True)


def read(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """The settings of a first line {"settings": {...}}, else {}, and all other lines.

    Raises NotFound; BadText for what is not UTF-8, not JSON, not objects, too large, empty, or has an id twice.
    """
    settings: dict[str, Any] = {}
    lines: list[Line] = []
    seen: dict[str, str] = {}
    for at, line in _lines(path):
        if not lines and not settings and set(line.fields) == {"settings"}:
            settings = line.mapping("settings")
            continue
        name = line.name(at)
        if name in seen:
            raise line.wrong("an id is used twice", name, f"another than that of {seen[name]}")
        seen[name] = line.where
        lines.append(line)
    if not lines:
        raise BadText("no questions in this file", where=path, expected="a JSON object on each line", hint=_HINT)
    return settings, lines


def head(path: Path) -> Mapping[str, Any]:
    """The first question of a file, which tells its kind. Raises as ``read`` does."""
    first: Mapping[str, Any] = {}
    for _, line in _lines(path):
        first = line.fields
        if set(first) != {"settings"}:
            break
    return first


def check_settings(path: Path, settings: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises BadText for a setting that is unknown or of another type."""
    line = Line(where=f"{path}: line 1", fields=settings)
    for key, value in settings.items():
        if key not in kinds:
            raise line.wrong("unknown setting", key, ", ".join(kinds))
        wanted = kinds[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            names = wanted if isinstance(wanted, tuple) else (wanted,)
            raise line.wrong(f'bad "{key}"', value, " or ".join(kind.__name__ for kind in names))


def split_shots(lines: Sequence[Line], shots: int, path: object) -> tuple[list[Line], list[Line]]:
    """The worked examples, which are the first lines, and the questions that are scored."""
    if shots >= len(lines):
        raise BadText("too few lines for the worked examples", where=path, found=f"{len(lines)} lines",
                      expected=f"more than the {shots} that are shown as examples")  # fmt: skip
    return list(lines[:shots]), list(lines[shots:])


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise BadText("too large for a task file", where=path, found=format_bytes(size),
                          expected=f"{format_bytes(LARGEST_FILE)} at most")  # fmt: skip
        with open(path, "rb") as handle:
            at = 0
            while raw := handle.readline(LONGEST_LINE + 1):
                at += 1
                if raw.strip():
                    yield at, Line(where=f"{path}: line {at}", fields=_object(raw, f"{path}: line {at}"))
    except FileNotFoundError:
        raise NotFound("no such task file", where=path, expected="a JSONL file") from None
    except OSError as error:
        raise BadText("the task file cannot be read", where=path, found=error.strerror) from None


def _object(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > LONGEST_LINE:
        raise BadText("this line is too long", where=where, expected=f"{format_bytes(LONGEST_LINE)} at most")
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except UnicodeDecodeError as error:
        raise BadText("not UTF-8", where=where, found=f"byte {error.start} of the line", hint=_HINT) from None
    except UnicodeEncodeError:
        raise BadText("a string has a lone surrogate", where=where) from None
    except (ValueError, RecursionError) as error:
        raise BadText("not JSON", where=where, found=_brief(error), expected="one object", hint=_HINT) from None
    if not isinstance(value, dict):
        raise BadText("not an object", where=where, found=_brief(value), expected='{"question": ...}', hint=_HINT)
    return value


def _brief(value: object) -> str:
    said = str(value) if isinstance(value, Exception) else repr(value)
    return said if len(said) <= 80 else said[:77] + "..."
