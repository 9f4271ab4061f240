"""Rounding by bits is rounding: what is said to reproduce a block does, and what does is never missed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from lowbit.pack import scale_range

Rounded = Callable[[np.ndarray, str], np.ndarray]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("exponent", [-120, -60, -30, -24, -15, -8, 0, 12, 100])
def test_reproduces_is_rounding_to_nearest_even(rounded: Rounded, dtype: str, exponent: int) -> None:
    """Every block of one weight: the product's own rounding, and the numbers of the dtype around it. Codes of 3 and 7
    on scales of few bits make ties, which are what differs between roundings."""
    rng = np.random.default_rng(exponent + 200)
    n = 4000
    bits = rng.choice([4, 8, 11, 24], n)
    scales = np.ldexp(np.floor(rng.uniform(1, 2, n) * 2.0**bits) / 2.0**bits, exponent).astype(np.float32)
    scales *= rng.choice(np.float32([-1, 1]), n)
    codes = rng.integers(-8, 8, n).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = rounded(codes * scales, dtype)
        finite = np.isfinite(wanted)
        step = {"BF16": 1 << 16, "F16": 1 << 13, "F32": 1}[dtype]
        moved = (wanted.view(np.uint32) + (rng.integers(-1, 2, n) * step).astype(np.uint32)).view(np.float32)
        w = np.where(finite & np.isfinite(moved), rounded(np.where(np.isfinite(moved), moved, 0), dtype), np.float32(0))
        expected = np.isfinite(w) & (wanted == w)
        w = np.where(np.isfinite(w), w, np.float32(0))
        found = scale_range.reproduces(w[None], codes[None], scales, dtype)
        hits = scale_range.hits(scale_range.target(w[None], dtype), codes[None], scales, dtype)
    np.testing.assert_array_equal(found, expected & (np.abs(scales) < 2.0**120))
    assert not (hits & ~found).any()
    assert expected.any() and (dtype == "F16" or not expected.all())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_all_weights_of_a_block_must_agree(rounded: Rounded, dtype: str) -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (32, 500)).astype(np.float32)
    scales = rng.uniform(1e-3, 1e-2, 500).astype(np.float16)
    w = rounded(codes * scales.astype(np.float32), dtype)
    assert scale_range.reproduces(w, codes, scales, dtype).all()
    assert scale_range.reproduces(np.where(w == 0, -w, w), codes, scales, dtype).all()  # 0.0 is -0.0
    at = (rng.integers(0, 32, 500), np.arange(500))
    w[at] = rounded(w[at] + np.copysign(np.float32(2e-3), w[at]), dtype)
    assert not scale_range.reproduces(w, codes, scales, dtype).any()
    w[:, ::2] = rounded(codes * scales.astype(np.float32), dtype)[:, ::2]
    assert (scale_range.reproduces(w, codes, scales, dtype) == (np.arange(500) % 2 == 0)).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_range_of_scales_ends_where_rounding_does(rounded: Rounded, dtype: str) -> None:
    """Just inside of the interval every weight is given back, just outside one is not."""
    rng = np.random.default_rng(6)
    codes = rng.integers(-8, 8, (32, 300)).astype(np.float32)
    codes[0] = 7
    full = rng.uniform(1e-3, 1e-2, 300).astype(np.float32)
    w = rounded(codes * full, dtype)
    low, high = scale_range.scale_range(w, codes, dtype)
    assert (low <= full).all() and (full <= high).all()
    width = (high - low).astype(np.float64)
    inside = [(low + width * share).astype(np.float64) for share in (0.01, 0.5, 0.99)]
    outside = [low - width * 0.2, high + width * 0.2]
    for scales, expected in ((inside, True), (outside, False)):
        for each in scales:
            products = codes.astype(np.float64) * each
            # In float64, as an interval may be narrower than a step of float32.
            back = np.abs(products - w) <= np.abs(scale_range._rounding_range(np.abs(w), dtype)[1] - np.abs(w)) * 1.0001
            if dtype != "F32":
                assert (rounded(products.astype(np.float32), dtype) == w).all(0).mean() == pytest.approx(
                    float(expected), abs=0.05
                )
            assert not expected or back.all()


def test_values_near_the_end_of_float32_are_no_warning() -> None:
    """Found by fuzzing: the sum of code times value is beyond float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w, codes = np.full((32, 1), 3e38, np.float32), np.full((32, 1), 7, np.float32)
        assert not np.isfinite(scale_range.least_squares(w, codes))
