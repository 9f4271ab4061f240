"""Any finite block: the bits that the library stores and computes with, in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from libraries import APART, DTYPES, held, rows_of, stored_apart, values

from lowbit import ggml, grid

WIDTH = 256
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BLOCK = hnp.arrays(np.float32, (2, WIDTH), elements=FLOATS, fill=FLOATS)


def _assert_same_bits(name: str, x: np.ndarray) -> None:
    chosen = grid.get(name)
    if name in APART:
        for dtype in DTYPES:
            _assert_same_parts(name, held(x, dtype), dtype)
        return
    expected = ggml.quantize(x, chosen.ggml_type)
    blocks = chosen.quantize(x)
    np.testing.assert_array_equal(chosen.pack(blocks), expected)
    np.testing.assert_array_equal(chosen.pack(chosen.quantize(torch.from_numpy(x))), expected)
    np.testing.assert_array_equal(chosen.pack(chosen.unpack(expected)), expected)
    _assert_same_values(chosen.dequantize(blocks), ggml.dequantize(expected, chosen.ggml_type, x.shape[1]))


def _assert_same_parts(name: str, x: np.ndarray, dtype: str) -> None:
    """Codes and scales in tensors of their own, the scales in the dtype of the weights."""
    chosen, expected = grid.get(name), stored_apart(name, x, dtype)
    for array in (x, torch.from_numpy(x)):
        blocks = chosen.quantize(array, dtype)
        scales = [np.asarray(part).astype(np.float32) for part in (blocks.scales, blocks.mins) if part is not None]
        np.testing.assert_array_equal(rows_of(chosen.pack_codes(blocks.codes), *scales), expected)
        _assert_same_values(np.asarray(chosen.dequantize(blocks)), values(name, blocks))


def _assert_same_values(values: np.ndarray, theirs: np.ndarray) -> None:
    real = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(values), ~real)
    np.testing.assert_array_equal(values[real].view(np.uint32), theirs[real].view(np.uint32))


@pytest.mark.parametrize("name", grid.names())
@given(x=BLOCK)
@settings(max_examples=60, deadline=None)
def test_any_finite_block(name: str, x: np.ndarray) -> None:
    _assert_same_bits(name, x)


@pytest.mark.parametrize("name", grid.names())
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-149, 120), steps=st.sampled_from([0, 3, 16, 127, 1000]))
@settings(max_examples=60, deadline=None)
def test_blocks_of_one_magnitude_with_and_without_ties(name: str, seed: int, exponent: int, steps: int) -> None:
    """steps > 0: multiples of one number, so that extremes and halves tie."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-steps, steps + 1, (16, WIDTH)) if steps else rng.standard_normal((16, WIDTH))
    with np.errstate(over="ignore"):
        scaled = np.ldexp(np.asarray(x, np.float32) * np.float32(rng.uniform(0.1, 1)), exponent)
    _assert_same_bits(name, np.where(np.isfinite(scaled), scaled, np.float32(0)))


@pytest.mark.parametrize("name", grid.names())
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), spread=st.floats(0, 40))
@settings(max_examples=60, deadline=None)
def test_groups_of_unlike_magnitudes(name: str, seed: int, share: float, spread: float) -> None:
    """Groups of 32 up to 2^spread apart, some of one value, some of one sign: what scales of two levels find hard."""
    rng = np.random.default_rng(seed)
    shape, group = (16, WIDTH // 32, 32), (16, WIDTH // 32, 1)
    x = rng.standard_normal(shape, dtype=np.float32)
    x = np.where(rng.random(group) < share, x, rng.standard_normal(group, dtype=np.float32))
    x = np.where(rng.random(group) < 0.2, -np.abs(x), x)
    x *= np.exp2(rng.uniform(-spread / 2, spread / 2, group)).astype(np.float32)
    _assert_same_bits(name, x.reshape(16, WIDTH))


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_a_code_beyond_what_ggmls_rounding_reads(name: str) -> None:
    """One group of almost equal weights beside large ones: its minimum is lost, and its codes come out past -2^22.

    Rounded and cut they would be 0. The C library reads bits that are none of that number's and stores the top code.
    """
    x = np.full((1, WIDTH), -3360, np.float32)
    x[0, 32:64] = -16 - np.arange(32, dtype=np.float32) * np.float32(2**-19)
    _assert_same_bits(name, x)
    assert (grid.get(name).quantize(x).codes[0, 0, 32:64] == grid.get(name).max_code).all()


@pytest.mark.parametrize("name", grid.names())
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_any_stored_bytes(name: str, seed: int) -> None:
    """Blocks that other tools wrote: the C library's values, and every byte comes back."""
    chosen = grid.get(name)
    raw = np.random.default_rng(seed).integers(0, 256, (8, chosen.row_bytes(WIDTH)), np.uint8)
    blocks = chosen.unpack(raw)
    np.testing.assert_array_equal(chosen.pack(blocks), raw)
    theirs = values(name, blocks) if name in APART else ggml.dequantize(raw, chosen.ggml_type, WIDTH)
    _assert_same_values(chosen.dequantize(blocks), theirs)


@pytest.mark.parametrize("name", grid.names())
def test_a_million_random_weights(name: str) -> None:
    _assert_same_bits(name, np.random.default_rng(3).standard_normal((1024, 1024), dtype=np.float32))
