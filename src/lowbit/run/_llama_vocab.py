"""A GGUF's vocabulary in llama.cpp, without its weights: what a tokenizer is compared with, at any size of model."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.errors import BadFile
from lowbit.run.llama_cpp import LlamaCpp


class LlamaVocab(LlamaCpp):
    """Tokens of a GGUF as llama.cpp has them: tokenize, detokenize, piece, bos, eos, ends, adds_bos. No logits.

    Raises NotFound and BadFile, as LlamaCpp does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, context=64, ubatch=1, threads=1, logits_all=False)

    def _load_model(self) -> int:
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        self._llama.log.take()
        model = self._lib.llama_model_load_from_file(os.fsencode(Path(self.path)), params)
        if not model:
            raise BadFile(
                "llama.cpp cannot load this vocabulary", where=self.path, found=self._llama.log.take() or None
            )
        return int(model)

    def _new_context(self, kv_type: str, flash_attention: bool | None) -> int:
        return 0  # none: llama_free takes a null pointer
