"""Is there anything that runs a stranger's code, or leads out of the folder?"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.release import pickles, remote_code, templates
from lowbit.release.checks.base import Check, Findings, printable
from lowbit.release.conversations import CONVERSATIONS
from lowbit.release.release_set import ReleaseSet
from lowbit.release.walk import every_file, leaves

_JOBS = [
    {"messages": c.with_objects(), "tools": c.tools, "add_generation_prompt": True, "variables": c.variables}
    for c in CONVERSATIONS
]
_REMOVE = "Remove the file; the weights belong into safetensors or GGUF"
_CODE = "Remove the code and its key: runtimes have the architectures that they run in their own source"


class Safety(Check):
    name = "safety"
    question = "no pickle, no code, no template that leaves its sandbox, no link out of the folder"
    rank = 0

    def run(self, release: ReleaseSet, found: Findings) -> None:
        n_files, n_templates = 0, 0
        for path in every_file(release.root):
            n_files += 1
            name = path.relative_to(release.root).as_posix()
            try:
                kind = self._kind(release.root, path)
                if kind is not None:
                    found.problem(f"{printable(name)}: {kind}", "Replace it with the file itself, or remove it")
                    continue
                self._look(path, name, found)
                n_templates += self._look_at_templates(path, name, found)
            except OSError as error:
                found.problem(f"{printable(name)}: cannot be read, {error.strerror or error}")
        templates_said = f", {n_templates} chat template{'s' * (n_templates != 1)} rendered in a sandbox"
        found.note(f"{n_files} files{templates_said if n_templates else ''}")

    def _kind(self, root: Path, path: Path) -> str | None:
        """Why a path is no file to look into."""
        if leaves(root, path):
            return (
                f"a link out of the folder, to {str(path.readlink())[:80]}"
                if path.is_symlink()
                else "out of the folder"
            )
        if not path.exists():
            return "a link to nothing"
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return None
        return "a link to a folder" if stat.S_ISDIR(mode) else "no file but a pipe, a socket or a device"

    def _look(self, path: Path, name: str, found: Findings) -> None:
        if (kind := pickles.told_as_pickle(path)) is not None:
            found.problem(f"{printable(name)}: {kind}", _REMOVE)
        if (kind := remote_code.told_as_code(path)) is not None:
            found.problem(f"{printable(name)}: {kind}", _CODE)
        if path.suffix == ".json":
            for said in remote_code.keys_of_code(path):
                found.problem(f"{printable(name)}: {said}", _CODE)

    def _look_at_templates(self, path: Path, name: str, found: Findings) -> int:
        count = 0
        for key, said in self._templates(path, name):
            count += 1
            for problem in said:
                advice = "Do not run this template; take the one of the model's own release"
                found.problem(f"{printable(name)}: the chat template {key[:60]}: {problem}", advice)
        return count

    def _templates(self, path: Path, name: str) -> Iterator[tuple[str, list[str]]]:
        try:
            for key, source in templates.of_file(path):
                yield key, list(templates.problems(source, _JOBS))
        except LowbitError:
            return  # a GGUF that cannot be read: what needs it says so


CHECK = Safety
