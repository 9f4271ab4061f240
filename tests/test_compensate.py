"""Error-compensated rounding: less loss than rounding weight by weight, and blocks that the file holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowbit import ggml
from lowbit import grid as grids
from lowbit.compensate import Moments, can_compensate, compensate, compensate_together, loss, moments_of

KNOWN = [name for name in grids.names() if can_compensate(grids.get(name))]


def inputs(n: int, seed: int = 0) -> np.ndarray:
    """Second moments (n, n) of inputs that hang together and of which some are large."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((2 * n, n // 4)) @ rng.standard_normal((n // 4, n))
    x = mixed + 0.5 * rng.standard_normal((2 * n, n))
    x *= np.exp(0.5 * rng.standard_normal(n))
    return (x.T @ x / len(x)).astype(np.float32)


def weights(rows: int, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32) * np.float32(0.05)


def test_the_factor_is_one() -> None:
    moments = moments_of(inputs(64))
    assert (np.tril(moments.upper, -1) == 0).all()
    assert np.allclose(moments.upper @ moments.upper.T, moments.values, rtol=1e-4, atol=1e-5 * moments.values.max())


def test_formats_with_scales_are_known() -> None:
    assert set(KNOWN) == {"q2_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"}


@pytest.mark.parametrize("name", KNOWN)
def test_the_output_changes_less(name: str) -> None:
    """Than with the format's own rounding, and than with ggml's under the same importance."""
    grid, w = grids.get(name), weights(24, 512)
    moments = moments_of(inputs(512))
    ours = loss(w, grid.dequantize(compensate(w, moments, grid)), moments)
    importance = np.ascontiguousarray(moments.values.diagonal())
    for weighted in (None, importance):
        theirs = ggml.dequantize(ggml.quantize(w, grid.ggml_type, weighted), grid.ggml_type, w.shape[1])
        assert ours.sum() < 0.75 * loss(w, theirs, moments).sum()


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_are_what_the_file_holds(name: str) -> None:
    grid, w = grids.get(name), weights(3, 512)
    blocks = compensate(w, moments_of(inputs(512)), grid)
    raw = grid.pack(blocks)
    assert raw.shape == (3, 512 // grid.block_size * grid.block_bytes)
    assert (grid.dequantize(grid.unpack(raw)) == grid.dequantize(blocks)).all()
    assert (ggml.dequantize(raw, grid.ggml_type, 512) == grid.dequantize(blocks)).all()


def test_rows_do_not_depend_on_each_other() -> None:
    grid, w, moments = grids.get("q4_0"), weights(9, 128), moments_of(inputs(128))
    whole = grid.pack(compensate(w, moments, grid))
    assert (grid.pack(compensate(w[4:], moments, grid)) == whole[4:]).mean() > 0.999  # sums in another order


def kld(slopes: np.ndarray, errors: np.ndarray, moments: Moments) -> float:
    """tr(G E H E^T)"""
    return float(np.einsum("ij,ij->", slopes @ errors, errors @ moments.values, dtype=np.float64))


@pytest.mark.parametrize("name", ["q4_0", "q4_k"])
@pytest.mark.parametrize("rows", [7, 160, 256])
def test_rows_that_are_told_of_each_others_errors_cause_less_together(name: str, rows: int) -> None:
    grid, w, moments, slopes = grids.get(name), weights(rows, 256), moments_of(inputs(256)), inputs(rows, seed=5)
    alone = w - grid.dequantize(compensate(w, moments, grid))
    blocks = compensate_together(w, moments, slopes, grid)
    together = w - grid.dequantize(blocks)
    assert grid.pack(blocks).shape == (rows, 256 // grid.block_size * grid.block_bytes)
    if rows <= 64:  # one group, of which nobody waits for another
        assert np.array_equal(alone, together)
        return
    assert kld(slopes, together, moments) < 0.8 * kld(slopes, alone, moments)
    assert kld(np.eye(rows, dtype=np.float32), together, moments) > kld(np.eye(rows), alone, moments)  # what it costs


def test_rows_whose_slopes_are_apart_are_rounded_alone() -> None:
    grid, w, moments = grids.get("q4_0"), weights(160, 128), moments_of(inputs(128))
    slopes = np.diag(np.random.default_rng(0).random(160).astype(np.float32))
    alone, together = compensate(w, moments, grid), compensate_together(w, moments, slopes, grid)
    assert (grid.pack(alone) == grid.pack(together)).mean() > 0.999  # sums in another order
    nothing = compensate_together(w, moments, np.zeros((160, 160), np.float32), grid)
    assert (grid.pack(alone) == grid.pack(nothing)).mean() > 0.999


def test_no_single_step_is_better() -> None:
    """In a small block each code, one step up or down, is tried: the local search has left nothing so easy."""
    grid, w, moments = grids.get("q4_0"), weights(16, 32), moments_of(inputs(32), 0.1)
    blocks = compensate(w, moments, grid)
    assert blocks.scales is not None
    least = loss(w, grid.dequantize(blocks), moments)
    better = 0
    for i, step in itertools.product(range(32), (1, -1)):
        codes = blocks.codes.copy()
        codes[..., i] = np.clip(codes[..., i] + step, -8, 7)
        tried = (codes * blocks.scales[..., None].astype(np.float32)).reshape(w.shape)
        better += int((loss(w, tried, moments) < least * 0.98).sum())
    assert better <= 16  # of 1,024


def test_independent_inputs_leave_each_weight_to_itself() -> None:
    """With a diagonal H no error can be taken back: each code is the nearest on its block's scale."""
    grid, w = grids.get("q4_0"), weights(8, 64)
    moments = moments_of(np.diag(np.linspace(0.5, 2, 64)).astype(np.float32), 0.0)
    blocks = compensate(w, moments, grid)
    assert blocks.scales is not None
    assert (grid.encode(w, blocks.scales).codes == blocks.codes).all()


@pytest.mark.parametrize("name", KNOWN)
def test_zeros_and_extremes(name: str) -> None:
    grid = grids.get(name)
    w = np.zeros((3, 256), np.float32)
    w[1] = 6e4 * weights(1, 256)[0]
    w[2] = 1e-9 * weights(1, 256)[0]
    values = grid.dequantize(compensate(w, moments_of(inputs(256)), grid))
    assert np.isfinite(values).all()
    assert (values[0] == 0).all()
    assert (np.abs(values[2]) < 1e-6).all()


def test_inputs_never_seen() -> None:
    """Columns that were always zero, and a model whose tokens are fewer than its width."""
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    x[:, 10:40] = 0
    moments = moments_of(x.T @ x / 5)
    assert isinstance(moments, Moments)
    grid, w = grids.get("q4_0"), weights(4, 64)
    values = grid.dequantize(compensate(w, moments, grid))
    assert np.abs(values - w).max() < 0.1
