"""What llama.cpp's KV cache holds of a sequence, read from llama_state_seq_get_data (src/llama-kv-cache.cpp)."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit.run.llama_cpp import LlamaCpp


@dataclass(frozen=True)
class Layer:
    """The bytes of a layer's keys and values, (cells, bytes of a row) uint8; the positions that the cells are of; how
    many neighbours of a key and of a value are turned together, 0 for none."""

    keys: np.ndarray
    values: np.ndarray
    positions: list[int]
    turned: tuple[int, int]


def cache_of(path: Path, tokens: np.ndarray, kv_type: str) -> list[Layer]:
    """The cache after reading ``tokens``: of a model with a sliding window first its global layers, then the others."""
    # With flash attention, f32 too: values are then a row a cell, as in a quantized cache.
    with LlamaCpp(path, context=256, threads=1, kv_type=kv_type, flash_attention=True) as model:
        for _ in model.logits(tokens):
            pass
        lib, context = model._lib, model._context
        lib.llama_state_seq_get_size.restype = lib.llama_state_seq_get_data.restype = ctypes.c_size_t
        lib.llama_state_seq_get_size.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        lib.llama_state_seq_get_data.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32]
        size = lib.llama_state_seq_get_size(context, 0)
        buffer = ctypes.create_string_buffer(size)
        assert lib.llama_state_seq_get_data(context, buffer, size, 0) == size
    return _Reader(buffer.raw[:size]).layers()


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 8  # a magic number and the sequence's

    def take(self, form: str) -> int:
        value: int = struct.unpack_from("<" + form, self.raw, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return value

    def layers(self) -> list[Layer]:
        found = []
        while self.at < len(self.raw):
            assert self.take("I") == 1  # streams
            cells = self.take("I")
            if not cells:
                continue
            positions = []
            for _ in range(cells):
                positions.append(self.take("i"))
                sequences = self.take("I")
                self.at += 4 * sequences
            assert self.take("I") == 0  # values are not transposed
            n, turned = self.take("I"), (self.take("I"), self.take("I"))
            keys = [self.rows(cells) for _ in range(n)]
            found += [Layer(k, self.rows(cells), positions, turned) for k in keys]
        return found

    def rows(self, cells: int) -> np.ndarray:
        self.take("i")  # the type
        width = self.take("Q")
        rows = np.frombuffer(self.raw, np.uint8, cells * width, self.at).reshape(cells, width)
        self.at += cells * width
        return rows
