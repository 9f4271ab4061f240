"""What llama.cpp rounds while it runs, against the functions of the installed library that do it: the same bits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from lowbit import ggml, grid
from lowbit.errors import BadFile, BadOption, Unsupported
from lowbit.grid import _hadamard, _on_the_fly

Q8_K = 15
Q8_K_BYTES = 4 + 256 + 2 * 16  # a float32 scale, the codes, sums of 16 codes


class _CpuTraits(ctypes.Structure):
    """The head of ggml_type_traits_cpu (ggml-cpu.h)."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int32),
    )


def traits(ggml_type: int) -> _CpuTraits:
    function = ggml.library().ggml_get_type_traits_cpu
    function.restype, function.argtypes = ctypes.POINTER(_CpuTraits), [ctypes.c_int]
    found: _CpuTraits = function(ggml_type).contents
    return found


def copied(x: np.ndarray, ggml_type: int, row_bytes: int) -> np.ndarray:
    """What ggml's copy into a cache, or its preparation of a product, makes of rows (n, 256)."""
    out = np.zeros((len(x), row_bytes), np.uint8)
    from_float = traits(ggml_type).from_float
    for i in range(len(x)):
        from_float(x[i].ctypes.data, out[i].ctypes.data, x.shape[1])
    return out


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Heavy tails, many sizes, ties, halves, zeros of both signs, numbers close to zero."""
    rng = np.random.default_rng(0)
    x = (rng.standard_t(3, size=(2000, 256)) * np.exp(3 * rng.normal(size=(2000, 1)))).astype(np.float32)
    x[0] = 0
    x[1, :32] = -0.0
    x[2:60] = np.round(2 * x[2:60]) / 2
    x[60:70] = rng.choice([-1.0, 1.0], size=(10, 256))
    x[70] *= 1e-30
    x[71] = 127 * rng.integers(-2, 3, 256) / 2
    return x


@pytest.mark.parametrize("name", [name for name in _on_the_fly.CACHES if name != "f32"])
def test_a_cache_holds_these_bytes(name: str, rows: np.ndarray) -> None:
    chosen = grid.get(name)
    expected = copied(rows, ggml.type_of(chosen), ggml.row_bytes(256, ggml.type_of(chosen)))
    for x in (rows, torch.from_numpy(rows)):
        found = chosen.pack(_on_the_fly.cache_blocks(chosen, x))
        if name == "iq4_nl":  # of a block of zeros ggml leaves the codes as they were in memory
            empty = np.repeat((expected.reshape(-1, 18)[:, :2] == 0).all(-1), 18).reshape(found.shape)
            np.testing.assert_array_equal(np.where(empty, 0, found), np.where(empty, 0, expected))
        else:
            np.testing.assert_array_equal(found, expected)


def test_products_read_these_values(rows: np.ndarray) -> None:
    eight = grid.get("q8_0")
    expected = eight.dequantize(eight.unpack(copied(rows, 8, ggml.row_bytes(256, 8))))
    raw = copied(rows, Q8_K, Q8_K_BYTES)
    of_super_blocks = raw[:, :4].copy().view("<f4") * raw[:, 4:260].view(np.int8).astype(np.float32)
    for x in (rows, torch.from_numpy(rows)):
        np.testing.assert_array_equal(np.asarray(_on_the_fly.activations("q8_0", x)), expected)
        np.testing.assert_array_equal(np.asarray(_on_the_fly.activations("q8_1", x)), expected)
        np.testing.assert_array_equal(np.asarray(_on_the_fly.activations("q8_k", x)), of_super_blocks)


def test_four_rows_at_once_are_rounded_alike(rows: np.ndarray) -> None:
    """What repacked weights are multiplied by: the same codes, of four rows interleaved by eights."""
    function = ggml.library().ggml_quantize_mat_q8_0_4x8
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    four = np.ascontiguousarray(rows[100:104])
    out = np.zeros((8, 4 * 34), np.uint8)
    function(four.ctypes.data, out.ctypes.data, 256)
    scales = out[:, :8].copy().view("<f2").T  # (rows, blocks)
    codes = out[:, 8:].view(np.int8).reshape(8, 4, 4, 8).transpose(2, 0, 1, 3).reshape(4, 8, 32)
    found = _on_the_fly.eight_bit(four)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, scales)


@pytest.mark.parametrize("name", sorted(_on_the_fly.ACTIVATIONS))
def test_the_other_side_of_a_product_is_of_ggmls_type(name: str) -> None:
    kinds = {8: "q8_0", 9: "q8_1", Q8_K: "q8_k", 1: "f16", 30: "bf16"}
    assert _on_the_fly.ACTIVATIONS[name] == kinds[traits(ggml.type_of(grid.get(name))).vec_dot_type]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_rotation_is_its_own_inverse_and_the_matrix_it_says(width: int) -> None:
    x = np.random.default_rng(1).normal(size=(50, 256)).astype(np.float32)
    turned = _hadamard.rotate(x, width)
    np.testing.assert_array_equal(_hadamard.rotate(torch.from_numpy(x), width).numpy(), turned)
    np.testing.assert_allclose(_hadamard.rotate(turned, width), x, atol=2e-6)
    product = x.reshape(-1, width) @ _hadamard.matrix(width)
    np.testing.assert_allclose(turned.reshape(-1, width), product, atol=2e-5)


def test_which_heads_are_turned() -> None:
    keys = {32: None, 64: 64, 80: None, 96: None, 128: 128, 192: 64, 256: 256, 512: 512}
    assert {n: _hadamard.width_of_keys(n) for n in keys} == keys
    assert {n: _hadamard.width_of_values(n) for n in keys} == {n: 64 if n % 64 == 0 else None for n in keys}


def test_what_cannot_be_is_refused() -> None:
    x = np.ones((2, 256), np.float32)
    with pytest.raises(BadOption, match="no such KV cache type"):
        _on_the_fly.cache_blocks(grid.get("q4_k"), x)
    with pytest.raises(Unsupported, match="whole blocks"):
        _on_the_fly.activations("q8_k", x[:, :128])
    for kind in ("q8_0", "q8_k"):
        with pytest.raises(BadFile, match="not finite"):
            _on_the_fly.activations(kind, x * np.float32(np.nan))
