"""The reference, run once over a text and kept in a file: ``lowbit measure --reference-cache FILE``.

The file: MAGIC, the header's length (uint32), the header (JSON), the chunks' token ids (int32), of every scored
position a record (``sketch``), in order, and the SHA-256 of all that. Little-endian. At most 300 bytes a scored
position, whatever the vocabulary, but for the header. Until it is whole it is FILE.partial, to which a run that was
killed goes on adding.

The files may come from strangers: sizes are checked against the file's own before anything is allocated, and what the
records say before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowbit import files
from lowbit.errors import BadFile, CannotWrite, NotFound
from lowbit.measure import sketch
from lowbit.run.base import Runtime
from lowbit.threads import in_shares

MAGIC = b"LOWBITRC"
FORMAT = "lowbit-reference-cache/1"
_LENGTH = struct.Struct("<I")
_DIGEST = 32
_LARGEST_HEADER = 1 << 16
_HINT = "Remove it or give another name to have it made anew"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a cache is of.

    reference: what opening.described() says of it
    settings:  what else its logits depend on, names and values
    text:      {"name", "sha256"} of the text it was made with
    bos:       id that every chunk begins with, None where the model has none
    seed:      of the draws
    """

    reference: dict[str, Any]
    settings: dict[str, Any]
    text: dict[str, Any]
    n_vocab: int
    bos: int | None
    chunk: int
    chunks: int
    seed: int = 0

    def as_bytes(self) -> bytes:
        values = {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        return json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8")

    @property
    def first(self) -> int:
        """The first position of a chunk that is scored."""
        return self.chunk // 2

    @property
    def scored(self) -> int:
        """Scored positions of a chunk."""
        return self.chunk - 1 - self.first

    @classmethod
    def read(cls, handle: BinaryIO, path: Path) -> Header:
        """Raises BadFile."""
        start = handle.read(len(MAGIC) + _LENGTH.size)
        if len(start) < len(MAGIC) + _LENGTH.size or not start.startswith(MAGIC):
            raise BadFile("not a reference cache", where=path, found=repr(start[:8]), expected=repr(MAGIC), hint=_HINT)
        (length,) = _LENGTH.unpack(start[len(MAGIC) :])
        if length > _LARGEST_HEADER:
            raise BadFile("its header is too long", where=path, found=f"{length} bytes", hint=_HINT)
        try:
            values = json.loads(handle.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadFile("its header is not JSON", where=path, found=str(error)[:80], hint=_HINT) from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise BadFile("a reference cache of another kind", where=path, expected=FORMAT, hint=_HINT)
        return cls._checked(values, path)

    @classmethod
    def _checked(cls, values: dict[str, Any], path: Path) -> Header:
        ranges = {"n_vocab": (2, 1 << 26), "chunk": (4, 1 << 24), "chunks": (1, 1 << 31), "seed": (0, 1 << 63)}
        for name, (least, limit) in ranges.items():
            if type(values.get(name)) is not int or not least <= values[name] < limit:
                raise _impossible(path, name, values.get(name))
        bos = values.get("bos")
        if bos is not None and (type(bos) is not int or not 0 <= bos < values["n_vocab"]):
            raise _impossible(path, "bos", bos)
        for name in ("reference", "settings", "text"):
            if not isinstance(values.get(name), dict):
                raise _impossible(path, name, values.get(name))
        if set(values) != set(cls.__dataclass_fields__):
            raise BadFile("its header has other keys", where=path, found=", ".join(map(str, values))[:200], hint=_HINT)
        return cls(**values)


def _impossible(path: Path, name: str, value: Any) -> BadFile:
    return BadFile(f"its header has an impossible {name}", where=path, found=repr(value)[:60], hint=_HINT)


class ReferenceCache:
    """A whole cache, opened to be compared with: a context manager.

    header; layout of the records; tokens: int32 (chunks, chunk).
    Raises NotFound where there is none, and BadFile for a file that is damaged or lies about itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._handle = open(self.path, "rb")  # noqa: SIM115 - closed in close()
        except FileNotFoundError:
            raise NotFound("no such reference cache", where=self.path) from None
        except OSError as error:
            raise BadFile("cannot be read", where=self.path, found=error.strerror) from None
        try:
            self.header = Header.read(self._handle, self.path)
            self.layout = sketch.Layout.of(self.header.n_vocab)
            self._begin = self._handle.tell() + 4 * self.header.chunk * self.header.chunks
            size, expected = os.fstat(self._handle.fileno()).st_size, self._begin + self._rows_bytes() + _DIGEST
            if size != expected:
                raise self._bad("truncated or too long", f"{size} bytes", f"{expected}")
            self.tokens = np.frombuffer(self._handle.read(self._begin - self._handle.tell()), "<i4").reshape(
                self.header.chunks, self.header.chunk
            )
            if self.tokens.min() < 0 or self.tokens.max() >= self.header.n_vocab:
                raise self._bad("impossible token ids", f"{self.tokens.min()} to {self.tokens.max()}")
            if _digest(self._handle, expected - _DIGEST) != self._handle.read(_DIGEST):
                raise self._bad("damaged: its checksum is another", None)
        except BaseException:
            self.close()
            raise

    def _rows_bytes(self) -> int:
        return self.header.chunks * self.header.scored * self.layout.dtype.itemsize

    def _bad(self, what: str, found: object, expected: object = None) -> BadFile:
        return BadFile(what, where=self.path, found=found, expected=expected, hint=_HINT)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._handle.close()

    def records(self, chunk: int) -> np.ndarray:
        """Of one chunk's scored positions, (scored,) of ``layout.dtype``."""
        size = self.header.scored * self.layout.dtype.itemsize
        self._handle.seek(self._begin + chunk * size)
        records = np.frombuffer(self._handle.read(size), self.layout.dtype)
        if len(records) != self.header.scored:
            raise self._bad("truncated", f"{len(records)} records", self.header.scored)
        if wrong := sketch.wrong(self.layout, records):
            raise self._bad("a record cannot be", f"{wrong} of chunk {chunk}")
        return records

    @property
    def bytes_a_token(self) -> float:
        """Of the file, for every scored position."""
        return self.path.stat().st_size / (self.header.chunks * self.header.scored)


def make(
    path: str | os.PathLike[str],
    header: Header,
    reference: Runtime,
    chunks: np.ndarray,
    *,
    threads: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs the reference over the chunks and writes the cache; what a run that was killed had done is not done again.

    chunks: int32 (header.chunks, header.chunk). advance: called with the number of chunks done.
    Raises RuntimeFailed, and CannotWrite, where another process is making the same file too.
    """
    path = Path(path)
    going = path.with_name(path.name + ".partial")
    try:
        files.prepare_place(path)
        with open(going, "a+b") as handle:
            if not files.lock(handle):
                raise CannotWrite("another process is making this file", where=path, hint="Wait for it")
            done = _go_on(handle, header, chunks)
            advance(done)
            for c in range(done, header.chunks):
                handle.write(_records_of(reference, chunks[c], c, header, threads).tobytes())
                handle.flush()
                advance(c + 1)
            size = handle.seek(0, os.SEEK_END)
            handle.write(_digest(handle, size))
            handle.flush()
            os.fsync(handle.fileno())
            going.replace(path)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def _go_on(handle: BinaryIO, header: Header, chunks: np.ndarray) -> int:
    """Leaves in the partial file what belongs to this cache; how many chunks that is."""
    text = header.as_bytes()
    start = MAGIC + _LENGTH.pack(len(text)) + text + chunks.astype("<i4").tobytes()
    handle.seek(0)
    size = header.scored * sketch.Layout.of(header.n_vocab).dtype.itemsize
    done = 0
    if handle.read(len(start)) == start:
        done = min(header.chunks, (handle.seek(0, os.SEEK_END) - len(start)) // size)
        handle.truncate(len(start) + done * size)
    else:
        handle.truncate(0)
        handle.write(start)
    handle.seek(0, os.SEEK_END)
    return done


def _records_of(reference: Runtime, tokens: np.ndarray, c: int, header: Header, threads: int) -> np.ndarray:
    layout = sketch.Layout.of(header.n_vocab)
    records = np.zeros(header.scored, layout.dtype)
    uniform = np.random.default_rng((header.seed, c)).random(header.scored)

    for offset, rows in reference.logits(tokens, header.first):
        at = offset - header.first

        def some(begin: int, end: int, rows: np.ndarray = rows, at: int = at) -> None:
            scratch = np.empty(header.n_vocab, np.float32)
            for i in range(at + begin, at + end):
                following = int(tokens[header.first + i + 1])
                sketch.keep(layout, rows[i - at], following, uniform[i], records[i : i + 1], scratch)

        in_shares(min(len(rows), header.scored - at), threads, some)
    return records


def _digest(handle: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes; leaves the file's position after them."""
    handle.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (piece := handle.read(min(size, 1 << 22))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()
