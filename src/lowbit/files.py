"""Writing without leaving halves, and hashing what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import CannotWrite
from lowbit.units import MIB


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; renames it over ``path`` when the block ends without an error.

    On any error the partial file is removed, and an OSError becomes a CannotWrite that names the final path.
    """
    final = Path(path)
    partial = final.parent / f"{final.name}.{os.getpid()}.partial"
    try:
        if not final.name or final.is_dir():  # now, not when everything is written and wants the name
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(final)
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], *, marker: str) -> Iterator[Path]:
    """``replacing`` for a folder of files: gives an empty folder beside ``path``, which takes its name when whole.

    A folder that is there already is replaced where it is empty or has a file called ``marker``, as one of ours has;
    what else is in somebody's folder is not to be removed. Errors as with ``replacing``.
    """
    final = Path(path)
    partial = final.parent / f"{final.name}.{os.getpid()}.partial"
    replaced = final.parent / f"{final.name}.{os.getpid()}.old"
    try:
        if not final.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if final.exists() and not final.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if final.is_dir() and any(final.iterdir()) and not (final / marker).is_file():
            raise CannotWrite(
                "a folder with other files has this name", where=final, hint="Choose another name, or remove it"
            )
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            final.replace(replaced)
        try:
            partial.replace(final)
        except OSError:
            if replaced.exists():
                replaced.replace(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises CannotWrite where ``path`` plainly cannot be written, before long work whose result goes there."""
    final = Path(path)
    there = next(folder for folder in (final.parent, *final.parent.parents) if folder.exists())
    number = None
    if not final.name or final.is_dir():
        number = errno.EISDIR
    elif not there.is_dir():
        number = errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number is not None:
        raise cannot_write(final, OSError(number, os.strerror(number)))


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The one-line form of a failed write."""
    hints = {
        errno.ENOSPC: "Free some disk space or choose another place with --out",
        errno.EDQUOT: "Free some disk space or choose another place with --out",
        errno.EACCES: "Choose a place you may write to",
        errno.EPERM: "Choose a place you may write to",
        errno.EROFS: "Choose a place you may write to",
        errno.ENOENT: "Choose a place you may write to",  # its folder could not be made: /proc and the like
        errno.ENOTDIR: "A part of the path is a file",
        errno.EEXIST: "A part of the path is a file",
        errno.EISDIR: "A folder has this name; choose another",
        errno.EFBIG: "Raise the limit on file sizes (ulimit -f) or choose another place",
    }
    reason = error.strerror or str(error)
    # numpy tells of a short write ("100 requested and 50 written") and keeps the system's reason to itself.
    hint = hints.get(error.errno) if error.errno else "Is the disk full? Free some space or choose another place"
    return CannotWrite(f"cannot write: {reason}", where=path, hint=hint)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented UTF-8 JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(4 * MIB):
            digest.update(chunk)
    return digest.hexdigest()
