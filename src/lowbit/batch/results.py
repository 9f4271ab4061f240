"""OUT: a batch's results as Batch JSONL, and the errors apart with what was tried, each whole or not at all.

The form of a line: https://platform.openai.com/docs/api-reference/batch/request-output. OUT has every custom_id of IN
once, in IN's order, what failed included; OUT.errors.jsonl has what failed, and lines that were no request.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowbit import files
from lowbit.batch.journal import CANCELLED, DONE, FAILED, Journal

_ROWS = (
    "SELECT i.number, i.line, i.custom_id, i.state, r.status, r.kind, r.body, r.tries, r.seconds, r.prompt_tokens,"
    " r.completion_tokens FROM items i LEFT JOIN results r ON r.number = i.number WHERE i.state >= 2 ORDER BY i.number"
)


@dataclass(frozen=True, slots=True)
class Row:
    """An item that ended. body: JSON, b"" of one that was cancelled."""

    number: int
    line: int
    custom_id: str | None
    state: int
    status: int
    kind: str | None
    body: bytes
    tries: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def failed(self) -> bool:
        return self.state != DONE

    @property
    def answered(self) -> bool:
        """Whether there is an HTTP answer to show."""
        return self.status > 0

    def error(self) -> dict[str, Any] | None:
        """{"code", "message"} of one that failed."""
        if self.state == CANCELLED:
            return {"code": "batch_cancelled", "message": "the batch was cancelled before this request was answered"}
        if self.state != FAILED:
            return None
        told = json.loads(self.body).get("error") or {}
        return {"code": self.kind, "message": told.get("message") or ""}


def rows(journal: Journal) -> Iterator[Row]:
    """The items that have ended, in IN's order, one at a time."""
    for found in journal.query(_ROWS):
        number, line, custom_id, state = found[:4]
        yield Row(number, line, custom_id, state, *((0, None, b"", 0, 0.0, 0, 0) if found[4] is None else found[4:]))


def errors_path(out: Path) -> Path:
    """OUT.jsonl -> OUT.errors.jsonl"""
    return out.with_name(out.name.removesuffix(out.suffix) + ".errors.jsonl")


def write(journal: Journal, out: Path, schema: Any = None, errors: Path | None = None) -> int:
    """OUT and its errors; how many errors there are. schema: whose top level gives a Parquet file its columns. errors:
    where they go instead of beside OUT, which may be "-", standard output.

    Raises CannotWrite; NotFound (Parquet without pyarrow).
    """
    if out.suffix == ".parquet":
        from lowbit.batch import as_parquet

        as_parquet.write(journal, out, schema)
    elif str(out) == "-":
        write_lines(journal, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:
        with files.replacing(out) as partial, open(partial, "wb") as handle:
            write_lines(journal, handle)
    return write_errors(journal, errors or errors_path(out))


def write_lines(journal: Journal, handle: IO[bytes]) -> None:
    """The lines of OUT."""
    for row in rows(journal):
        if row.custom_id is not None:
            handle.write(line(row))


def write_errors(journal: Journal, path: Path) -> int:
    """The errors' own file; none where there are none."""
    count = 0
    with files.replacing(path) as partial, open(partial, "wb") as handle:
        for row in rows(journal):
            if row.failed:
                handle.write(_error_line(row))
                count += 1
    if not count:
        path.unlink(missing_ok=True)
    return count


def line(row: Row) -> bytes:
    """A line of OUT. The response is given on as it was kept, byte for byte."""
    name = hashlib.sha256((row.custom_id or f"line {row.line}").encode()).hexdigest()[:24]
    head = {"id": f"batch_req_{name}", "custom_id": row.custom_id}
    response = b"null"
    if row.answered:
        response = b'{"status_code": %d, "request_id": "req_%s", "body": %s}' % (row.status, name.encode(), row.body)
    start = json.dumps(head, ensure_ascii=False).encode()
    return start[:-1] + b', "response": ' + response + b', "error": ' + json.dumps(row.error()).encode() + b"}\n"


def _error_line(row: Row) -> bytes:
    trace = json.loads(row.body).get("lowbit") if row.body else None
    more = json.dumps({"line": row.line, "trace": trace}, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return line(row)[:-2] + b", " + more[1:] + b"\n"
