"""Lattice recovery on every grid that training may have used, and blocks worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lowbit import grid as grids
from lowbit.errors import BadFile
from lowbit.grid.base import Blocks
from lowbit.pack import identify, lattice

Q4_0 = grids.get("q4_0")
RULES = ("extremum/-8", "absmax/7", "absmax/7.5", "free scales")
ROW = 512
Synthesised = Callable[..., np.ndarray]


def recovered(values: np.ndarray, dtype: str, name: str = "q4_0") -> tuple[Blocks, np.ndarray]:
    """What recover gives, with the statuses that judge gives for it."""
    blocks, status = lattice.recover(values, dtype, grids.get(name))
    np.testing.assert_array_equal(lattice.judge(values, blocks, dtype), status)
    return blocks, status


@pytest.mark.parametrize("group", [32, 64, 128, 256, ROW])
@pytest.mark.parametrize("scales", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", RULES)
def test_every_block_is_found(
    synthesised: Synthesised, rounded: Callable[..., np.ndarray], rule: str, dtype: str, scales: str, group: int
) -> None:
    values = synthesised(np.random.default_rng(group), (96, ROW), rule=rule, scales=scales, group=group, dtype=dtype)
    blocks, status = recovered(values, dtype)
    assert (status == lattice.EXACT).all()
    assert blocks.codes.shape == (96, ROW // 32, 32) and blocks.codes.dtype == np.int8
    assert blocks.scales.shape == status.shape == (96, ROW // 32) and blocks.scales.dtype == np.float16
    raw = Q4_0.pack(blocks)
    np.testing.assert_array_equal(rounded(Q4_0.dequantize(Q4_0.unpack(raw)), dtype), values)


@pytest.mark.parametrize("rule", RULES)
def test_float32_scales_give_the_best_float16_ones(synthesised: Synthesised, rule: str) -> None:
    """Of the codes that training used, no other float16 scale is nearer, and the rest of the blocks is listed."""
    values = synthesised(np.random.default_rng(1), (96, ROW), rule=rule, scales="F32", group=32, dtype="F32")
    blocks, status = recovered(values, "F32")
    assert (status != lattice.OFF_LATTICE).all()
    assert (status == lattice.WITHIN_SCALE_ROUNDING).mean() > 0.95
    w, codes = values.reshape(blocks.codes.shape).astype(np.float64), blocks.codes.astype(np.float64)

    def error(scales: np.ndarray) -> np.ndarray:
        return ((w - codes * scales.astype(np.float64)[..., None]) ** 2).sum(-1)

    for towards in (np.float16(np.inf), np.float16(-np.inf)):
        assert (error(blocks.scales) <= error(np.nextafter(blocks.scales, towards)) * (1 + 1e-3)).all()


@pytest.mark.parametrize("rule", RULES)
def test_float32_scales_behind_bf16_values_are_mostly_exact(synthesised: Synthesised, rule: str) -> None:
    values = synthesised(np.random.default_rng(2), (256, ROW), rule=rule, scales="F32", group=32, dtype="BF16")
    _, status = recovered(values, "BF16")
    assert (status == lattice.EXACT).mean() > 0.95
    assert (status != lattice.OFF_LATTICE).mean() > 0.999


@pytest.mark.parametrize("exponent", [-17, -16, -14, -8, 0, 10, 15])
def test_every_bf16_scale_that_float16_holds(rounded: Callable[..., np.ndarray], exponent: int) -> None:
    rng = np.random.default_rng(exponent + 100)
    scales = np.ldexp(1 + rng.integers(0, 128, (512, 1)) / 128, exponent).astype(np.float32)
    codes = rng.integers(-8, 8, (512, 32)).astype(np.float32)
    _, status = recovered(rounded(codes * scales, "BF16"), "BF16")
    assert (status == lattice.EXACT).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_no_lattice(rounded: Callable[..., np.ndarray], dtype: str) -> None:
    """Ordinary weights get a rounding that is no worse than ggml's in any block, and no certificate."""
    values = rounded(np.random.default_rng(3).standard_normal((64, ROW), dtype=np.float32), dtype)
    blocks, status = recovered(values, dtype)
    assert (status == lattice.OFF_LATTICE).all()
    naive = Q4_0.quantize(values)

    def error(blocks: Blocks) -> np.ndarray:
        return ((Q4_0.dequantize(blocks) - values).reshape(64, -1, 32) ** 2).sum(-1)

    assert (error(blocks) <= error(naive) * (1 + 1e-5)).all()
    assert error(blocks).sum() < error(naive).sum()


def test_one_weight_off(synthesised: Synthesised) -> None:
    values = synthesised(np.random.default_rng(4), (32, ROW), rule="absmax/7", scales="BF16", group=32, dtype="BF16")
    at = np.abs(values[5, 64:96]).argmin() + 64
    values[5, at] = np.abs(values[5, 64:96]).max() / 7 / 2  # half a step: no code has it
    _, status = recovered(lattice.round_to(values, "BF16"), "BF16")
    assert status[5, 2] == lattice.OFF_LATTICE
    assert (status == lattice.EXACT).sum() == status.size - 1


def test_a_block_worked_by_hand() -> None:
    # absmax/7 on a scale of 0.5: the extremum 3.5 has code 7, which ggml's rule makes -8 on a scale of -0.4375.
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = [3.5, -0.5, 1.0, -3.0]
    assert lattice.judge(x, Q4_0.quantize(x), "BF16").tolist() == [[lattice.OFF_LATTICE]]
    blocks, status = recovered(x, "BF16")
    assert status.tolist() == [[lattice.EXACT]]
    assert (blocks.codes[0, 0, :4] * blocks.scales[0, 0]).tolist() == [3.5, -0.5, 1.0, -3.0]
    assert np.abs(blocks.codes[0, 0, :4]).tolist() == [7, 1, 2, 6]
    # Both ends of one magnitude: there is no code 8, so the lattice must be 7 or less on each side.
    x[0, :2] = [4.0, -4.0]
    blocks, status = recovered(x, "BF16")
    assert status.tolist() == [[lattice.EXACT]] and np.abs(blocks.codes).max() == 4


def test_zeros_are_exact() -> None:
    for x in (np.zeros((2, 64), np.float32), -np.zeros((2, 64), np.float32)):
        blocks, status = recovered(x, "F32")
        assert (status == lattice.EXACT).all() and not blocks.codes.any()


def test_a_scale_that_float16_flushes_to_zero_is_no_rounding() -> None:
    x = np.arange(-8, 24, dtype=np.float32).reshape(1, 32) % 8 * np.float32(2.0**-40)
    _, status = recovered(x, "BF16")
    assert status.tolist() == [[lattice.OFF_LATTICE]]


def test_judge_takes_nothing_for_granted() -> None:
    """Codes and scales of a stranger: each defect on its own."""
    codes = (np.arange(32, dtype=np.int8) % 16 - 8).reshape(1, 1, 32)
    scales = np.array([[0.5]], np.float16)
    x = codes.reshape(1, 32) * np.float32(0.5)
    assert lattice.judge(x, Blocks(codes=codes, scales=scales), "F32").item() == lattice.EXACT
    near = x * (1 + np.float32(2.0**-13))  # a scale between two of float16
    assert lattice.judge(near, Blocks(codes=codes, scales=scales), "F32").item() == lattice.WITHIN_SCALE_ROUNDING
    off = np.where(codes.reshape(1, 32) == 3, near, x)  # two scales in one block
    assert lattice.judge(off, Blocks(codes=codes, scales=scales), "F32").item() == lattice.OFF_LATTICE
    nothing, infinite = np.zeros_like(scales), np.full_like(scales, np.inf)
    for wrong in (-scales, scales * 2, np.nextafter(scales, np.float16(2)), nothing, infinite):
        assert lattice.judge(x, Blocks(codes=codes, scales=wrong), "F32").item() == lattice.OFF_LATTICE
    other = codes.copy()
    other[0, 0, 31] -= 1
    assert lattice.judge(x, Blocks(codes=other, scales=scales), "F32").item() == lattice.OFF_LATTICE


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "q8_0"), ("F16", "q8_0"), ("F32", "q8_0")])
def test_q8_0_holds_a_4_bit_lattice(synthesised: Synthesised, dtype: str, name: str) -> None:
    values = synthesised(np.random.default_rng(6), (64, ROW), rule="absmax/7", scales="BF16", group=32, dtype=dtype)
    blocks, status = recovered(values, dtype, name)
    assert (status == lattice.EXACT).all()
    assert np.abs(blocks.codes).max() <= 127


def test_q8_0_of_its_own_lattice(rounded: Callable[..., np.ndarray]) -> None:
    grid = grids.get("q8_0")
    values = grid.dequantize(grid.quantize(np.random.default_rng(7).standard_normal((64, ROW), dtype=np.float32)))
    for dtype in ("F32", "F16"):
        assert (recovered(rounded(values, dtype), dtype, "q8_0")[1] == lattice.EXACT).mean() > 0.99


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, 40] = bad
    with pytest.raises(BadFile, match="not finite"):
        lattice.recover(x, "BF16", Q4_0)


def test_bf16_saved_as_f32_is_known(rounded: Callable[..., np.ndarray]) -> None:
    x = np.random.default_rng(8).standard_normal((4, 64), dtype=np.float32)
    assert lattice.precision(x, "F32") == "F32"
    assert lattice.precision(rounded(x, "BF16"), "F32") == "BF16"
    assert lattice.precision(rounded(x, "BF16"), "F16") == "F16"
    assert lattice.precision(rounded(x, "BF16"), "Q4_1") == "F32"


# Which lattice it is


@pytest.mark.parametrize("group", [32, 64, 128, 256, ROW])
@pytest.mark.parametrize("scales", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", RULES)
def test_the_lattice_is_named(synthesised: Synthesised, rule: str, scales: str, group: int) -> None:
    values = synthesised(np.random.default_rng(9), (128, ROW), rule=rule, scales=scales, group=group, dtype="BF16")
    where = "a scale a row" if group == ROW else f"group {group}"
    assert identify.describe(values, "BF16") == f"q4_0 {rule}, {scales.lower()} scales, {where}"
    assert identify.describe(values, "F32") == f"q4_0 {rule}, {scales.lower()} scales, {where}"


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("scales", ["BF16", "F16", "F32"])
def test_the_lattice_of_finer_values_is_named(synthesised: Synthesised, scales: str, dtype: str) -> None:
    values = synthesised(np.random.default_rng(10), (128, ROW), rule="absmax/7", scales=scales, group=128, dtype=dtype)
    assert identify.describe(values, dtype) == f"q4_0 absmax/7, {scales.lower()} scales, group 128"


def test_no_lattice_is_named_none(rounded: Callable[..., np.ndarray]) -> None:
    x = np.random.default_rng(11).standard_normal((64, ROW), dtype=np.float32)
    for values in (x, rounded(x, "BF16"), np.zeros_like(x), np.full_like(x, np.nan), x[:, :48], x[:0]):
        assert identify.describe(values, "F32") == "none"


def test_a_lattice_with_exceptions_says_so(synthesised: Synthesised) -> None:
    rng = np.random.default_rng(12)
    values = synthesised(rng, (100, 256), rule="extremum/-8", scales="BF16", group=32, dtype="BF16")
    values[::25] = lattice.round_to(rng.standard_normal((4, 256), dtype=np.float32), "BF16")
    assert identify.describe(values, "BF16") == "q4_0 extremum/-8, bf16 scales, group 32, 96.0% of blocks"


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (7, 64), (5000, 576), (262_144, 640)])
def test_a_sample_is_rows_in_order(rows: int, n: int) -> None:
    picked = identify.sample(rows, n)
    assert (np.diff(picked) > 0).all() and picked[0] >= 0 and picked[-1] == rows - 1
    assert len(picked) >= min(rows, 16)
    assert len(picked) * n <= max(16 * n, (1 << 16) + n)
