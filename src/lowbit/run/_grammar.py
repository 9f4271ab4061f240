"""Generation that stays within a JSON Schema: llguidance, the engine that this llama.cpp's server has for it too.

The library is asked here rather than through llama.cpp's sampler: that one keeps its tokenizer under the address of a
vocabulary, which the next model may get.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from lowbit.errors import BadOption, NotFound, RuntimeFailed
from lowbit.run._llama_h import Llama

# White space between the parts of an object: what llama.cpp's own grammars of a schema allow. llguidance's default is
# any amount, in which small models lose themselves.
_SPACE = r"( |\n{1,2}[ \t]{0,20})?"
_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # llama_token_attr


class Vocabulary:
    """A model's tokens as llguidance wants them; made once a model (about a second for 262k tokens).

    Raises NotFound where llguidance is not installed.
    """

    def __init__(self, llama: Llama, vocab: int, pieces: list[bytes], eos: list[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise NotFound(
                "llguidance is not installed", expected="it, to keep answers within a schema",
                hint="pip install 'lowbit[tasks]'",
            ) from None  # fmt: skip
        self.library = llguidance
        tokens = []
        for token, piece in enumerate(pieces):
            kind = llama.lib.llama_vocab_get_attr(vocab, token)
            looks_special = kind & _USER_DEFINED and piece.startswith(b"<") and piece.endswith(b">")
            tokens.append(b"\xff" + piece if kind & _CONTROL or looks_special else piece)  # its mark of a special token
        function = ctypes.cast(llama.lib.llama_tokenize, ctypes.c_void_p).value
        tokenizer: Any = llguidance.LLTokenizer  # from_llamacpp is not in its stubs
        self.tokenizer = tokenizer.from_llamacpp(
            tokens=tokens, vocab_ptr=vocab, tokenize_fptr=function, eos_token=eos, slices=None
        )


class Grammar:
    """A JSON Schema, and how far an answer has come in it. A context manager.

    Raises BadOption where llguidance does not know the schema's constructs.
    """

    def __init__(self, vocabulary: Vocabulary, schema: Mapping[str, Any], where: os.PathLike[str]) -> None:
        matcher = vocabulary.library.LLMatcher
        self._where = where
        try:
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": _SPACE})
            self._matcher = matcher(vocabulary.tokenizer, grammar, log_level=0)
            said = self._matcher.get_error()
        except ValueError as error:
            said = str(error)
        if said:
            raise BadOption("no grammar can be made of this schema", found=said.strip().splitlines()[0][:200])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._matcher

    def choose(self, logits: np.ndarray) -> int | None:
        """The likeliest token that the schema allows next, which then counts as said; None where the answer is whole.

        logits: float32 (n_vocab,)
        """
        if self._matcher.is_stopped():
            return None
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: len(logits)] != 0
        if not allowed.any():
            return None
        token = int(np.where(allowed, logits, -np.inf).argmax())
        if not self._matcher.consume_token(token):
            raise RuntimeFailed("the grammar does not go on", where=self._where, found=self._matcher.get_error())
        return token
