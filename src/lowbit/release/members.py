"""What each file of a folder is: base, QAT checkpoint, artifact, drafter, projector, tokenizer, chat template.

A GGUF says it in its key-values, a folder in its config.json; names decide only between files of one kind ("qat",
"base", "draft") and where a file cannot be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint.gguf_file import read_fields
from lowbit.errors import BadFile, BadOption, LowbitError, NotFound
from lowbit.release.walk import every_file, leaves

_HINT = "Write which is which into a lowbit.lock by hand, or give each release a folder of its own"
_BASE, _CHECKPOINT, _DRAFTER = (
    re.compile(p) for p in (r"\bbase\b|reference", r"qat|checkpoint", r"draft|assistant|mtp")
)
_NO_MODEL = ("imatrix", "adapter")  # general.type of GGUFs that are no model
_PLAIN = "safetensors"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file or folder of a release.

    role: one of lock.ROLES. name: its path relative to the release, with slashes. container: one of lock.CONTAINERS.
    """

    role: str
    path: Path
    name: str
    container: str

    @property
    def is_folder(self) -> bool:
        return self.container in ("safetensors", "mlx", "compressed-tensors")

    def __str__(self) -> str:
        return self.name


def find(root: Path) -> tuple[Member, ...]:
    """The members of a folder without a lock. Raises NotFound where there is no model, BadOption where two files could
    be the same one."""
    run = _run_record(root)
    paths = [p for p in every_file(root) if p.is_file() and not leaves(root, p) and not _is_work(root, p, run)]
    folders = [path.parent for path in paths if path.name == "config.json"]
    members = [_member(root, path, *_folder_kind(path)) for path in folders]
    for path in paths:
        if any(path.is_relative_to(folder) for folder in folders if folder != root):
            continue
        if path.suffix == ".gguf" and not _is_comparison(path, run):
            if (kind := _gguf_kind(path, run)) is not None:
                members.append(_member(root, path, kind, "gguf"))
        elif path.suffix == ".litertlm":
            members.append(_member(root, path, "artifact", "litertlm"))
    if not members:
        hint = "A release is a folder with a GGUF, an MLX or a Hugging Face folder"
        raise NotFound("no model in this folder", where=root, hint=hint)
    members = _settle(members)
    return (*members, *_texts(root, members))


def container_of(path: Path) -> str:
    """The container of a file or folder that a lock names."""
    if path.is_dir():
        return _folder_kind(path)[1]
    return {".gguf": "gguf", ".litertlm": "litertlm"}.get(path.suffix, "text")


def _member(root: Path, path: Path, role: str, container: str) -> Member:
    return Member(role=role, path=path, name=path.relative_to(root).as_posix(), container=container)


def _folder_kind(folder: Path) -> tuple[str, str]:
    """Role and container of a model folder; the role 'plain' is settled with the others."""
    config = read_loosely(folder / "config.json")
    container = _PLAIN
    quantization = config.get("quantization_config")
    if isinstance(config.get("quantization"), dict) or _is_mlx(folder):
        container = "mlx"
    elif isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors":
        container = "compressed-tensors"
    name = folder.name.lower()
    if "assistant" in str(config.get("model_type")) or _DRAFTER.search(name):
        return "drafter", container
    if container != _PLAIN:
        return "artifact", container
    if _CHECKPOINT.search(name):
        return "checkpoint", container
    return ("base" if _BASE.search(name) else "plain"), container


def _is_mlx(folder: Path) -> bool:
    """Whether the folder's first safetensors file says that MLX wrote it."""
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with open(path, "rb") as handle:
            n = int.from_bytes(handle.read(8), "little")
            head = handle.read(min(n, 4096))
        return bool(re.search(rb'"format"\s*:\s*"mlx"', head)) or (
            n > len(head) and bool(re.search(rb'"format"\s*:\s*"mlx"', _tail(path, n)))
        )
    return False


def _tail(path: Path, n: int) -> bytes:
    """The end of a header of ``n`` bytes, where mlx writes its metadata."""
    with open(path, "rb") as handle:
        handle.seek(max(8, min(n + 8, path.stat().st_size) - 4096))
        return handle.read(4096)


def _gguf_kind(path: Path, run: bool) -> str | None:
    """A GGUF's role, by its key-values; of one that cannot be read by its name. None for what is no model."""
    name = path.name.lower()
    try:
        values = {field.key: field.value for field in read_fields(path)}
    except (LowbitError, OSError):
        return "projector" if "mmproj" in name else "drafter" if _DRAFTER.search(name) else "artifact"
    architecture = str(values.get("general.architecture"))
    if values.get("general.type") in _NO_MODEL:
        return None
    if architecture == "clip" or values.get("general.type") == "mmproj":
        return "projector"
    if architecture.endswith("-assistant") or _DRAFTER.search(name):
        return "drafter"
    return "base" if (run and name == "reference.gguf") or _BASE.search(name) else "artifact"


def _run_record(root: Path) -> bool:
    """Whether the folder is one that ``lowbit ship`` made."""
    return str(read_loosely(root / "lowbit.json").get("format")).startswith("lowbit-run/")


def _is_comparison(path: Path, run: bool) -> bool:
    """Whether a run folder has this file to be compared with, not to be shipped."""
    return run and path.name.startswith(("naive-", "calibrated-"))


def _is_work(root: Path, path: Path, run: bool) -> bool:
    """Whether a run folder keeps this for itself."""
    return run and path.relative_to(root).parts[0] == "work"


def _settle(members: list[Member]) -> list[Member]:
    """Gives plain folders their roles, and refuses two members of one role."""
    settled: list[Member] = []
    taken = {member.role for member in members}
    for member in members:
        role = member.role
        if role == "plain":
            role = next((r for r in ("base", "checkpoint") if r not in taken), "base")
            taken.add(role)
        settled.append(Member(role=role, path=member.path, name=member.name, container=member.container))
    for role in ("base", "checkpoint", "drafter", "projector"):
        named = [member.name for member in settled if member.role == role]
        if len(named) > 1:
            raise BadOption(f"two files could be the {role}", found=", ".join(sorted(named)), hint=_HINT)
    order = {"base": 0, "checkpoint": 1, "artifact": 2, "drafter": 3, "projector": 4}
    return sorted(settled, key=lambda member: (order[member.role], member.name))


def _texts(root: Path, members: list[Member]) -> Iterator[Member]:
    """The tokenizer and the chat template that the others are compared with: the folder's own, else the first
    member's that has one."""
    folders = [root, *(m.path for m in members if m.is_folder and m.role != "drafter")]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            yield _member(root, folder / "tokenizer.json", "tokenizer", "text")
            break
    for folder in folders:
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            path = folder / name
            if path.is_file() and (name.endswith(".jinja") or read_loosely(path).get("chat_template")):
                yield _member(root, path, "chat_template", "text")
                return


def read_loosely(path: Path, most: int = 64 << 20) -> dict[str, Any]:
    """A JSON object, {} where there is none to read: for telling what a file is, not for using what it says."""
    try:
        if path.stat().st_size > most:
            return {}
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def refuse_parts(members: tuple[Member, ...]) -> None:
    """Raises BadFile for a GGUF in several files, which no check reads."""
    for member in members:
        if re.search(r"-\d{5}-of-\d{5}\.gguf$", member.name):
            hint = "Join the parts with llama-gguf-split --merge"
            raise BadFile("a GGUF split into several files", where=member.path, hint=hint)
