"""Calibrated rounding never loses to the format's own, and is GPTQ where it says that it is."""

from __future__ import annotations

import pytest
import torch

from lowbit import grid as grids
from lowbit.grid.base import Blocks, Grid
from lowbit.train.calibrate import compensate, search_scales

ROWS, WIDTH = 24, 192  # more columns than are rounded at a time, and than a block holds
DAMPING = 0.01


@pytest.fixture
def weight() -> torch.Tensor:
    """Heavy-tailed weights, some blocks of zeros and some of a single weight among them."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, ROWS, WIDTH, generator=generator)
    weight = 0.02 * normal[0] / (0.3 + normal[1].square() + normal[2].square()).sqrt()
    weight[0, :64] = 0
    weight[1, :64] = 0
    weight[1, 5], weight[1, 40] = 0.5, -0.5
    return weight


@pytest.fixture
def importance() -> torch.Tensor:
    """Inputs of very different sizes, as after a norm: mean squares over four decades."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).mul(2).exp()


@pytest.fixture
def moments() -> torch.Tensor:
    """Second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(2)
    few = torch.randn(1000, WIDTH // 8, generator=generator) @ torch.randn(WIDTH // 8, WIDTH, generator=generator)
    x = few + 0.3 * torch.randn(1000, WIDTH, generator=generator)
    return x.T @ x / len(x)


def weighted_error(
    weight: torch.Tensor, values: torch.Tensor, importance: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Of each block: (rows, n_blocks) float64."""
    error = (values.double() - weight.double()).square() * importance.double()
    return error.reshape(len(weight), -1, block_size).sum(-1)


def output_error(weight: torch.Tensor, values: torch.Tensor, moments: torch.Tensor) -> float:
    """tr(E H E^T): the mean square error of the outputs, summed over them."""
    e = (values - weight).double()
    return float((e @ moments.double() * e).sum())


def gptq_codes(weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ as its paper derives it: after each column the inverse loses that row and column by elimination. float64."""
    h = moments.double() + DAMPING * moments.double().diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    inverse, rest = torch.linalg.inv(h), weight.double().clone()
    d = scales.double().repeat_interleave(grid.block_size, 1)
    codes = torch.empty_like(rest)
    for c in range(WIDTH):
        ratio = torch.where(d[:, c] == 0, 0.0, rest[:, c] / d[:, c])
        codes[:, c] = ratio.round().clamp(grid.min_code, grid.max_code)
        error = (rest[:, c] - codes[:, c] * d[:, c]) / inverse[c, c]
        rest -= error[:, None] * inverse[c]
        inverse = inverse - inverse[:, c : c + 1] @ inverse[c : c + 1] / inverse[c, c]
        inverse[c, c] = 1.0  # a row of its own from here on
    return codes


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
def test_no_block_ends_up_worse_than_nearest(name: str, weight: torch.Tensor, importance: torch.Tensor) -> None:
    grid = grids.get(name)
    weight[2] *= 1e-4  # its scales are among the last that float16 has
    scales = search_scales(weight, importance, grid)
    assert scales.dtype == torch.float16
    assert scales.shape == (ROWS, WIDTH // grid.block_size)
    assert torch.isfinite(scales).all()
    ours = weighted_error(weight, grid.dequantize(grid.encode(weight, scales)), importance, grid.block_size)
    nearest = weighted_error(weight, grid.dequantize(grid.quantize(weight)), importance, grid.block_size)
    assert (ours <= nearest * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * nearest.sum()


def test_scales_are_weighted_least_squares_of_their_codes(weight: torch.Tensor, importance: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    weight = weight[2:]  # without the blocks of zeros
    scales = search_scales(weight, importance, grid)
    codes = grid.encode(weight, scales).codes.double()
    counted = importance.double().reshape(1, -1, 32) * codes
    fitted = (counted * weight.double().reshape(codes.shape)).sum(-1) / (counted * codes).sum(-1)
    # Where a code changed after the fit the fit is that of the codes before; those are the fewer.
    as_fitted = (fitted / scales.double() - 1).abs() < 2**-10
    assert as_fitted.float().mean() > 0.5


def test_what_is_on_the_grid_already_stays(importance: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (ROWS, WIDTH // 32, 32), generator=generator).to(torch.int8)
    codes[..., 0] = -8
    scales = (0.01 + torch.rand(ROWS, WIDTH // 32, generator=generator)).half()
    weight = (codes * scales.float().unsqueeze(-1)).reshape(ROWS, WIDTH)
    found = search_scales(weight, importance, grid)
    assert torch.equal(grid.dequantize(grid.encode(weight, found)), weight)


def test_the_search_tries_both_signs(weight: torch.Tensor, importance: torch.Tensor) -> None:
    """The code range is not symmetric: a mirrored weight finds as good a scale only where its sign is mirrored too."""
    grid = grids.get("q4_0")
    ours, mirrored = (
        weighted_error(w, grid.nearest_values(w, search_scales(w, importance, grid)), importance, 32)
        for w in (weight, -weight)
    )
    torch.testing.assert_close(ours, mirrored, rtol=1e-6, atol=0.0)


def test_the_search_minds_what_is_important(weight: torch.Tensor, importance: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    aware = grid.nearest_values(weight, search_scales(weight, importance, grid))
    unaware = grid.nearest_values(weight, search_scales(weight, torch.ones(WIDTH), grid))
    for counts, better, worse in ((importance, aware, unaware), (torch.ones(WIDTH), unaware, aware)):
        least = weighted_error(weight, better, counts, 32).sum()
        assert least < 0.97 * weighted_error(weight, worse, counts, 32).sum()


def test_compensation_lowers_the_output_error(weight: torch.Tensor, moments: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    scales = search_scales(weight, moments.diagonal(), grid)
    moved = compensate(weight, Blocks(codes=None, scales=scales), moments, grid, DAMPING)
    assert moved.shape == weight.shape and moved.dtype == torch.float32
    nearest = output_error(weight, grid.nearest_values(weight, scales), moments)
    assert output_error(weight, grid.nearest_values(moved, scales), moments) < 0.6 * nearest


def test_compensation_is_gptq(weight: torch.Tensor, moments: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    scales = search_scales(weight, moments.diagonal(), grid)
    moved = compensate(weight, Blocks(codes=None, scales=scales), moments, grid, DAMPING)
    got = grid.encode(moved, scales).codes.reshape(ROWS, WIDTH)
    expected = gptq_codes(weight, scales, moments, grid)
    # A weight near the middle of two codes may fall to the other side in float32, and its row with it from there on.
    whole_rows = (got == expected).all(1)
    assert whole_rows.float().mean() >= 0.75
    values = expected.float() * scales.float().repeat_interleave(32, 1)
    ours = output_error(weight, grid.nearest_values(moved, scales), moments)
    assert ours == pytest.approx(output_error(weight, values, moments), rel=0.02)


def test_independent_inputs_need_no_compensation(weight: torch.Tensor) -> None:
    grid = grids.get("q4_0")
    scales = grid.quantize(weight).scales
    given = weight.clone()
    assert torch.equal(compensate(weight, Blocks(codes=None, scales=scales), torch.eye(WIDTH), grid, DAMPING), weight)
    assert torch.equal(weight, given)
