"""Random weights for a config, as a GGUF that llama.cpp runs; and what it then says it allocated."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.plan import header, open_model
from lowbit.run import _llama_h, _llama_memory

_LOGGED = re.compile(rb"KV buffer size = +([\d.]+) MiB")
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def write_random(config: Mapping[str, Any], folder: Path, *, recipe: str = "f16", seed: int = 0) -> Path:
    """``folder``/config.json and ``folder``/model.gguf, of which the path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    path, rng = folder / "config.json", np.random.default_rng(seed)
    path.write_text(json.dumps(config), encoding="utf-8")
    with open_model(path) as model:
        tensors = model.packed(recipe)
        computed = model.family.computed(model.config) if model.family else {}
        offsets = header.write(folder / "model.gguf", model, tensors)
    with open(folder / "model.gguf", "r+b") as file:
        for tensor, offset in zip(tensors, offsets, strict=True):
            values = computed.get(tensor.name)
            if values is None:
                values = rng.normal(size=tensor.shape).astype(np.float32) * 0.05
                values = values + 1 if len(tensor.shape) == 1 else values
            file.seek(offset)
            file.write(values.astype(np.float16 if tensor.dtype == "F16" else np.float32).tobytes())
    return folder / "model.gguf"


class Loaded:
    """A model that llama.cpp has loaded for real."""

    def __init__(self, path: Path) -> None:
        self.llama = _llama_h.load()
        self.lib = self.llama.lib
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), self.lib.llama_model_default_params())
        assert self.model, self.llama.log.take()
        self.logged: list[float] = []  # MiB of the KV buffers of the context that was made last
        self._listener = _LogCallback(self._listen)

    def _listen(self, level: int, line: bytes, _: Any) -> None:
        self.logged += [float(found) for found in _LOGGED.findall(line)]

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_model_free(self.model)

    @contextmanager
    def context(self, settings: Mapping[str, Any], other: int | None = None) -> Iterator[int]:
        """A context with these fields of llama_context_params, over another's where it is a drafter."""
        params = self.lib.llama_context_default_params()
        for key, value in {**settings, "n_threads": 1, "n_threads_batch": 1}.items():
            setattr(params, key, value)
        params.ctx_other = other
        self.logged.clear()
        self.lib.llama_log_set(ctypes.cast(self._listener, ctypes.c_void_p), None)
        context = self.lib.llama_init_from_model(self.model, params)
        self.lib.llama_log_set(ctypes.cast(self.llama.log.callback, ctypes.c_void_p), None)
        assert context, settings
        try:
            yield context
        finally:
            self.lib.llama_free(context)

    def allocated(self, context: int) -> tuple[int, int]:
        """Bytes of the caches and of the compute buffers that exist."""
        memory = _llama_memory.breakdown(self.llama, context).values()
        return sum(m.context for m in memory), sum(m.compute for m in memory)

    def decodes(self, context: int, n: int = 8) -> bool:
        """Whether ``n`` tokens go through, and the scores of the last are numbers."""
        buffers = _llama_h.BatchBuffers(n)
        batch = buffers.fill(np.arange(3, 3 + n, dtype=np.int32), 0, 1)
        if self.lib.llama_decode(context, batch):
            return False
        n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(context), (n_vocab,))
        return bool(np.isfinite(logits).all())
