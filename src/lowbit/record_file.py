"""Files of many equal pieces behind a header, whole or not there: what a reference says, kept for later.

The file: a magic of 8 bytes, the header's length (uint32), the header (JSON with a "format"), what else comes first,
the pieces in order, and the SHA-256 of all that. Little-endian. Until it is whole it is FILE.partial, to which a run
that was killed goes on adding.

The files may come from strangers: the header's length is checked before it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowbit import files
from lowbit.errors import BadFile, CannotWrite, NotFound

DIGEST = 32
HINT = "Remove it or give another name to have it made anew"
_LENGTH = struct.Struct("<I")
_LARGEST_HEADER = 1 << 16


def start(magic: bytes, values: dict[str, Any]) -> bytes:
    """The bytes of a file up to the header's end; values: with the "format"."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8")
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"a header of {len(text)} bytes")
    return magic + _LENGTH.pack(len(text)) + text


def open_file(path: Path, what: str) -> BinaryIO:
    """Raises NotFound and BadFile."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise NotFound(f"no such {what}", where=path) from None
    except OSError as error:
        raise BadFile("cannot be read", where=path, found=error.strerror) from None


def read_header(handle: BinaryIO, path: Path, magic: bytes, form: str, what: str) -> dict[str, Any]:
    """The header without its "format", which is ``form``. what: the file is, in an error. Raises BadFile."""
    begin = handle.read(len(magic) + _LENGTH.size)
    if len(begin) < len(magic) + _LENGTH.size or not begin.startswith(magic):
        raise BadFile(f"not a {what}", where=path, found=repr(begin[:8]), expected=repr(magic), hint=HINT)
    (length,) = _LENGTH.unpack(begin[len(magic) :])
    if length > _LARGEST_HEADER:
        raise BadFile("its header is too long", where=path, found=f"{length} bytes", hint=HINT)
    try:
        values = json.loads(handle.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile("its header is not JSON", where=path, found=str(error)[:80], hint=HINT) from None
    if not isinstance(values, dict) or values.pop("format", None) != form:
        raise BadFile(f"a {what} of another kind", where=path, expected=form, hint=HINT)
    return values


def check_header(
    values: dict[str, Any],
    path: Path,
    *,
    numbers: Mapping[str, tuple[int, int]],
    token: str,
    kinds: Mapping[str, type],
) -> None:
    """Raises BadFile where a header is not of these values and no others.

    numbers: of each the least, and what it is below; "n_vocab" is one. token: the name of an id of the vocabulary, or
    None there. kinds: of all others.
    """
    for name, (least, limit) in numbers.items():
        _check_range(values, name, least, limit, path)
    if values.get(token) is not None:
        _check_range(values, token, 0, values["n_vocab"], path)
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise _impossible(path, name, values.get(name))
    if set(values) != {*numbers, token, *kinds}:
        raise BadFile("its header has other keys", where=path, found=", ".join(map(str, values))[:200], hint=HINT)


def read_tokens(handle: BinaryIO, path: Path, shape: tuple[int, int], n_vocab: int) -> np.ndarray:
    """The token ids that come next, int32 of that shape. Raises BadFile."""
    tokens = np.frombuffer(handle.read(4 * shape[0] * shape[1]), "<i4").reshape(shape)
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        found = f"{tokens.min()} to {tokens.max()}"
        raise BadFile("impossible token ids", where=path, found=found, hint=HINT)
    return tokens


def _check_range(values: dict[str, Any], name: str, least: int, limit: int, path: Path) -> None:
    """Raises BadFile where a number of the header is none from ``least`` to below ``limit``."""
    value = values.get(name)
    if type(value) is not int or not least <= value < limit:
        raise _impossible(path, name, value)


def _impossible(path: Path, name: str, value: Any) -> BadFile:
    return BadFile(f"its header has an impossible {name}", where=path, found=repr(value)[:60], hint=HINT)


def check_size(handle: BinaryIO, path: Path, expected: int) -> None:
    """Raises BadFile where the file is not of ``expected`` bytes and the digest's."""
    size, expected = os.fstat(handle.fileno()).st_size, expected + DIGEST
    if size != expected:
        raise BadFile("truncated or too long", where=path, found=f"{size} bytes", expected=expected, hint=HINT)


def check_digest(handle: BinaryIO, path: Path, size: int) -> None:
    """Reads all of the file, of ``size`` bytes before its digest. Raises BadFile."""
    if _digest(handle, size) != handle.read(DIGEST):
        raise BadFile("damaged: its checksum is another", where=path, hint=HINT)


def make(
    path: Path,
    beginning: bytes,
    n: int,
    size: int,
    piece: Callable[[int], bytes],
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes ``beginning``, which is ``start`` and what else comes first, and ``n`` pieces of ``size`` bytes each. What
    a run that was killed had done is not done again.

    advance: called with the number of pieces done.
    Raises what ``piece`` does, and CannotWrite, where another process is making the same file too.
    """
    going = path.with_name(path.name + ".partial")
    try:
        files.prepare_place(path)
        with open(going, "a+b") as handle:
            if not files.lock(handle):
                raise CannotWrite("another process is making this file", where=path, hint="Wait for it")
            done = _go_on(handle, beginning, n, size)
            advance(done)
            for i in range(done, n):
                handle.write(piece(i))
                handle.flush()
                advance(i + 1)
            end = handle.seek(0, os.SEEK_END)
            handle.write(_digest(handle, end))
            handle.flush()
            os.fsync(handle.fileno())
            going.replace(path)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def _go_on(handle: BinaryIO, beginning: bytes, n: int, size: int) -> int:
    """Leaves in the partial file what belongs to this one; how many pieces that is."""
    handle.seek(0)
    done = 0
    if handle.read(len(beginning)) == beginning:
        done = min(n, (handle.seek(0, os.SEEK_END) - len(beginning)) // size)
        handle.truncate(len(beginning) + done * size)
    else:
        handle.truncate(0)
        handle.write(beginning)
    handle.seek(0, os.SEEK_END)
    return done


def _digest(handle: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes; leaves the file's position after them."""
    handle.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (piece := handle.read(min(size, 1 << 22))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()
