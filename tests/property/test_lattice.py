"""Lattice recovery on any block: a certified one is what it is said to be, and one on a lattice is always found."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowbit import grid as grids
from lowbit.grid.base import Blocks
from lowbit.pack import lattice

DTYPES = ("BF16", "F16", "F32")
Rounded = Callable[[np.ndarray, str], np.ndarray]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -7.0, 8.0, -8.0, 7.5, 2.0**-14, -(2.0**-24)])


def check(values: np.ndarray, dtype: str, rounded: Rounded, name: str = "q4_0") -> np.ndarray:
    """Holds every certified block to its word, with a rounding of the tests' own, and gives the statuses."""
    grid = grids.get(name)
    blocks, status = lattice.recover(values, dtype, grid)
    np.testing.assert_array_equal(lattice.judge(values, blocks, dtype), status)
    assert blocks.codes.min() >= grid.min_code and blocks.codes.max() <= grid.max_code
    stored = grid.dequantize(grid.unpack(grid.pack(blocks)))
    exact = np.repeat(status == lattice.EXACT, grid.block_size, axis=1)
    back = np.where(exact, rounded(np.where(exact, stored, np.float32(0)), dtype), values)
    # + 0.0 makes 0.0 of -0.0, the one difference that is none.
    np.testing.assert_array_equal((back + np.float32(0)).view(np.uint32), (values + np.float32(0)).view(np.uint32))
    check_within(values, blocks, status, dtype, rounded)
    return status


def check_within(values: np.ndarray, blocks: Blocks, status: np.ndarray, dtype: str, rounded: Rounded) -> None:
    """Each such block by itself: the bound holds for every weight, and a float32 scale reproduces the block."""
    w = values.reshape(blocks.codes.shape)
    for at in zip(*np.nonzero(status == lattice.WITHIN_SCALE_ROUNDING), strict=True):
        codes, scale, x = blocks.codes[at].astype(np.float64), float(blocks.scales[at]), w[at].astype(np.float64)
        step = 2.0 ** (max(math.frexp(scale)[1] - 1, -14) - 10)
        own = (next_magnitudes(np.abs(w[at]), dtype)[1] - np.abs(x)) / 2
        assert scale != 0
        assert (np.abs(x - codes * scale) <= np.abs(codes) * step / 2 + own).all()
        assert any_scale(w[at], codes, dtype, rounded)


def next_magnitudes(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of ``dtype`` below (0 below 0) and above each x >= 0 of it, float64."""
    if dtype == "BF16":
        bits = x.view(np.uint32).astype(np.int64)
        below, above = (b.astype(np.uint32).view(np.float32) for b in ((bits - (1 << 16)).clip(0), bits + (1 << 16)))
    else:
        kind = np.float16 if dtype == "F16" else np.float32
        below, above = (np.nextafter(x.astype(kind), kind(end)) for end in (0, np.inf))
    return below.astype(np.float64), above.astype(np.float64)


def any_scale(w: np.ndarray, codes: np.ndarray, dtype: str, rounded: Rounded) -> bool:
    """Whether a float32 scale gives w back. The scales that do are an interval that begins where some weight's own
    does, so it is enough to try float32 numbers around every such end, and between the ends."""
    used = codes != 0
    x, q = np.abs(w[used]), np.abs(codes[used])
    ends = np.sort(np.concatenate([(x + near) / 2 / q for near in next_magnitudes(x, dtype)]))
    tried = np.concatenate([ends, (ends[1:] + ends[:-1]) / 2]).astype(np.float32)
    bits = tried.view(np.uint32).astype(np.int64)[:, None] + np.arange(-2, 3)
    scales = bits.clip(0, 2**31 - 1).astype(np.uint32).view(np.float32).reshape(-1)
    i = np.abs(w).argmax()
    scales = scales[np.isfinite(scales)] * np.float32(np.sign(w[i]) * np.sign(codes[i]))
    with np.errstate(over="ignore", invalid="ignore"):
        products = scales[:, None] * codes.astype(np.float32)
        return bool((rounded(products, dtype) == w).all(-1).any())


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(x=hnp.arrays(np.float32, (2, 64), elements=FLOATS, fill=FLOATS))
@settings(max_examples=60, deadline=None)
def test_any_finite_block(rounded: Rounded, dtype: str, name: str, x: np.ndarray) -> None:
    values = rounded(x, dtype)
    check(np.where(np.isfinite(values), values, np.float32(0)), dtype, rounded, name)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(x=hnp.arrays(np.float32, (2, 64), elements=FEW, fill=FEW), size=st.integers(-30, 10))
@settings(max_examples=60, deadline=None)
def test_blocks_of_few_values(rounded: Rounded, dtype: str, name: str, x: np.ndarray, size: int) -> None:
    """Zeros of both signs, ties, and what lies on several lattices at once."""
    check(rounded(np.ldexp(x, size), dtype), dtype, rounded, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["BF16", "F16"])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-17, 12), last=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_a_lattice_is_always_found(
    rounded: Rounded, scales: str, dtype: str, seed: int, exponent: int, last: int
) -> None:
    """Any codes up to ``last`` on any scale that float16 holds: every block is certified."""
    rng = np.random.default_rng(seed)
    if scales == "F16":
        exponent = max(exponent, -14)  # below, float16 has fewer digits
    steps = 128 if scales == "BF16" else 1024
    step = np.ldexp(1 + rng.integers(0, steps, (64, 1)) / steps, exponent) * rng.choice([-1, 1], (64, 1))
    codes = rng.integers(-last, min(last, 7) + 1, (64, 32))
    values = rounded((codes * step).astype(np.float32), dtype)
    assert (check(values, dtype, rounded) == lattice.EXACT).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-26, 12), moved=st.integers(-2, 2))
@settings(max_examples=60, deadline=None)
def test_float32_scales_and_a_weight_moved_by_a_step(
    rounded: Rounded, dtype: str, seed: int, exponent: int, moved: int
) -> None:
    """Where it is close, nothing is certified that is not so."""
    rng = np.random.default_rng(seed)
    step = np.ldexp(rng.uniform(1, 2, (8, 1)), exponent).astype(np.float32)
    values = rounded(rng.integers(-8, 8, (8, 32)).astype(np.float32) * step, dtype)
    bits = values.view(np.uint32)
    place = {"BF16": 1 << 16, "F16": 1 << 13, "F32": 1}[dtype]
    at = (np.arange(8), rng.integers(0, 32, 8))
    bits[at] = (bits[at].astype(np.int64) + moved * place).clip(0, 2**32 - 1).astype(np.uint32)
    values = rounded(np.where(np.isfinite(values), values, np.float32(0)), dtype)
    status = check(np.where(np.isfinite(values), values, np.float32(0)), dtype, rounded)
    if moved == 0 and exponent >= -12 and dtype == "F32":
        assert (status != lattice.OFF_LATTICE).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    x=hnp.arrays(np.int8, (1, 32), elements=st.integers(-8, 7)),
    codes=hnp.arrays(np.int8, (1, 32), elements=st.integers(-8, 7)),
    scale=st.floats(width=16, allow_nan=False, allow_infinity=False),
    same=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_any_foreign_block(
    rounded: Rounded, dtype: str, x: np.ndarray, codes: np.ndarray, scale: float, same: bool
) -> None:
    """judge of codes and a scale that have nothing, or all but a little of the scale, to do with the values."""
    stored = (x if same else codes).reshape(1, 1, 32)
    blocks = Blocks(codes=stored, scales=np.array([[scale]], np.float16))
    values = rounded(x * np.float32(scale * (1 + 2.0**-12)), dtype)
    values = np.where(np.isfinite(values), values, np.float32(0))
    status = lattice.judge(values, blocks, dtype)
    back = rounded(grids.get("q4_0").dequantize(blocks), dtype)
    assert (status.item() == lattice.EXACT) == bool((back == values).all())
    check_within(values, blocks, status, dtype, rounded)
