"""The part of llama.cpp's C interface (include/llama.h) that lowbit calls, by ctypes.

The structs are passed by value and their layout changes between releases without notice, so nothing is called
before three checks passed: the package's version lies in the range this file was written for; the default parameters
that the library returns are the known ones, field by field; and (in llama_cpp.py) what the created context reports
is what was asked for. Source: include/llama.h of llama.cpp in October 2026.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from importlib import metadata
from typing import Any

import numpy as np

from lowbit import ggml
from lowbit.errors import RuntimeFailed

_PACKAGE = "xllamacpp"
_RELEASES = ("2026.10.",)  # what pyproject.toml asks for

# A struct that grew must not make the library write past ours: spare room after the last field that is known.
SPARE = 256


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("spare", c_int8 * SPARE),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("callbacks", c_void_p * 3),  # abort callback and its data among them; lowbit leaves all of them empty
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        ("spare", c_int8 * SPARE),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


class BatchBuffers:
    """The arrays behind a llama_batch of up to ``size`` tokens of sequence 0, filled anew for each call."""

    def __init__(self, size: int) -> None:
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.n_seq_id = np.ones(size, np.int32)
        self.sequence = np.zeros(1, np.int32)
        self.seq_id = np.full(size, self.sequence.ctypes.data, np.uintp)
        self.logits = np.zeros(size, np.int8)

    def fill(self, ids: np.ndarray, past: int, outputs: int) -> Batch:
        n = len(ids)
        self.token[:n] = ids
        self.pos[:n] = np.arange(past, past + n)
        self.logits[:n] = np.arange(n) >= n - outputs
        return Batch(
            n_tokens=n,
            token=self.token.ctypes.data,
            pos=self.pos.ctypes.data,
            n_seq_id=self.n_seq_id.ctypes.data,
            seq_id=self.seq_id.ctypes.data,
            logits=self.logits.ctypes.data,
        )


# What llama_*_default_params() return; a pointer that is not set reads as None.
_MODEL_DEFAULTS: dict[str, Any] = {
    "devices": None,
    "tensor_buft_overrides": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
_CONTEXT_DEFAULTS: dict[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_orig_ctx": 0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_n_threads_batch": (c_int32, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_model_n_params": (c_uint64, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_meta_count": (c_int32, [c_void_p]),
    "llama_model_meta_key_by_index": (c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    "llama_model_meta_val_str_by_index": (c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_vocab_get_attr": (c_int32, [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_pos_min": (c_int32, [c_void_p, c_int32]),
    "llama_model_n_swa": (c_int32, [c_void_p]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
}

_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_LOG_CONT, _LOG_WARN, _LOG_ERROR = 5, 3, 4


class Log:
    """llama.cpp's log: kept quiet, its last complaints remembered for an error message; LOWBIT_DEBUG prints it all."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._level = 0
        self.callback = _LogCallback(self._receive)

    def _receive(self, level: int, text: bytes | None, _: Any) -> None:
        line = (text or b"").decode("utf-8", "replace")
        if os.environ.get("LOWBIT_DEBUG"):
            sys.stderr.write(line)
        self._level = self._level if level == _LOG_CONT else level
        if self._level in (_LOG_WARN, _LOG_ERROR) and line.strip(" .\n"):
            self.complaints = [*self.complaints[-7:], line.strip()]

    def take(self) -> str:
        """The remembered complaints as one string, most telling last; forgets them."""
        said, self.complaints = "; ".join(self.complaints[-3:]), []
        return said


class Llama:
    """The checked library: ``lib`` with prototypes set, and its ``log``."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.log = Log()
        declare(lib, _PROTOTYPES)
        check("llama_model_params", lib.llama_model_default_params(), _MODEL_DEFAULTS)
        check("llama_context_params", lib.llama_context_default_params(), _CONTEXT_DEFAULTS)
        lib.llama_log_set(ctypes.cast(self.log.callback, c_void_p), None)
        lib.llama_backend_init()


@functools.cache
def load() -> Llama:
    """The llama.cpp library inside xllamacpp, loaded and checked once a process.

    Raises RuntimeFailed where the package is missing, of another release, or laid out differently.
    """
    try:
        version = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise RuntimeFailed(
            "llama.cpp is not installed", expected=_PACKAGE, hint=f"pip install '{_PACKAGE}>=2026.10,<2026.11'"
        ) from None
    if not version.startswith(_RELEASES):
        raise mismatch(f"version {version}")
    return Llama(ggml.library())


def declare(lib: ctypes.CDLL, prototypes: dict[str, tuple[Any, list[Any]]]) -> None:
    """Sets result and argument types by function name. Raises RuntimeFailed where the library lacks one."""
    for name, (result, arguments) in prototypes.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise mismatch(f"the function {name} is missing") from None
        function.restype, function.argtypes = result, arguments


def check(struct: str, got: ctypes.Structure, expected: dict[str, Any]) -> None:
    """Raises RuntimeFailed where the library's defaults are not the expected ones."""
    for field, value in expected.items():
        found = getattr(got, field)
        if found != value:
            raise mismatch(f"{struct}.{field} = {found!r} by default where {value!r} was expected")


def mismatch(found: str) -> RuntimeFailed:
    return RuntimeFailed(
        "this llama.cpp library is laid out differently from the one lowbit was written for",
        where=_PACKAGE,
        found=found,
        expected="release 2026.10.x",
        hint=f"pip install '{_PACKAGE}>=2026.10,<2026.11'",
    )
