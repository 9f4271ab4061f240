"""Which files of a folder count, and their hashes. Symbolic links may not lead out of the release.

A folder's hash is that of the text that ``sha256sum`` prints of its files in the order of their names: one line each,
hash, two spaces, name. Its files are those directly in it: what lies deeper no runtime reads, and a GGUF beside a model
is a member of its own. Nor do these count: names that begin with a dot, documentation and pictures, certificates,
reports, lock files, and what a program is still writing.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit import files
from lowbit.errors import BadFile

LOCK_NAME = "lowbit.lock"
_NOT_COUNTED_NAMES = ("readme", "license", "notice", "copying", "changelog")
_NOT_COUNTED_SUFFIXES = (".md", ".html", ".png", ".jpg", ".jpeg", ".svg", ".partial", ".lock")
_NOT_COUNTED_ENDINGS = ("certificate.json",)
_ARTIFACTS = (".gguf", ".litertlm")
_OF_CHECKPOINT = "metadata.gguf"  # the key-values of a GGUF that lowbit trained on, without tensors
_MOST_FILES = 20_000
_DEEPEST = 12


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """One file as it is: path relative to what was hashed, bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


def is_counted(name: str) -> bool:
    """Whether a file of this name is part of a folder that ships."""
    low = name.lower()
    if low.startswith((".", *_NOT_COUNTED_NAMES)) or low.endswith(_NOT_COUNTED_ENDINGS):
        return False
    if low.endswith(_ARTIFACTS) and low != _OF_CHECKPOINT:
        return False
    return not low.endswith(_NOT_COUNTED_SUFFIXES)


def every_file(root: Path) -> Iterator[Path]:
    """Every file and symbolic link below ``root``, in the order of the names; no link to a folder is followed and
    nothing in a folder whose name begins with a dot is looked at. Raises BadFile where there are absurdly many."""
    count = 0
    for folder, names, leaves in os.walk(root, followlinks=False):
        here = Path(folder)
        links = [name for name in names if (here / name).is_symlink()]
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in links and n != "__pycache__")
        if len(here.relative_to(root).parts) >= _DEEPEST:
            raise BadFile("folders lie too deep in each other for a release", where=here)
        for name in sorted([*leaves, *links]):
            count += 1
            if count > _MOST_FILES:
                raise BadFile("more files than a release has", where=root, expected=f"at most {_MOST_FILES:,}")
            yield here / name


def home_of(root: Path) -> Path:
    """What links may lead to: the release's folder; in huggingface_hub's cache the model's, whose files are links."""
    real = root.resolve()
    in_cache = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent if in_cache else real


def leaves(root: Path, path: Path) -> bool:
    """Whether ``path``, all links followed, lies outside of the release ``root``."""
    return not path.resolve().is_relative_to(home_of(root))


def counted_files(path: Path) -> list[Path]:
    """The files that count: ``path`` itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    return sorted((p for p in path.iterdir() if is_counted(p.name) and p.is_file()), key=lambda p: p.name)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, once for each state of it that this process sees."""
    found = path.stat()
    return _hash(str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hash(path: str, *_: int) -> str:
    return files.sha256(path)


def hash_member(path: Path) -> tuple[Hashed, tuple[Hashed, ...]]:
    """A file's or a folder's hash, and of a folder those of its files. Raises OSError."""
    if not path.is_dir():
        return Hashed(path=path.name, size=path.stat().st_size, sha256=hash_file(path)), ()
    parts = tuple(
        Hashed(path=file.name, size=file.stat().st_size, sha256=hash_file(file)) for file in counted_files(path)
    )
    return Hashed(path=path.name, size=sum(part.size for part in parts), sha256=joined(parts)), parts


def joined(parts: tuple[Hashed, ...]) -> str:
    """The hash of a folder of these files."""
    listing = "".join(f"{part.sha256}  {part.path}\n" for part in parts)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
