"""The reference, run once over a text and kept in a file: ``lowbit measure --reference-cache FILE``.

The file: MAGIC, the header's length (uint32), the header (JSON), the chunks' token ids (int32), of every scored
position a record (``lowbit.compact``), in order, and the SHA-256 of all that. Little-endian. At most 300 bytes a scored
position, whatever the vocabulary, but for the header. Until it is whole it is FILE.partial, to which a run that was
killed goes on adding.

The files may come from strangers: sizes are checked against the file's own before anything is allocated, and what the
records say before it is believed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowbit import compact, record_file
from lowbit.errors import BadFile
from lowbit.record_file import HINT
from lowbit.run.base import Runtime
from lowbit.threads import in_shares

MAGIC = b"LOWBITRC"
FORMAT = "lowbit-reference-cache/1"
_WHAT = "reference cache"


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

    def start(self) -> bytes:
        """The file's bytes up to the header's end."""
        return record_file.start(MAGIC, {"format": FORMAT, **asdict(self)})

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
        values = record_file.read_header(handle, path, MAGIC, FORMAT, _WHAT)
        numbers = {"n_vocab": (2, 1 << 26), "chunk": (4, 1 << 24), "chunks": (1, 1 << 31), "seed": (0, 1 << 63)}
        kinds = dict.fromkeys(("reference", "settings", "text"), dict)
        record_file.check_header(values, path, numbers=numbers, token="bos", kinds=kinds)
        return cls(**values)


class ReferenceCache:
    """A whole cache, opened to be compared with: a context manager.

    header; layout of the records; tokens: int32 (chunks, chunk).
    Raises NotFound where there is none, and BadFile for a file that is damaged or lies about itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._handle = record_file.open_file(self.path, _WHAT)
        try:
            self.header = Header.read(self._handle, self.path)
            self.layout = compact.Layout.of(self.header.n_vocab)
            self._begin = self._handle.tell() + 4 * self.header.chunk * self.header.chunks
            end = self._begin + self._rows_bytes()
            record_file.check_size(self._handle, self.path, end)
            shape = self.header.chunks, self.header.chunk
            self.tokens = record_file.read_tokens(self._handle, self.path, shape, self.header.n_vocab)
            record_file.check_digest(self._handle, self.path, end)
        except BaseException:
            self.close()
            raise

    def _rows_bytes(self) -> int:
        return self.header.chunks * self.header.scored * self.layout.dtype.itemsize

    def _bad(self, what: str, found: object, expected: object = None) -> BadFile:
        return BadFile(what, where=self.path, found=found, expected=expected, hint=HINT)

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
        if wrong := compact.wrong(self.layout, records):
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
    size = header.scored * compact.Layout.of(header.n_vocab).dtype.itemsize
    record_file.make(
        Path(path), header.start() + chunks.astype("<i4").tobytes(), header.chunks, size,
        lambda c: _records_of(reference, chunks[c], c, header, threads).tobytes(), advance,
    )  # fmt: skip


def _records_of(reference: Runtime, tokens: np.ndarray, c: int, header: Header, threads: int) -> np.ndarray:
    layout = compact.Layout.of(header.n_vocab)
    records = np.zeros(header.scored, layout.dtype)
    uniform = np.random.default_rng((header.seed, c)).random(header.scored)

    for offset, rows in reference.logits(tokens, header.first):
        at = offset - header.first

        def some(begin: int, end: int, rows: np.ndarray = rows, at: int = at) -> None:
            scratch = np.empty(header.n_vocab, np.float32)
            for i in range(at + begin, at + end):
                following = int(tokens[header.first + i + 1])
                compact.keep(layout, rows[i - at], following, uniform[i], records[i : i + 1], scratch)

        in_shares(min(len(rows), header.scored - at), threads, some)
    return records
