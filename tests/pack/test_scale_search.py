"""Scales under an importance matrix: never worse than the format's rule, and near the best there is."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit import ggml
from lowbit import grid as grids
from lowbit.grid.base import Blocks, Grid
from lowbit.pack.scale_search import search

NAMES = ["q4_0", "q5_0", "q8_0"]


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = (0.02 * rng.standard_t(4, (48, 256))).astype(np.float32)
    values[0, :64] = 0
    values[1, :32], values[1, 5] = 0, 0.5
    values[2] *= np.float32(1e-7)  # scales that float16 hardly has
    values[3] *= np.float32(1e7)  # and some that it has not
    return values


@pytest.fixture
def importance() -> np.ndarray:
    importance = np.exp(2 * np.random.default_rng(1).standard_normal(256)).astype(np.float32)
    importance[64:96] = 0
    return importance


def searched(values: np.ndarray, importance: np.ndarray, grid: Grid) -> Blocks:
    start = grid.quantize(values)
    return search(values, importance, grid, start, np.ones(start.scales.shape, bool))


def error(values: np.ndarray, importance: np.ndarray, blocks: Blocks, grid: Grid) -> np.ndarray:
    with np.errstate(all="ignore"):
        difference = grid.dequantize(blocks).astype(np.float64) - values
        found = (difference**2 * importance).reshape(len(values), -1, grid.block_size).sum(-1)
    return np.where(np.isnan(found), np.inf, found)


@pytest.mark.parametrize("name", NAMES)
def test_no_block_is_worse_than_by_the_formats_own_rule(name: str, values: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get(name)
    found = error(values, importance, searched(values, importance, grid), grid)
    own = error(values, importance, grid.quantize(values), grid)
    assert (found <= own * (1 + 1e-5)).all()
    assert found[4:].sum() < 0.75 * own[4:].sum()


@pytest.mark.parametrize("name", NAMES)
def test_less_error_than_ggml_under_the_same_matrix(name: str, values: np.ndarray, importance: np.ndarray) -> None:
    grid, normal = grids.get(name), values[4:]
    theirs = grid.unpack(ggml.quantize(normal, grid.ggml_type, importance))
    ours = error(normal, importance, searched(normal, importance, grid), grid)
    assert ours.sum() < 0.97 * error(normal, importance, theirs, grid).sum()


def test_near_the_best_of_all_float16_scales(values: np.ndarray, importance: np.ndarray) -> None:
    """Every float16 number as a scale, with the nearest codes: what there is to reach."""
    grid, block, weights = grids.get("q4_0"), values[4:10, 96:128], importance[96:128]
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every) & (abs(every) < 0.2) & (abs(every) > 1e-4)]
    for row in block:
        tiled = np.broadcast_to(row, (len(every), 32)).copy()
        least = error(tiled, weights, grid.encode(tiled, every[:, None]), grid).min()
        found = error(row[None], weights, searched(row[None], weights, grid), grid)[0, 0]
        assert least <= found < 1.1 * least


def test_codes_are_the_nearest_or_the_formats_own(values: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get("q4_0")
    found = searched(values[4:], importance, grid)
    own = grid.quantize(values[4:])
    nearest = (found.codes == grid.encode(values[4:], found.scales).codes).all(-1)
    assert (nearest | ((found.codes == own.codes).all(-1) & (found.scales == own.scales))).all()


def test_blocks_that_are_not_named_stay(values: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get("q4_0")
    start = grid.quantize(values)
    where = np.random.default_rng(2).random(start.scales.shape) < 0.5
    found, whole = search(values, importance, grid, start, where), searched(values, importance, grid)
    for part in ("codes", "scales"):
        np.testing.assert_array_equal(getattr(found, part)[~where], getattr(start, part)[~where])
        np.testing.assert_array_equal(getattr(found, part)[where], getattr(whole, part)[where])


def test_a_block_of_no_importance_keeps_the_formats_rule(values: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get("q4_0")
    found, own = searched(values, importance, grid), grid.quantize(values)
    np.testing.assert_array_equal(found.scales[4:, 2], own.scales[4:, 2])


def test_only_ratios_of_importance_count(values: np.ndarray, importance: np.ndarray) -> None:
    grid = grids.get("q4_0")
    plain = searched(values, importance, grid)
    for factor in (2.0**-80, 2.0**60):
        scaled = searched(values, importance * np.float32(factor), grid)
        np.testing.assert_array_equal(plain.codes, scaled.codes)
