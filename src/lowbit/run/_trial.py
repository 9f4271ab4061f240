"""A first look at a stranger's GGUF in a process that may die of it.

llama.cpp answers some lies in a file's metadata (a vocabulary that contradicts itself, an impossible number of layers)
by aborting the whole process. So the metadata and the vocabulary of a file are read once in a child process before this
one opens it; the weights are not. It costs a quarter of a second a file.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from lowbit.errors import BadFile

_NO_MMAP = 0  # LLAMA_LOAD_MODE_NONE, which no_alloc needs
_CHILD = "import sys; from lowbit.run._trial import {child}; {child}(sys.argv[1])"


def check(path: Path, *, mmproj: bool = False) -> None:
    """Raises BadFile where llama.cpp dies of the file; that it merely refuses it is left to the real attempt."""
    found = path.stat()
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    _survives(path, identity, _CHILD.format(child="mmproj_child" if mmproj else "child"))


@functools.lru_cache(maxsize=256)
def _survives(path: Path, identity: tuple[int, ...], code: str) -> None:
    # Without the variable ggml starts a debugger to print its own stack.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, os.fspath(path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode < 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise BadFile(
            "llama.cpp dies of this file's metadata",
            where=path,
            found=said[-1].rpartition("/")[2] if said else f"signal {-done.returncode}",
            hint="The file is damaged or lies about itself",
        )


def child(path: str) -> None:
    """In the child: load everything but the weights; dies, or ends with 0."""
    from lowbit.run import _llama_h

    lib = _llama_h.load().lib
    params = lib.llama_model_default_params()
    params.no_alloc = True  # everything is checked and laid out, no weight is read
    params.load_mode = _NO_MMAP
    if model := lib.llama_model_load_from_file(os.fsencode(path), params):
        lib.llama_model_free(model)


def mmproj_child(path: str) -> None:
    """The same for an mmproj; mtmd has no way to leave the weights out, and its warm-up finds more lies."""
    from lowbit.run import _mtmd_h

    lib = _mtmd_h.load().lib
    params = lib.mtmd_context_params_default()
    params.use_gpu = False
    if context := lib.mtmd_init_from_file(os.fsencode(path), None, params):
        lib.mtmd_free(context)
