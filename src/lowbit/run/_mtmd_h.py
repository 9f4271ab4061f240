"""The part of llama.cpp's multimodal interface (tools/mtmd/mtmd.h and mtmd-helper.h) that lowbit calls, by ctypes.

As in _llama_h.py nothing is called before the default parameters that the library returns proved to be the known ones;
and (in vision/llama_cpp.py) a text without media must tokenize as llama.h tokenizes it, which a struct laid out
differently would not. Source: tools/mtmd of llama.cpp in October 2026.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from typing import Any

from lowbit.run import _llama_h

IMAGE, AUDIO = 1, 2  # mtmd_input_chunk_type; 0 is text


class ContextParams(ctypes.Structure):
    """mtmd_context_params."""

    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int32),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int32),
        ("warmup", c_bool),
        ("image_min_tokens", c_int32),
        ("image_max_tokens", c_int32),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("spare", c_int8 * _llama_h.SPARE),
    ]


class InputText(ctypes.Structure):
    """mtmd_input_text."""

    _fields_ = [
        ("text", c_char_p),
        ("text_len", c_size_t),
        ("add_special", c_bool),
        ("parse_special", c_bool),
    ]


# What mtmd_context_params_default() returns; a pointer that is not set reads as None.
_DEFAULTS: dict[str, Any] = {
    "use_gpu": True,
    "device": None,
    "print_timings": True,
    "n_threads": 4,
    "image_marker": None,
    "media_marker": b"<__media__>",
    "flash_attn_type": -1,
    "warmup": True,
    "image_min_tokens": -1,
    "image_max_tokens": -1,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "batch_max_tokens": 1024,
    "progress_callback": None,
    "progress_callback_user_data": None,
}

_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (ContextParams, []),
    "mtmd_default_marker": (c_char_p, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, ContextParams]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_support_vision": (c_bool, [c_void_p]),
    "mtmd_support_audio": (c_bool, [c_void_p]),
    "mtmd_get_audio_sample_rate": (c_int32, [c_void_p]),
    "mtmd_decode_use_non_causal": (c_bool, [c_void_p, c_void_p]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_void_p]),
    "mtmd_bitmap_init_from_audio": (c_void_p, [c_size_t, c_void_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_input_chunk_get_tokens_text": (POINTER(c_int32), [c_void_p, POINTER(c_size_t)]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(InputText), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
    "mtmd_helper_decode_image_chunk": (
        c_int32,
        [
            c_void_p,
            c_void_p,
            c_void_p,
            POINTER(c_float),
            c_int32,
            c_int32,
            c_int32,
            POINTER(c_int32),
            c_void_p,
            c_void_p,
        ],
    ),
    "mtmd_log_set": (None, [c_void_p, c_void_p]),
    "mtmd_helper_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_n_embd_inp": (c_int32, [c_void_p]),
}


@functools.cache
def load() -> _llama_h.Llama:
    """The library of ``_llama_h.load`` with mtmd's functions declared and checked too. Raises RuntimeFailed."""
    llama = _llama_h.load()
    _llama_h.declare(llama.lib, _PROTOTYPES)
    _llama_h.check("mtmd_context_params", llama.lib.mtmd_context_params_default(), _DEFAULTS)
    callback = ctypes.cast(llama.log.callback, c_void_p)
    llama.lib.mtmd_log_set(callback, None)
    llama.lib.mtmd_helper_log_set(callback, None)
    return llama
