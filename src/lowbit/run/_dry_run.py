"""llama.cpp lays a model and its contexts out without allocating them: what they would take, to the byte.

This happens in a child process, since llama.cpp answers some lies of a file by aborting. The file's tensor data is
never read and may be a hole: a header with the right shapes and types is enough.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, RuntimeFailed, Unsupported
from lowbit.run._llama_memory import Memory

_CHILD = "from lowbit.run._dry_run_child import child; child()"
_TIMEOUT = 120.0  # seconds for an answer that takes milliseconds


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A model as llama.cpp lays it out. where: what errors name. metadata_bytes: what the process grew by, for
    vocabulary and metadata."""

    path: Path
    where: Path
    metadata_bytes: int
    vocab_size: int
    trained_context: int


@dataclass(frozen=True, kw_only=True)
class ContextMemory:
    """context: cells that llama.cpp made of the asked-for context. memory: bytes by kind of buffer."""

    context: int
    memory: Mapping[str, Memory]

    def total(self, what: str) -> int:
        """Bytes of 'model', 'context' or 'compute' in all buffers."""
        return sum(getattr(memory, what) for memory in self.memory.values())


class DryRun:
    """One child process that lays out models and contexts; a context manager. process_bytes: what a bare Python process
    takes once the library is loaded.

    Raises RuntimeFailed where llama.cpp is missing or of another release.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # Without the variable ggml starts a debugger to print its own stack.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            self.process_bytes: int = self._ask("process", None)["bytes"]
        except Unsupported as error:
            self.close()
            raise RuntimeFailed("llama.cpp does not start", found=error.found) from error

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.kill()
        self._child.wait()
        self._errors.close()

    def model(self, path: Path, where: Path | None = None) -> LaidOut:
        """Raises BadFile where llama.cpp dies of the file, Unsupported where it refuses it, naming ``where``."""
        where = where or path
        return LaidOut(path=path, where=where, **self._ask("model", where, path=str(path)))

    def contexts(self, asked: Sequence[tuple[LaidOut, Mapping[str, Any]]]) -> list[ContextMemory]:
        """The memory of contexts that exist together, each with the one before as its ctx_other. Settings: fields of
        llama_context_params. Raises Unsupported where llama.cpp refuses one."""
        requests = [{"path": str(model.path), "settings": dict(settings)} for model, settings in asked]
        answer = self._ask("contexts", asked[-1][0].where, requests=requests)
        return [
            ContextMemory(
                context=found["context"], memory={name: Memory(*sizes) for name, sizes in found["memory"].items()}
            )
            for found in answer["contexts"]
        ]

    def projector(self, path: Path, *, flash: int) -> int:
        """Bytes of an mmproj's weights and of its compute buffers for the largest image. flash: -1 leaves flash
        attention to llama.cpp. Raises BadFile, Unsupported."""
        found: int = self._ask("projector", path, path=str(path), flash=flash)["bytes"]
        return found

    def _ask(self, what: str, where: Path | None, **request: Any) -> dict[str, Any]:
        assert self._child.stdin and self._child.stdout
        try:
            print(json.dumps({"do": what, **request}), file=self._child.stdin, flush=True)
            waits = os.name == "posix"  # where a pipe can be waited for
            ready = not waits or select.select([self._child.stdout], [], [], _TIMEOUT)[0]
            line = self._child.stdout.readline() if ready else ""
        except OSError:
            line = ""
        if not line:
            raise self._died(where)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unsupported("llama.cpp refuses to lay this out", where=where, found=answer["error"])
        return answer

    def _died(self, where: Path | None) -> BadFile | RuntimeFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)  # it is dead, or it never answered
        self._child.kill()
        self._child.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = said[-1] if said else f"exit code {self._child.returncode}"
        if where is None:
            return RuntimeFailed("llama.cpp does not start", found=last)
        hint = "The file is damaged or lies about itself"
        return BadFile("llama.cpp dies of this file's metadata", where=where, found=last.rpartition("/")[2], hint=hint)
