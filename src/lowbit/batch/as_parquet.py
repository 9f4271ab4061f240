"""OUT as Parquet: a row an item, with what was answered in columns of its own.

Columns: custom_id, status, content, error, error_message, tries, seconds, prompt_tokens, completion_tokens, events (the
harness's, as JSON), and one for each property of the schema's top level. Whole numbers, numbers, booleans and texts are
columns of their kind; anything else is JSON. One that has a name of those above is called answer_NAME.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowbit import files
from lowbit.batch.journal import Journal
from lowbit.batch.results import Row, rows
from lowbit.errors import NotFound

_AT_A_TIME = 512  # rows in memory
_FIXED = {
    "custom_id": "string", "status": "int32", "content": "string", "error": "string", "error_message": "string",
    "tries": "int32", "seconds": "float64", "prompt_tokens": "int64", "completion_tokens": "int64", "events": "string",
}  # fmt: skip
_KINDS = {"string": "string", "integer": "int64", "number": "float64", "boolean": "bool_"}


def write(journal: Journal, out: Path, schema: Any = None) -> None:
    """Raises NotFound (pyarrow is not installed), CannotWrite."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise NotFound("Parquet needs pyarrow", where=out, hint="pip install 'lowbit[batch]'") from None
    fields = fields_of(schema)
    columns = [(name, getattr(pa, kind)()) for name, kind in _FIXED.items()]
    columns += [(column, getattr(pa, kind)()) for _, column, kind in fields]
    form = pa.schema(columns)
    with files.replacing(out) as partial, parquet.ParquetWriter(partial, form, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows(journal):
            if row.custom_id is None:
                continue
            waiting.append(_as_row(row, fields))
            if len(waiting) == _AT_A_TIME:
                writer.write_table(pa.Table.from_pylist(waiting, schema=form))
                waiting.clear()
        writer.write_table(pa.Table.from_pylist(waiting, schema=form))


def fields_of(schema: Any) -> list[tuple[str, str, str]]:
    """(property, column, kind of the column) of an object's schema."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = []
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        kinds = inner.get("type") if isinstance(inner, dict) else None
        named = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"]
        kind = _KINDS.get(str(named[0]), "json") if len(named) == 1 else "json"
        kind = "string" if kind == "json" and _all_text(inner) else kind
        found.append((name, f"answer_{name}" if name in _FIXED else name, kind))
    return [(name, column, "string" if kind == "json" else kind) for name, column, kind in found]


def content_of(body: dict[str, Any]) -> str | None:
    """What the model wrote: of a chat completion, a text completion or a response."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    found = message.get("content") if isinstance(message, dict) else choice.get("text")
    if found is None and isinstance(body.get("output"), list):
        found = "".join(_output_texts(body["output"]))
    return found if isinstance(found, str) else None


def _as_row(row: Row, fields: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    body = json.loads(row.body) if row.body else {}
    error, told = row.error() or {}, body.get("lowbit") or {}
    content = None if row.failed else content_of(body)
    found = {
        "custom_id": row.custom_id, "status": row.status or None, "content": _valid(content),
        "error": error.get("code"), "error_message": _valid(error.get("message")), "tries": row.tries,
        "seconds": row.seconds, "prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens,
        "events": json.dumps(told.get("events") or []),
    }  # fmt: skip
    value = _parsed(content)
    for name, column, kind in fields:
        found[column] = _as(value.get(name), kind)
    return found


def _parsed(content: str | None) -> dict[str, Any]:
    try:
        value = json.loads(content or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _as(value: Any, kind: str) -> Any:
    """A value as a column's kind has it; None where it cannot be. A text column takes what is no text as JSON."""
    if value is None:
        return None
    if kind == "string":
        return _valid(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if kind == "bool_":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "float64":
        return float(value) if abs(value) < 1e308 else None
    return int(value) if value == int(value) and -(1 << 63) <= value < 1 << 63 else None


def _valid(text: str | None) -> str | None:
    """Without halves of surrogate pairs, which Parquet cannot hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _all_text(inner: Any) -> bool:
    values = inner.get("enum") if isinstance(inner, dict) else None
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _output_texts(output: list[Any]) -> Iterable[str]:
    for item in output:
        for part in item.get("content") or [] if isinstance(item, dict) and item.get("type") == "message" else []:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
