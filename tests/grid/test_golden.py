"""Every grid against the blocks that the C library stored: zero differing bits, in numpy and in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit import ggml, grid

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.load(GOLDEN / "inputs.npy")


@pytest.mark.parametrize("name", grid.names())
def test_quantize_stores_what_ggml_stores(name: str, inputs: np.ndarray) -> None:
    chosen, golden = grid.get(name), np.load(GOLDEN / f"{name}.npy")
    from_numpy, from_torch = chosen.quantize(inputs), chosen.quantize(torch.from_numpy(inputs))
    np.testing.assert_array_equal(chosen.pack(from_numpy), golden)
    np.testing.assert_array_equal(chosen.pack(from_torch), golden)
    assert isinstance(from_torch.codes, torch.Tensor)


@pytest.mark.parametrize("name", grid.names())
def test_the_golden_values_come_back(name: str, inputs: np.ndarray) -> None:
    chosen, golden = grid.get(name), np.load(GOLDEN / f"{name}.npy")
    blocks = chosen.unpack(golden)
    expected = _bits(ggml.dequantize(golden, chosen.ggml_type, inputs.shape[1]))
    np.testing.assert_array_equal(_bits(chosen.dequantize(blocks)), expected)
    values = chosen.dequantize(chosen.quantize(torch.from_numpy(inputs)))
    np.testing.assert_array_equal(_bits(values.numpy()), expected)
    np.testing.assert_array_equal(chosen.pack(blocks), golden)


@pytest.mark.parametrize("name", grid.names())
def test_the_golden_blocks_are_what_the_installed_library_makes(name: str, inputs: np.ndarray) -> None:
    made = ggml.quantize(inputs, grid.get(name).ggml_type)
    np.testing.assert_array_equal(made, np.load(GOLDEN / f"{name}.npy"))


def _bits(values: np.ndarray) -> np.ndarray:
    """Float bits; NaN (0 * Inf, where a scale overflowed) has many, and all are one here."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)
