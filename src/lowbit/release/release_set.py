"""One release opened: its members, its lock if it has one, and what checks read of them, each file once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.gguf_file import read_fields
from lowbit.errors import BadFile, BadOption, LowbitError, NotFound
from lowbit.release import lock as locks
from lowbit.release import members as scan
from lowbit.release.lock import Lock
from lowbit.release.members import Member
from lowbit.release.walk import LOCK_NAME, leaves

TEXT_MODELS = ("base", "checkpoint", "artifact")


class ReleaseSet:
    """Members by role, and their contents.

    root: the folder. lock, lock_path: of lowbit.lock, None where there is none. missing: what the lock names and the
    folder does not have.
    """

    def __init__(self, root: Path, members: tuple[Member, ...], lock: Lock | None, lock_path: Path | None) -> None:
        self.root, self.lock, self.lock_path = root, lock, lock_path
        self.members = tuple(member for member in members if member.path.exists())
        self.missing = tuple(member for member in members if not member.path.exists())

    def of(self, *roles: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role in roles)

    def one(self, role: str) -> Member | None:
        return next(iter(self.of(role)), None)

    @property
    def reference(self) -> Member | None:
        """What the others are compared with: the QAT checkpoint, else the base, else the first artifact."""
        return self.one("checkpoint") or self.one("base") or self.one("artifact")

    @property
    def text_models(self) -> tuple[Member, ...]:
        """Base, checkpoint and artifacts that lowbit can read, the reference first."""
        readable = [m for m in self.of(*TEXT_MODELS) if m.container != "litertlm"]
        return tuple(sorted(readable, key=lambda m: m != self.reference))

    def ggufs(self, *roles: str) -> tuple[Member, ...]:
        return tuple(member for member in self.of(*(roles or TEXT_MODELS)) if member.container == "gguf")

    @property
    def tokenizer_folder(self) -> Path | None:
        """The Hugging Face folder whose tokenizer the others are compared with."""
        member = self.one("tokenizer")
        return None if member is None else member.path if member.path.is_dir() else member.path.parent

    def values(self, member: Member) -> Mapping[str, Any]:
        """A GGUF's key-values. Raises BadFile."""
        try:
            return _values(member.path, *_state(member.path))
        except OSError as error:
            raise NotFound(f"cannot read: {error.strerror or error}", where=member.path) from error

    def config(self, member: Member) -> Mapping[str, Any]:
        """A folder's config.json; {} where it is none."""
        return scan.read_loosely(member.path / "config.json")

    def checkpoint(self, member: Member) -> contextlib.AbstractContextManager[Checkpoint]:
        """The member as named tensors. Raises what ``open_checkpoint`` raises."""
        return open_checkpoint(member.path)


@functools.lru_cache(maxsize=16)
def _values(path: Path, *_: int) -> Mapping[str, Any]:
    return {field.key: field.value for field in read_fields(path)}


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_release(path: str | Path) -> ReleaseSet:
    """The release in a folder, or the one that a lock file names.

    A folder's lowbit.lock is read where it has one, else the members are told by what they are. Raises NotFound,
    BadFile (a broken lock, or one that names files outside of its folder), BadOption.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFound("no such folder or lock file", where=path, expected=f"a folder, or a {LOCK_NAME}")
    if path.is_file():
        if path.suffix != ".lock" and path.suffix != ".toml":
            hint = f"Give its folder: lowbit check {path.parent}"
            raise BadOption("not a folder and not a lock file", where=path, hint=hint)
        return _locked(path.parent, path)
    beside = path / LOCK_NAME
    if beside.is_symlink() and leaves(path, beside):
        raise BadFile("the lock is a link that leads out of the folder", where=beside)
    return _locked(path, beside) if beside.is_file() else scan_release(path)


def scan_release(root: Path) -> ReleaseSet:
    """The release in a folder by what its files are, whatever a lock says."""
    members = scan.find(root)
    scan.refuse_parts(members)
    return ReleaseSet(root, members, None, None)


def _locked(root: Path, path: Path) -> ReleaseSet:
    lock = locks.read(path)
    members = []
    for locked in lock.members:
        there = root / locked.path
        for part in (there, *(there / name.path for name in locked.files)):
            if leaves(root, part):
                hint = "A lock names files of its own folder only"
                raise BadFile("a link that leads out of the folder", where=f"{path}: {locked.path}", hint=hint)
        container = locked.container
        if there.exists() and _is_folder(container) != there.is_dir():
            expected = "a folder" if _is_folder(container) else "a file"
            raise BadFile("not what the lock says it is", where=f"{path}: {locked.path}", expected=expected)
        members.append(Member(role=locked.role, path=there, name=locked.path, container=container))
    if not members:
        raise BadFile("the lock names no file", where=path, hint="`lowbit check DIR --write-lock` writes a new one")
    scan.refuse_parts(tuple(members))
    return ReleaseSet(root, tuple(members), lock, path)


def _is_folder(container: str) -> bool:
    return container in ("safetensors", "mlx", "compressed-tensors")


def readable(release: ReleaseSet, member: Member) -> LowbitError | None:
    """Why a text model cannot be opened as a checkpoint; None where it can."""
    try:
        with release.checkpoint(member):
            return None
    except LowbitError as error:
        return error
