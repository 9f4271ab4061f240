"""lowbit.lock: the files of one release, their hashes, and the runtimes that they were proved on. TOML, written by
``lowbit check --write-lock`` and by ``lowbit ship``, and meant to be read by people.

    format = "lowbit-lock/1"

    [[artifact]]
    path = "model-q4_0.gguf"      # relative, below the lock's folder
    container = "gguf"
    size = 91726912
    sha256 = "..."

    [[proved]]
    runtime = "llama.cpp"
    version = "xllamacpp 2026.10.11549"
    date = "2026-11-24"
    result = "pass"
    checks = ["tokenizer", "chat-template"]

``base``, ``checkpoint``, ``drafter``, ``projector``, ``tokenizer`` and ``chat_template`` are tables of the same keys,
one each; a folder has ``files`` beside: {name = {size, sha256}}.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import lowbit
from lowbit import files
from lowbit.errors import BadFile, NotFound
from lowbit.release.walk import LOCK_NAME, Hashed

FORMAT = "lowbit-lock/1"
ROLES = ("base", "checkpoint", "artifact", "drafter", "projector", "tokenizer", "chat_template")
SEVERAL = "artifact"  # the one role that several files can have
CONTAINERS = ("gguf", "safetensors", "mlx", "compressed-tensors", "litertlm", "text")
RESULTS = ("pass", "fail")
_MOST_BYTES = 8 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HINT = "`lowbit check DIR --write-lock` writes a new one"


@dataclass(frozen=True, kw_only=True)
class Locked:
    """One file or folder of the release. path: relative to the lock, with slashes. files: those of a folder."""

    role: str
    path: str
    container: str
    size: int
    sha256: str
    files: tuple[Hashed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a runtime has shown: the checks that ran in it, the day, and whether all passed."""

    runtime: str
    version: str
    date: str
    result: str
    checks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock file's content."""

    members: tuple[Locked, ...]
    proved: tuple[Proof, ...] = ()
    created: str = ""
    lowbit: str = ""

    def of(self, role: str) -> tuple[Locked, ...]:
        return tuple(member for member in self.members if member.role == role)


def read(path: Path) -> Lock:
    """The lock in a file. Raises NotFound, or BadFile naming the table and key that are wrong."""
    try:
        with open(path, "rb") as handle:
            data = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=path) from error
    if len(data) > _MOST_BYTES:
        raise BadFile("larger than any lock file", where=path, expected=f"at most {_MOST_BYTES:,} bytes")
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile("not valid TOML", where=path, found=str(error)[:120], hint=_HINT) from error
    return _Reader(path).lock(document)


def write(path: Path, lock: Lock) -> None:
    """Writes the lock, whole or not at all. Raises CannotWrite."""
    text = "".join(f"{line}\n" for line in _lines(lock))
    with files.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def now() -> str:
    """The time of writing, in the form of ``created``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_path(text: object, where: object) -> str:
    """A path below the lock's folder, as it is written. Raises BadFile for one that leads anywhere else."""
    if not isinstance(text, str) or not text or len(text) > 1024:
        raise BadFile("not a path", where=where, found=repr(text)[:60], expected="a relative path in quotes")
    bad = any(not c.isprintable() for c in text) or "\\" in text or re.match(r"[A-Za-z]:", text)
    pure = PurePosixPath(text)
    if bad or pure.is_absolute() or ".." in pure.parts or text.startswith("~"):
        hint = "A lock names files of its own folder only"
        raise BadFile("a path that may leave the folder", where=where, found=repr(text)[:80], hint=hint)
    return pure.as_posix()


class _Reader:
    """Checks every table and key; ``path`` is for errors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self, document: Mapping[str, Any]) -> Lock:
        if document.get("format") != FORMAT:
            found = repr(document.get("format"))[:40]
            raise BadFile("not a lock file", where=self.path, found=f"format {found}", expected=FORMAT, hint=_HINT)
        self._known(document, ("format", "lowbit", "created", "proved", *ROLES), "the file")
        members = [member for role in ROLES for member in self._role(role, document.get(role))]
        paths = [member.path for member in members if member.role == SEVERAL]
        if len(paths) != len(set(paths)):
            raise BadFile("an artifact is named twice", where=self.path, found=sorted(paths))
        proved = document.get("proved", [])
        if not isinstance(proved, list):
            raise self._bad("proved", proved, "[[proved]] tables")
        return Lock(
            members=tuple(members),
            proved=tuple(self._proof(table, f"proved {i}") for i, table in enumerate(proved, 1)),
            created=self._text(document, "created", "the file", default=""),
            lowbit=self._text(document, "lowbit", "the file", default=""),
        )

    def _role(self, role: str, value: Any) -> Iterator[Locked]:
        if value is None:
            return
        if role == SEVERAL:
            if not isinstance(value, list):
                raise self._bad(role, value, f"[[{role}]] tables")
            yield from (self._member(role, table, f"{role} {i}") for i, table in enumerate(value, 1))
        else:
            yield self._member(role, value, role)

    def _member(self, role: str, table: Any, name: str) -> Locked:
        if not isinstance(table, dict):
            raise self._bad(name, table, "a table")
        self._known(table, ("path", "container", "size", "sha256", "files"), name)
        container = self._text(table, "container", name)
        if container not in CONTAINERS:
            raise self._bad(f"{name}.container", container, ", ".join(CONTAINERS))
        parts = table.get("files", {})
        if not isinstance(parts, dict):
            raise self._bad(f"{name}.files", parts, "a table")
        hashed = []
        for part, entry in parts.items():
            where = f"{name}.files.{part[:60]}"
            if not isinstance(entry, dict):
                raise self._bad(where, entry, "a table")
            self._known(entry, ("size", "sha256"), where)
            path = check_path(part, f"{self.path}: {where}")
            hashed.append(Hashed(path=path, size=self._size(entry, where), sha256=self._sha256(entry, where)))
        return Locked(
            role=role,
            path=check_path(table.get("path"), f"{self.path}: {name}.path"),
            container=container,
            size=self._size(table, name),
            sha256=self._sha256(table, name),
            files=tuple(hashed),
        )

    def _proof(self, table: Any, name: str) -> Proof:
        if not isinstance(table, dict):
            raise self._bad(name, table, "a table")
        self._known(table, ("runtime", "version", "date", "result", "checks"), name)
        checks, day = table.get("checks", []), table.get("date")
        if not isinstance(checks, list) or not all(isinstance(c, str) for c in checks):
            raise self._bad(f"{name}.checks", checks, "a list of names")
        if self._text(table, "result", name) not in RESULTS:
            raise self._bad(f"{name}.result", table["result"], " or ".join(RESULTS))
        return Proof(
            runtime=self._text(table, "runtime", name),
            version=self._text(table, "version", name),
            date=day.isoformat() if isinstance(day, date) else self._text(table, "date", name),
            result=table["result"],
            checks=tuple(checks),
        )

    def _text(self, table: Mapping[str, Any], key: str, name: str, default: str | None = None) -> str:
        value = table.get(key, default)
        if isinstance(value, datetime) and key == "created":
            return value.isoformat()
        if not isinstance(value, str) or len(value) > 256:
            raise self._bad(f"{name}.{key}", value, "a text")
        return value

    def _size(self, table: Mapping[str, Any], name: str) -> int:
        value = table.get("size")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 60:
            raise self._bad(f"{name}.size", value, "a number of bytes")
        return value

    def _sha256(self, table: Mapping[str, Any], name: str) -> str:
        value = table.get("sha256")
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self._bad(f"{name}.sha256", value, "64 hexadecimal digits in lower case")
        return value

    def _known(self, table: Mapping[str, Any], keys: tuple[str, ...], name: str) -> None:
        unknown = sorted(set(table) - set(keys))
        if unknown:
            raise self._bad(f"{name}: {unknown[0][:60]}", "an unknown key", ", ".join(keys))

    def _bad(self, name: str, found: Any, expected: str) -> BadFile:
        # repr of hostile nesting is deep; a few characters tell enough.
        said = found if isinstance(found, str) else type(found).__name__ if isinstance(found, list | dict) else found
        return BadFile(
            "not the structure of a lock file",
            where=f"{self.path}: {name}", found=repr(said)[:60], expected=expected, hint=_HINT,
        )  # fmt: skip


def _lines(lock: Lock) -> Iterator[str]:
    yield f"# {LOCK_NAME}: the files of one release, and what they were proved on. `lowbit check` compares the files"
    yield "# with it; `lowbit check DIR --write-lock` writes it anew."
    yield f'format = "{FORMAT}"'
    yield f"lowbit = {_quoted(lock.lowbit or lowbit.__version__)}"
    yield f"created = {_quoted(lock.created or now())}"
    for member in lock.members:
        yield ""
        yield f"[[{member.role}]]" if member.role == SEVERAL else f"[{member.role}]"
        yield f"path = {_quoted(member.path)}"
        yield f"container = {_quoted(member.container)}"
        yield f"size = {member.size}"
        yield f"sha256 = {_quoted(member.sha256)}"
        for part in member.files:
            yield f"files.{_quoted(part.path)} = {{ size = {part.size}, sha256 = {_quoted(part.sha256)} }}"
    for proof in lock.proved:
        yield ""
        yield "[[proved]]"
        for key in ("runtime", "version", "date", "result"):
            yield f"{key} = {_quoted(getattr(proof, key))}"
        yield f"checks = [{', '.join(map(_quoted, proof.checks))}]"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escapes = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else _escaped(c)) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xD800 <= code < 0xE000:  # a byte that is no UTF-8 in a file's name: no TOML can hold it
        raise BadFile("a file's name is not UTF-8", found=ascii(character), hint="Rename the file")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
