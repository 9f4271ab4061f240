"""The child process behind _dry_run.py: requests as JSON lines on standard input, answers on standard output."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError

_NO_MMAP = 0  # LLAMA_LOAD_MODE_NONE, which no_alloc needs


def child() -> None:
    """Answers until standard input ends. An answer with 'error' is a refusal; where llama.cpp aborts there is none."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # which is told below
        importlib.import_module("xllamacpp")
    program = _status("VmHWM")  # before what only lowbit needs is loaded
    dry: _Dry | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            dry = dry or _Dry(program)
            answer = getattr(dry, request.pop("do"))(**request)
        except LowbitError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


class _Dry:
    """The models that were laid out so far, and a context of the target at a time."""

    def __init__(self, program: int) -> None:
        from lowbit.run import _llama_h, _llama_memory

        self.program, self.memory = program, _llama_memory
        self.llama = _llama_h.load()
        self.lib = self.llama.lib
        self.models: dict[str, int] = {}

    def _refusal(self) -> str:
        said = self.llama.log.take().split("; ")
        telling = [line for line in said if not line.endswith("failed to load model")]
        return (telling or said)[-1]

    def process(self) -> dict[str, Any]:
        """What a process takes that has loaded the library and nothing else."""
        return {"bytes": self.program}

    def model(self, path: str) -> dict[str, Any]:
        """Lays a file's tensors out; reads its metadata and vocabulary."""
        before = _status("RssAnon")
        params = self.lib.llama_model_default_params()
        params.no_alloc, params.load_mode = True, _NO_MMAP
        model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            return {"error": self._refusal() or "llama.cpp does not open it"}
        self.models[path] = model
        vocab = self.lib.llama_model_get_vocab(model)
        return {
            "metadata_bytes": max(0, _status("RssAnon") - before),
            "vocab_size": self.lib.llama_vocab_n_tokens(vocab),
            "trained_context": self.lib.llama_model_n_ctx_train(model),
        }

    def projector(self, path: str, flash: int) -> dict[str, Any]:
        return {"bytes": self.memory.projector(self.llama, path, flash)}

    def contexts(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """The memory of contexts that exist at the same time, each over the one before (a drafter over its target)."""
        made: list[int] = []
        found = []
        try:
            for request in requests:
                path, settings = request["path"], request["settings"]
                params = self.lib.llama_context_default_params()
                for key, value in settings.items():
                    setattr(params, key, value)
                params.ctx_other = made[-1] if made else None
                context = self.lib.llama_init_from_model(self.models[path], params)
                if not context:
                    return {"error": self._refusal() or "llama.cpp makes no context of it"}
                made.append(context)
                memory = self.memory.breakdown(self.llama, context)
                found.append({"context": self.lib.llama_n_ctx(context), "memory": memory})
        finally:
            for context in reversed(made):
                self.lib.llama_free(context)
        return {"contexts": found}


def _status(key: str) -> int:
    """Bytes under a key of /proc/self/status; 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
