"""What IN is: told by its name, and made a file that items can be found in again by their place.

Batch JSONL, JSONL and CSV are read where they are. Compressed files, Parquet and standard input are first written,
whole or not at all, into the job's folder.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowbit import files
from lowbit.batch.items import BatchLines, Reader
from lowbit.batch.job import SUFFIX, folder_of
from lowbit.batch.results import errors_path
from lowbit.batch.table import CsvRows, JsonRows, TableOptions, first_item, shown
from lowbit.errors import BadFile, BadOption, CannotWrite, NotFound

STDIN = "-"
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
FORMS = ("jsonl", "csv", "parquet")
_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class Source:
    """path: what the user named, or where standard input was put. folder: of the job. reader: of its items. grows:
    whether lines may be added to it. reading: what it is opened with again."""

    path: Path
    folder: Path
    reader: Reader
    grows: bool
    reading: dict[str, Any]


def named(
    source: str | os.PathLike[str], out: str | os.PathLike[str] | None, folder: Path | None, *, anew: bool = False
) -> tuple[Path, Path]:
    """(the file, the job's folder). Standard input is read to its end and put into the folder; anew: whatever was there
    before.

    Raises BadFile, BadOption (standard input is another than it was), CannotWrite.
    """
    if os.fspath(source) == STDIN:
        return _from_stream(sys.stdin.buffer, out, folder, anew)
    path = Path(source)
    if path.is_fifo():  # a shell's <(...)
        with open(path, "rb") as stream:
            return _from_stream(stream, out, folder, anew)
    if out is not None:
        check_apart(path, Path(out))
    if not path.is_file():
        raise BadFile("no such file", where=path, expected="requests, one a line, or a table")
    return path, folder or folder_of(path)


def open_source(path: Path, folder: Path, table: TableOptions | None, form: str | None = None) -> Source:
    """path: as named() gives it. table: what makes requests of rows; None where IN has requests. form: one of FORMS,
    where the name does not tell.

    Raises BadFile, BadOption (a table without a template), NotFound (Parquet without pyarrow), CannotWrite.
    """
    form = form or _form_of(path)
    if form not in FORMS:
        raise BadOption("unknown form", found=form, expected=", ".join(FORMS))
    if table is None and form != "jsonl":
        raise BadOption("a table wants a template", where=path, expected="--template FILE|TEXT",
                        hint='As in --template "Is this good or bad? {{ text }}"')  # fmt: skip
    read = _read_path(path, folder, form)
    reader = _reader(read, table, form)
    if isinstance(reader, CsvRows | JsonRows):
        first_item(reader)
    reading = {"form": form, "table": None if table is None else table.as_json()}
    return Source(path, folder, reader, grows=read == path, reading=reading)


def opened(path: Path, folder: Path, reading: dict[str, Any] | None) -> Reader:
    """The reader of a job that was begun before. Raises BadFile, CannotWrite."""
    if reading is None:
        return BatchLines(path)
    table = None if reading["table"] is None else TableOptions(**reading["table"])
    return _reader(_read_path(path, folder, reading["form"]), table, reading["form"])


def _form_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return _TABLES.get(suffix.lower(), "jsonl")


def _read_path(path: Path, folder: Path, form: str) -> Path:
    """The file that items are read from."""
    if form == "parquet":
        return _spooled(path, folder, "jsonl", _rows_of_parquet)
    return _spooled(path, folder, form, _unpack) if path.suffix == ".gz" else path


def _reader(path: Path, table: TableOptions | None, form: str) -> Reader:
    if table is None:
        return BatchLines(path)
    return CsvRows(path, table) if form == "csv" else JsonRows(path, table)


def cache() -> Path:
    """Where jobs from standard input to standard output are, by their content."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "batch"


def check_apart(source: Path, out: Path) -> None:
    """Raises BadOption where what is to be written would replace IN."""
    for path in (out, errors_path(out)):
        if path.exists() and source.exists() and path.samefile(source):
            raise BadOption("the results would replace what is asked", where=path, hint="Choose another -o")


def _from_stream(
    stream: IO[bytes], out: str | os.PathLike[str] | None, folder: Path | None, anew: bool
) -> tuple[Path, Path]:
    if folder is None and out is not None and os.fspath(out) != STDIN:
        folder = Path(os.fspath(out) + SUFFIX)
    place = folder or cache()
    with _writing(place):
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, prefix="stdin-", delete=False) as handle:
            given = Path(handle.name)
            digest = _copied(stream, handle)
    try:
        if not given.stat().st_size:
            raise BadFile("nothing on standard input", expected="requests, one a line")
        folder = folder or place / digest[:24]
        kept = folder / "stdin"
        if kept.exists() and not anew and not _begins_with(given, kept):
            raise BadOption("another standard input than this batch was begun with", where=folder,
                            hint="Choose another -o, or begin anew with --restart")  # fmt: skip
        if not kept.exists() or anew or kept.stat().st_size != given.stat().st_size:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                given.replace(kept)
        return kept, folder
    finally:
        with contextlib.suppress(OSError):
            given.unlink()


def _copied(source: IO[bytes], target: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := source.read(_AT_A_TIME):
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest()


def _begins_with(path: Path, begin: Path) -> bool:
    with open(path, "rb") as whole, open(begin, "rb") as part:
        while piece := part.read(_AT_A_TIME):
            if whole.read(len(piece)) != piece:
                return False
    return True


def _spooled(path: Path, folder: Path, suffix: str, write: Callable[[Path, IO[bytes]], Any]) -> Path:
    """Made once for what the file is now; the job sees to it that it stays so."""
    try:
        stat = path.stat()
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    told = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode()).hexdigest()[:12]
    spool = folder / f"rows-{told}.{suffix}"
    if not spool.exists():
        with files.replacing(spool) as partial:
            for old in folder.glob("rows-*"):
                old.unlink(missing_ok=True)
            with open(partial, "wb") as handle:
                write(path, handle)
    return spool


def _unpack(path: Path, handle: IO[bytes]) -> None:
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, handle, _AT_A_TIME)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadFile("not gzip, or a part of it", where=path, found=str(error)) from None


def _rows_of_parquet(path: Path, handle: IO[bytes]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NotFound("Parquet needs pyarrow", where=path, hint="pip install 'lowbit[batch]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for part in file.iter_batches(batch_size=1024):
                for row in part.to_pylist():
                    handle.write(shown(row).encode("utf-8", "backslashreplace") + b"\n")
    except (pyarrow.ArrowException, ValueError) as error:
        raise BadFile("not Parquet, or a damaged file", where=path, found=" ".join(str(error).split())[:200]) from None


@contextlib.contextmanager
def _writing(place: Path) -> Any:
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise files.cannot_write(place, error) from error
