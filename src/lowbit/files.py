"""Writing without leaving halves, and hashing what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lowbit.errors import CannotWrite
from lowbit.units import MIB

try:
    import fcntl
except ImportError:  # Windows: there, two processes at once are not noticed
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; renames it over ``path`` when the block ends without an error.

    On any error the partial file is removed, and an OSError becomes a CannotWrite that names the final path.
    """
    final = Path(path)
    partial = final.parent / f"{final.name}.{os.getpid()}.partial"
    try:
        prepare_place(final)
        yield partial
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(final)
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def prepare_place(final: Path) -> None:
    """Makes the folder of a file to come. Raises OSError where no file of that name can be."""
    if not final.name or final.is_dir():  # now, not when everything is written and wants the name
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    final.parent.mkdir(parents=True, exist_ok=True)


def lock(handle: IO[Any]) -> bool:
    """Locks an open file until it is closed or the process ends; False where another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def check_replaceable(final: Path, marker: str) -> None:
    """Raises OSError or CannotWrite where no folder can take this name.

    One that is there already is replaced where it is empty or has a file called ``marker``, as one of ours has; what
    else is in somebody's folder is not to be removed.
    """
    if not final.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if final.exists() and not final.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if final.is_dir() and any(final.iterdir()) and not (final / marker).is_file():
        raise CannotWrite(
            "a folder with other files has this name", where=final, hint="Choose another name, or remove it"
        )


def replace_folder(whole: Path, final: Path) -> None:
    """Gives a folder of files its name, and removes one that has it already. Raises OSError."""
    replaced = final.parent / f"{final.name}.{os.getpid()}.old"
    for file in whole.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        final.replace(replaced)
    try:
        whole.replace(final)
    except OSError:
        if replaced.exists():
            replaced.replace(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


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


_ONE_POSITION = threading.Lock()  # where files cannot be read at an offset, as on Windows


def read_at(handle: BinaryIO, out: memoryview, at: int) -> int:
    """Fills ``out`` from offset ``at`` of an unbuffered file; the bytes read, fewer at its end. For any thread."""
    done = 0
    while done < len(out):
        if hasattr(os, "preadv"):
            got = os.preadv(handle.fileno(), [out[done:]], at + done)
        else:
            with _ONE_POSITION:
                handle.seek(at + done)
                got = handle.readinto(out[done:])  # type: ignore[attr-defined]
        if not got:
            break
        done += got
    return done


def write_at(handle: BinaryIO, data: memoryview, at: int) -> None:
    """Writes all of ``data`` at offset ``at`` of an unbuffered file. For any thread."""
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(handle.fileno(), data[done:], at + done)
        else:
            with _ONE_POSITION:
                handle.seek(at + done)
                done += handle.write(data[done:])


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(4 * MIB):
            digest.update(chunk)
    return digest.hexdigest()


def folder_sha256(path: str | os.PathLike[str]) -> str:
    """One hash of a model's folder, as hex: of the lines that ``sha256sum *`` prints in it, sorted by name. What is in
    folders below, or begins with a dot, does not count."""
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in _folder_files(path))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """The bytes of the files that ``folder_sha256`` reads."""
    return sum(file.stat().st_size for file in _folder_files(path))


def _folder_files(path: str | os.PathLike[str]) -> list[Path]:
    found = [file for file in Path(path).iterdir() if file.is_file() and not file.name.startswith(".")]
    return sorted(found, key=lambda file: os.fsencode(file.name))
