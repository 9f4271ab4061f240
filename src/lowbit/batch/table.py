"""Rows of CSV, TSV and JSONL as items: a prompt template that each row fills.

A template is Jinja, in its sandbox, with the row's columns as names, and ``row`` for names that are no identifiers; a
name that the row has not is an error of that row. An id is of the id column, or the number of the row's first line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.batch.items import LONGEST_LINE, Item, NoItem, Place, lines, loads, read_place, usable_id
from lowbit.errors import BadFile, BadOption
from lowbit.run._chat_template import tojson

URL = "/v1/chat/completions"
_LINE = "line-"


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """template, system: Jinja. id_column: where custom_id stands; None numbers the rows. schema: JSON Schema of the
    answers, called schema_name, which check may know more about. body: what else each request has."""

    template: str
    system: str | None = None
    id_column: str | None = None
    schema: Any = None
    schema_name: str = "answer"
    check: Callable[[Any], str | None] | None = None
    body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})

    def deciding(self) -> dict[str, Any]:
        """What of it the answers depend on, as JSON."""
        found = {"template": self.template, "system": self.system, "id": self.id_column, "schema": self.schema}
        return found | {f"body.{name}": value for name, value in self.body.items()}

    def as_json(self) -> dict[str, Any]:
        """All of it but check, for ``TableOptions(**found)``."""
        return {name: value for name, value in vars(self).items() if name != "check"} | {"body": dict(self.body)}


class _Table:
    """What the forms share: a row becomes a request."""

    def __init__(self, path: Path, options: TableOptions) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path, self.options = path, options
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["tojson"] = tojson
        self._environment = environment
        self._system = None if options.system is None else self._compiled("--system", options.system)
        self._template = self._compiled("--template", options.template)

    def _compiled(self, flag: str, text: str) -> Any:
        import jinja2

        try:
            return self._environment.from_string(text)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            where = flag if line is None else f"{flag}, line {line}"
            raise BadOption("the template cannot be read", where=where, found=str(error)) from None

    def wanted(self) -> set[str]:
        """Names that the templates read from outside."""
        from jinja2 import meta

        texts = [self.options.template, *([self.options.system] if self.options.system is not None else [])]
        found: set[str] = set()
        for text in texts:
            found |= meta.find_undeclared_variables(self._environment.parse(text))
        return found - set(self._environment.globals) - {"row"}

    def custom_id(self, row: Mapping[str, Any], line: int) -> str:
        """Raises NoItem."""
        column = self.options.id_column
        if column is None:
            return f"{_LINE}{line}"
        value = row.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value in (None, ""):
            raise NoItem(f"no {column}, which is to be the id")
        return usable_id(value)

    def as_item(self, row: Mapping[str, Any], custom_id: str) -> Item:
        options = self.options
        messages = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._filled(self._system, row)})
        messages.append({"role": "user", "content": self._filled(self._template, row)})
        body = {"messages": messages, **options.body}
        if options.schema is not None:
            form = {"name": options.schema_name, "schema": options.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return Item(custom_id=custom_id, url=URL, body=body, check=options.check)

    def _filled(self, template: Any, row: Mapping[str, Any]) -> str:
        import jinja2

        try:
            text = template.render({**row, "row": dict(row)})
        except jinja2.UndefinedError as error:
            raise NoItem(f"the template wants what this row has not: {error}") from None
        except Exception as error:  # a filter on a value that it is not for, in a template of the user's own
            raise NoItem(f"the template fails on this row: {type(error).__name__}: {error}") from None
        if not text.strip():
            raise NoItem("the template makes no text of this row")
        return str(text)

    def same(self, row: Mapping[str, Any], custom_id: str) -> None:
        """Raises BadFile where the row is another than it was."""
        column = self.options.id_column
        if column is not None and str(row.get(column)) != custom_id:
            raise BadFile(
                "another row stands there now", where=self.path, found=str(row.get(column))[:60],
                expected=custom_id[:60], hint="Put the file back as it was, or begin anew with --restart",
            )  # fmt: skip


class JsonRows(_Table):
    """JSONL: an object in each line."""

    def places(self, begin: int = 0, line: int = 1) -> Iterator[Place]:
        for number, offset, raw, length in lines(self.path, begin, line):
            if raw is not None and not raw.strip():
                continue
            try:
                if raw is None:
                    raise NoItem(f"longer than {LONGEST_LINE >> 20} MiB")
                yield Place(number, offset, length, self.custom_id(_row(raw), number))
            except NoItem as error:
                yield Place(number, offset, length, None, str(error))

    def item(self, raw: bytes, custom_id: str) -> Item:
        row = _row(raw)
        self.same(row, custom_id)
        return self.as_item(row, custom_id)


class CsvRows(_Table):
    """CSV with a header, as RFC 4180 has it; the delimiter is the header's: a comma, or else a tab or a semicolon."""

    def __init__(self, path: Path, options: TableOptions) -> None:
        super().__init__(path, options)
        csv.field_size_limit(LONGEST_LINE)
        self._delimiter, self._header, self._first = ",", list[str](), 0
        self._read_header()
        known = set(self._header)
        if len(known) != len(self._header):
            twice = next(name for name in self._header if self._header.count(name) > 1)
            raise BadFile("two columns have one name", where=path, found=repr(twice)[:60])
        wanted = self.wanted() | ({options.id_column} if options.id_column is not None else set())
        if missing := sorted(wanted - known):
            raise BadOption(
                f"no column {missing[0]}", where=path, found=", ".join(self._header)[:200],
                hint="Are the template's names the header's?",
            )  # fmt: skip

    def places(self, begin: int = 0, line: int = 1) -> Iterator[Place]:
        for number, offset, length, values, problem in self._records(begin, line):
            if begin == 0 and offset < self._first:
                continue  # the header
            try:
                if problem is not None:
                    raise NoItem(problem)
                yield Place(number, offset, length, self.custom_id(self._named(values), number))
            except NoItem as error:
                yield Place(number, offset, length, None, str(error))

    def item(self, raw: bytes, custom_id: str) -> Item:
        texts = (line.decode("utf-8", "surrogateescape") for line in io.BytesIO(raw))  # other ends of lines are text
        found = next(csv.reader(texts, delimiter=self._delimiter, strict=True))
        row = self._named(found)
        self.same(row, custom_id)
        return self.as_item(row, custom_id)

    def _read_header(self) -> None:
        first = next((raw for _, _, raw, _ in lines(self.path, 0, 1) if raw is None or raw.strip()), None)
        if first is None:
            raise BadFile("no header", where=self.path, expected="names of columns in the first line")
        counts = {mark: first.count(mark.encode()) for mark in (",", "\t", ";")}
        self._delimiter = "," if counts[","] or not any(counts.values()) else max(counts, key=lambda m: counts[m])
        _, offset, length, header, problem = next(self._records(0, 1))
        if problem is not None or not all(name.strip() for name in header):
            raise BadFile("no header", where=self.path, found=problem or "a column without a name",
                          expected="names of columns in the first line")  # fmt: skip
        self._header, self._first = [name.strip() for name in header], offset + length

    def _records(self, begin: int, line: int) -> Iterator[tuple[int, int, int, list[str], str | None]]:
        """(line, offset, length, values, problem) of each record; a quoted value may hold ends of lines."""
        feed = lines(self.path, begin, line)
        while True:
            taken: list[tuple[int, int, int]] = []
            values, problem = list[str](), None
            try:
                values = next(csv.reader(_texts(feed, taken), delimiter=self._delimiter, strict=True))
            except StopIteration:
                return
            except (csv.Error, NoItem) as error:
                problem = f"not CSV: {error}"
            number, offset, _ = taken[0]
            length = taken[-1][1] + taken[-1][2] - offset
            if values or problem:
                yield number, offset, length, values, problem

    def _named(self, values: list[str]) -> dict[str, str]:
        if len(values) != len(self._header):
            raise NoItem(f"{len(values)} values under {len(self._header)} columns")
        if any("\udc80" <= c <= "\udcff" for value in values for c in value):
            raise NoItem("not UTF-8")
        return dict(zip(self._header, values, strict=True))


def first_item(table: JsonRows | CsvRows) -> Item:
    """The item of the first row that is one; a template that does not fit it fits none. Raises BadOption, BadFile."""
    for place in table.places():
        if place.problem is not None or place.custom_id is None:
            continue
        try:
            return table.item(read_place(table.path, place.offset, place.length), place.custom_id)
        except NoItem as error:
            raise BadOption("the template does not fit", where=f"{table.path}, line {place.line}", found=str(error),
                            hint="The columns are its names") from None  # fmt: skip
    raise BadFile("no row that can be used", where=table.path)


def _texts(feed: Iterator[tuple[int, int, bytes | None, int]], taken: list[tuple[int, int, int]]) -> Iterator[str]:
    for number, offset, raw, length in feed:
        taken.append((number, offset, length))
        if raw is None:
            raise NoItem(f"a line longer than {LONGEST_LINE >> 20} MiB")
        yield raw.decode("utf-8", "surrogateescape")


def _row(raw: bytes) -> dict[str, Any]:
    found = loads(raw)
    if not isinstance(found, dict):
        raise NoItem("not an object")
    return found


def shown(value: Any) -> str:
    """A value of a Parquet file as JSON has it: dates and bytes as text."""
    return json.dumps(value, ensure_ascii=False, default=str)
