"""The products of weights with activations, seen while llama.cpp computes them (its cb_eval, by ctypes).

llama.cpp asks of every node of its graph whether it is wanted, computes up to it, and shows it. ggml_tensor's layout
is read from include/ggml.h of October 2026; ``Watch`` refuses a tensor whose fields do not make sense together.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowbit.errors import RuntimeFailed

_F32, _I32 = 0, 26
_DIMS, _SOURCES = 4, 10


class Tensor(ctypes.Structure):
    """ggml_tensor."""


Tensor._fields_ = [
    ("type", c_int32),
    ("buffer", c_void_p),
    ("ne", c_int64 * _DIMS),
    ("nb", c_size_t * _DIMS),
    ("op", c_int32),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(Tensor) * _SOURCES),
    ("view_src", c_void_p),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
    ("extra", c_void_p),
]
CALLBACK = ctypes.CFUNCTYPE(c_bool, POINTER(Tensor), c_bool, c_void_p)


@dataclass(frozen=True)
class Product:
    """One product y = W x of a weight with what flows into it.

    weight: the weight's name in the file. x: (tokens, n) float32; of experts (tokens, k, n), k = 1 where all that a
    token is sent to are given the same. experts: (tokens, n_used) int32 in a mixture of experts, else None.
    y: (tokens, rows) or (tokens, n_used, rows) float32, llama.cpp's own memory: what is written there is what it goes
    on with. source: names x; weights that are given the same x within one decode have the same source.
    """

    weight: str
    x: np.ndarray
    experts: np.ndarray | None
    y: np.ndarray
    source: int


class Observer(Protocol):
    """What is told of products."""

    def wants(self, weight: str) -> bool:
        """Whether the products of this weight are to be shown."""

    def see(self, product: Product) -> bool:
        """Looks at a product; False ends the decode there, and the logits of it are meaningless."""


class Watch:
    """The callback between llama.cpp and an observer. An error of the observer ends the decode; ``check`` raises it."""

    def __init__(self, lib: ctypes.CDLL, observer: Observer) -> None:
        lib.ggml_op_name.restype, lib.ggml_op_name.argtypes = ctypes.c_char_p, [c_int32]
        lib.ggml_backend_buffer_is_host.restype = c_bool
        lib.ggml_backend_buffer_is_host.argtypes = [c_void_p]
        self._lib, self._observer = lib, observer
        self._error: BaseException | None = None
        self.callback = CALLBACK(self._called)

    def check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _called(self, pointer: Any, ask: bool, _: Any) -> bool:
        if self._error is not None:
            return False
        try:
            node = pointer.contents
            kind = (self._lib.ggml_op_name(node.op) or b"").decode()
            if kind not in ("MUL_MAT", "MUL_MAT_ID"):
                return not ask
            weight = _weight_name(node.src[0].contents)
            if ask:
                return self._is_activation(node.src[1].contents) and self._observer.wants(weight)
            return self._observer.see(self._product(node, weight, with_experts=kind == "MUL_MAT_ID"))
        except BaseException as error:  # ctypes would print it and go on
            self._error = error
            return False

    def _is_activation(self, x: Tensor) -> bool:
        return x.type == _F32 and x.nb[0] == 4

    def _product(self, node: Tensor, weight: str, *, with_experts: bool) -> Product:
        x, y = self._view(node.src[1].contents), self._view(node)
        source = ctypes.addressof(node.src[1].contents)
        if with_experts:
            ids = self._view(node.src[2].contents)
            return Product(weight, x[0], ids[0, 0], y[0], source)
        flat = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return Product(weight, flat[0], None, flat[1], source)

    def _view(self, tensor: Tensor) -> np.ndarray:
        """Its values, slowest dimension first, not copied."""
        shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
        dtype = {_F32: np.float32, _I32: np.int32}.get(tensor.type)
        if dtype is None or min(shape) < 1 or strides[-1] != 4 or not tensor.data:
            raise RuntimeFailed("llama.cpp's tensors are laid out differently from what lowbit was written for")
        if tensor.buffer and not self._lib.ggml_backend_buffer_is_host(tensor.buffer):
            raise RuntimeFailed("activations can be watched in the CPU's memory only", hint="Run without the GPU")
        n_bytes = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 4
        memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
        return np.ndarray(shape, dtype, memory, strides=strides)


def _weight_name(tensor: Tensor) -> str:
    """The file's name of a weight: CPU#blk.0.attn_k.weight#0 is a copy of blk.0.attn_k.weight."""
    name = tensor.name.decode("utf-8", "surrogateescape")
    return name.split("#")[1] if "#" in name else name
