"""llama.cpp in this process: full-vocabulary logits, generation and chat from a GGUF file.

Every setting that is not named here stays at llama.cpp's own default. In particular weights are repacked at load where
the CPU has a faster layout for them (Q4_0 into interleaved rows): that is what a user's llama.cpp computes with, and it
is the same on every run on one machine. Between CPUs with different vector units results differ in the last bits.
"""

from __future__ import annotations

import codecs
import copy
import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadFile, BadOption, BadText, NotFound, RuntimeFailed
from lowbit.run import _kv_types, _llama_h, _looks, _tokens, _trial
from lowbit.run._grammar import Grammar, Vocabulary
from lowbit.run._kv_types import KV_TYPES, UNQUANTIZED
from lowbit.run._products import Observer, Watch
from lowbit.run.base import Runtime, Suits, check_sizes
from lowbit.threads import available_cores
from lowbit.units import MIB

_LOGITS_BYTES = 128 * MIB
_CONTEXT_HINT = "A smaller context or another KV type may work; LOWBIT_DEBUG=1 shows llama.cpp's log"
_DRAFTER = "gemma4-assistant"
_DRAFTER_HINT = "It is a drafter, which runs beside its target only: llama-server --model-draft"


class LlamaCpp(Runtime):
    """A GGUF model, loaded and ready to run. A context manager; close() frees the model.

    path:            the GGUF file
    context:         tokens a sequence may have; 0 means what the model was trained for
    ubatch:          tokens decoded at a time
    threads:         None means the physical cores this process may use
    kv_type:         type of the KV cache, one of KV_TYPES, or two as K:V
    flash_attention: None leaves the choice to llama.cpp. With it on, an f32 cache computes as f16 does: a true f32
                     reference needs kv_type="f32", flash_attention=False. A quantized cache needs it on.
    logits_all:      False keeps room for one row of logits only: generation and chat, but no logits()
    logits_rows:     rows of logits that logits() computes at a time; None means ubatch, or fewer where the vocabulary
                     is so large that they would take more than 128 MiB
    observer:        is shown the products of weights and activations as they are computed (see _products.py)
    trusted:         True skips the look at the file in a child process (see _trial.py)

    Raises NotFound, BadFile (not a GGUF, truncated, unknown architecture), BadOption, RuntimeFailed.
    """

    name: ClassVar[str] = "llama.cpp"
    to_generate: ClassVar[Mapping[str, Any]] = {"logits_all": False, "trusted": True}
    rewinds: ClassVar[bool] = True
    path: Path

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        return Suits.BY_DEFAULT if _looks.is_file_of(target, ".gguf", b"GGUF") else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        try:
            return f"xllamacpp {metadata.version('xllamacpp')}"
        except metadata.PackageNotFoundError:
            return None

    @classmethod
    def load_library(cls) -> None:
        _llama_h.load()

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int = 512,
        ubatch: int = 512,
        threads: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        logits_all: bool = True,
        logits_rows: int | None = None,
        observer: Observer | None = None,
        trusted: bool = False,
    ) -> None:
        self.path = Path(path)
        self.threads = available_cores() if threads is None else threads
        _check_options(context, ubatch, self.threads, kv_type, flash_attention)
        check_file(self.path)
        if not trusted:
            _trial.check(self.path)
        self._llama = _llama_h.load()
        self._lib = self._llama.lib
        self.logits_all = logits_all
        self._watch = Watch(self._lib, observer) if observer is not None else None
        self._model = self._load_model()
        self._free_model = weakref.finalize(self, self._lib.llama_model_free, self._model)
        try:
            self._vocab = self._lib.llama_model_get_vocab(self._model)
            self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
            self.context: int = context or self.n_context_train
            self.ubatch = min(ubatch, self.context)  # as llama.cpp itself limits it
            rows = logits_rows or _rows_within(_LOGITS_BYTES, self.n_vocab)
            self._rows = min(self.ubatch, rows) if logits_all else 1
            self._context = self._new_context(kv_type, flash_attention)
        except BaseException:
            self._free_model()
            raise
        self._free_context = weakref.finalize(self, self._lib.llama_free, self._context)
        self._batch = _llama_h.BatchBuffers(self.ubatch)
        self._past = 0  # tokens in the KV cache
        self._vocabulary: Vocabulary | None = None  # made when a grammar wants it
        self._parent: LlamaCpp | None = None
        self._besides: weakref.WeakSet[LlamaCpp] = weakref.WeakSet()

    def beside(self, *, kv_type: str, flash_attention: bool | None = None) -> Self:
        """As Runtime.beside: it takes the memory of a context, not that of a model."""
        self._open_model()
        _check_options(self.context, self.ubatch, self.threads, kv_type, flash_attention)
        twin = copy.copy(self)
        twin._context = twin._new_context(kv_type, flash_attention)
        twin._free_context = weakref.finalize(twin, self._lib.llama_free, twin._context)
        twin._batch = _llama_h.BatchBuffers(self.ubatch)
        twin._past = 0
        twin._parent, twin._besides = self, weakref.WeakSet()
        self._besides.add(twin)
        return twin

    def _load_model(self) -> int:
        params = self._lib.llama_model_default_params()
        self._llama.log.take()
        model = self._lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not model:
            GgufFile(self.path)  # of a damaged file it tells what and where; llama.cpp only that it failed
            raise BadFile(
                "llama.cpp cannot load this file",
                where=self.path,
                found=self._llama.log.take() or None,
                hint="Is the file whole, and its architecture known to llama.cpp? LOWBIT_DEBUG=1 shows its log",
            )
        return int(model)

    def _new_context(self, kv_type: str, flash_attention: bool | None) -> int:
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = self.ubatch
        params.n_outputs_max = params.n_outputs_max_per_seq = self._rows
        params.n_threads = params.n_threads_batch = self.threads
        types = _kv_types.parse(kv_type)
        params.type_k, params.type_v = KV_TYPES[types.k], KV_TYPES[types.v]
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        params.swa_full = False  # as llama.cpp's programs do: a sliding-window layer keeps its window only
        if self._watch is not None:
            params.cb_eval = ctypes.cast(self._watch.callback, ctypes.c_void_p)
        self._adjust(params)
        self._llama.log.take()
        handle = self._lib.llama_init_from_model(self._model, params)
        if not handle:
            raise RuntimeFailed(
                "llama.cpp cannot make a context for this model",
                where=self.path,
                found=self._llama.log.take() or None,
                hint=_DRAFTER_HINT if self.metadata.get("general.architecture") == _DRAFTER else _CONTEXT_HINT,
            )
        # llama.cpp rounds what a stream of the cache holds up to a multiple of 256.
        unit = 256 * (1 if params.kv_unified else params.n_seq_max)
        padded = -(-params.n_ctx // unit) * unit
        asked = {"n_ctx": padded, "n_batch": params.n_batch, "n_ubatch": self.ubatch, "n_threads": self.threads}
        for name, value in asked.items():
            found = getattr(self._lib, f"llama_{name}")(handle)
            if found != value:
                self._lib.llama_free(handle)
                raise RuntimeFailed(f"llama.cpp reports {name} = {found} where {value} was set", where=self.path)
        return int(handle)

    def _adjust(self, params: _llama_h.ContextParams) -> None:
        """For a subclass that wants another context."""

    def close(self) -> None:
        for twin in list(self._besides):  # a context may not outlive its model
            twin.close()
        self._free_context()
        if self._parent is None:
            self._free_model()

    # What the file says

    @property
    def model_bytes(self) -> int:
        return int(self._lib.llama_model_size(self._open_model()))

    @property
    def n_weights(self) -> int:
        return int(self._lib.llama_model_n_params(self._open_model()))

    @property
    def n_context_train(self) -> int:
        """The context length that the model was trained for, in tokens."""
        return int(self._lib.llama_model_n_ctx_train(self._open_model()))

    @property
    def metadata(self) -> dict[str, str]:
        """The file's key-values as llama.cpp prints them (arrays shortened)."""
        model, found = self._open_model(), {}
        for i in range(self._lib.llama_model_meta_count(model)):
            key = _string(self._lib.llama_model_meta_key_by_index, model, i)
            found[key] = _string(self._lib.llama_model_meta_val_str_by_index, model, i)
        return found

    # Tokens

    @property
    def adds_bos(self) -> bool:
        self._open_model()
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        self._open_model()
        return int(self._lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        self._open_model()
        return int(self._lib.llama_vocab_eos(self._vocab))

    def ends(self, token: int) -> bool:
        self._open_model()
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        self._open_model()
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadText("the text has a lone surrogate", where=f"character {error.start}") from None
        room = len(raw) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
            if n >= 0:
                return ids[:n]
            if -n <= room:
                raise RuntimeFailed("llama.cpp cannot tokenize this text", where=self.path, found=f"{len(raw)} bytes")
            room = -n

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        self._check_ids(ids)
        tokens = (ctypes.c_int32 * max(1, len(ids)))(*ids)
        room = 16 * len(ids) + 64
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_detokenize(self._vocab, tokens, len(ids), text, room, False, special)
            if n >= 0:
                return text.raw[:n].decode("utf-8", "replace")
            room = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that one token stands for; may end within a UTF-8 character."""
        self._check_ids([token])
        room = 64
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, text, room, 0, special)
            if n >= 0:
                return text.raw[:n]
            room = -n

    # Running

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._open_context()), True)
        self._past = 0

    def logits(self, tokens: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """As Runtime.logits; positions before ``start`` are decoded without computing their logits, and memory is
        bounded by (logits_rows, n_vocab).

        llama.cpp attends by another kernel where fewer than 64 tokens are decoded together with flash attention on,
        which changes the last bits of a result; a multiple of 64 for ubatch and logits_rows keeps to one kernel.
        """
        return self.logits_of(tokens, [(start, len(tokens))])

    def logits_of(
        self, tokens: Sequence[int] | np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not self.logits_all:
            raise BadOption("this model was opened with logits_all=False", where=self.path)
        ids = self._fitting(tokens)
        self.reset()
        begin = 0
        for start, stop in spans:
            while begin < stop:
                first = max(begin, start)
                end = min(begin + self.ubatch, stop, first + self._rows)
                rows = self._decode(ids[begin:end], outputs=max(0, end - first))
                if end > first:
                    yield first, rows.copy()
                begin = end

    def feed(self, ids: np.ndarray) -> np.ndarray:
        for begin in range(0, len(ids), self.ubatch):
            row = self._decode(ids[begin : begin + self.ubatch])[-1]
        return row

    def rewind(self, n: int) -> bool:
        memory = self._lib.llama_get_memory(self._open_context())
        if not 0 < n <= self._past:
            return False
        # A sliding-window layer keeps little more than its window: what n would attend to may be overwritten.
        window = int(self._lib.llama_model_n_swa(self._model))
        if window and self._lib.llama_memory_seq_pos_min(memory, 0) > max(0, n - window):
            return False
        if n < self._past and not self._lib.llama_memory_seq_rm(memory, 0, n, -1):
            return False
        self._past = n
        return True

    def rows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        step = min(self.ubatch, self._rows)
        for begin in range(0, len(ids), step):
            part = ids[begin : begin + step]
            yield from self._decode(part, outputs=len(part))

    def grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """What keeps generation within a JSON Schema, as llama.cpp's server does it (see _grammar.py)."""
        if self._vocabulary is None:
            pieces = [self.piece(token, special=True) for token in range(self.n_vocab)]
            self._vocabulary = Vocabulary(
                self._llama, self._vocab, pieces, [t for t in range(self.n_vocab) if self.ends(t)]
            )
        return Grammar(self._vocabulary, schema, self.path)

    @property
    def chat_template(self) -> str | None:
        source = self._lib.llama_model_chat_template(self._open_model(), None)
        return source.decode("utf-8", "replace") if source else None

    def texts(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if text := decoder.decode(self.piece(token)):
                yield text
        if rest := decoder.decode(b"", True):
            yield rest

    # Inside

    def _decode(self, ids: np.ndarray, outputs: int = 1) -> np.ndarray:
        """Appends tokens to the sequence. Gives the logits of the last ``outputs`` of them, float32
        (outputs, n_vocab), in llama.cpp's own buffer: valid until the next call."""
        context = self._open_context()
        status = self._lib.llama_decode(context, self._batch.fill(ids, self._past, outputs))
        if self._watch is not None:
            self._watch.check()
        if status != 0:
            raise RuntimeFailed(
                "llama.cpp could not decode", where=self.path, found=f"status {status} {self._llama.log.take()}".strip()
            )
        self._past += len(ids)
        if outputs == 0:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(context), shape=(outputs, self.n_vocab))

    def _fitting(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        self._open_model()
        return _tokens.fitting(tokens, self.n_vocab, self.context, self.path)

    def _check_ids(self, tokens: Sequence[int] | np.ndarray) -> None:
        self._open_model()
        _tokens.check_ids(tokens, self.n_vocab)

    def _spelled(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _open_model(self) -> int:
        if not self._free_model.alive:
            raise RuntimeFailed("this model was closed", where=self.path)
        return self._model

    def _open_context(self) -> int:
        self._open_model()
        return self._context


def _rows_within(n_bytes: int, n_vocab: int) -> int:
    """Rows of float32 logits that fit, a multiple of 64 (see LlamaCpp.logits), at least 64."""
    return max(64, n_bytes // (4 * max(1, n_vocab)) // 64 * 64)


def _check_options(context: int, ubatch: int, threads: int, kv_type: str, flash_attention: bool | None) -> None:
    if _kv_types.parse(kv_type).quantized and flash_attention is False:
        raise BadOption("a quantized KV cache needs flash attention", found=kv_type, expected=", ".join(UNQUANTIZED))
    check_sizes(context=context, ubatch=ubatch, threads=threads)


def check_file(path: Path) -> None:
    """Says plainly what llama.cpp would only log."""
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except FileNotFoundError:
        raise NotFound("no such file", where=path, expected="a GGUF file") from None
    except OSError as error:
        raise BadFile("cannot be read", where=path, found=error.strerror, expected="a GGUF file") from None
    if magic != b"GGUF":
        raise BadFile(
            "not a GGUF file",
            where=path,
            found=f"the first bytes {magic!r}",
            expected="b'GGUF'",
            hint="lowbit pack makes one of a checkpoint",
        )


def _string(function: Any, model: int, index: int) -> str:
    """A string that llama.cpp writes into a buffer, snprintf style."""
    room = 256
    while True:
        text = ctypes.create_string_buffer(room)
        n = function(model, index, text, room)
        if n < room:
            return text.value.decode("utf-8", "replace")
        room = n + 1


RUNTIME = LlamaCpp
