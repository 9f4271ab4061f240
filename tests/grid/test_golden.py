"""Every grid against the blocks that its library stored: zero differing bits, in numpy and in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from libraries import APART, DTYPES, OF_GGML, held, rows_of, stored, values

from lowbit import ggml, grid

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.load(GOLDEN / "inputs.npy")


@pytest.mark.parametrize("name", OF_GGML)
def test_quantize_stores_what_ggml_stores(name: str, inputs: np.ndarray) -> None:
    chosen, golden = grid.get(name), np.load(GOLDEN / f"{name}.npy")
    from_numpy, from_torch = chosen.quantize(inputs), chosen.quantize(torch.from_numpy(inputs))
    np.testing.assert_array_equal(chosen.pack(from_numpy), golden)
    np.testing.assert_array_equal(chosen.pack(from_torch), golden)
    assert isinstance(from_torch.codes, torch.Tensor)


@pytest.mark.parametrize("name", OF_GGML)
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
    np.testing.assert_array_equal(stored(name, inputs), np.load(GOLDEN / f"{name}.npy"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", APART)
def test_scales_in_the_dtype_of_the_weights(name: str, dtype: str, inputs: np.ndarray) -> None:
    chosen, golden = grid.get(name), np.load(GOLDEN / f"{name}.npy")[list(DTYPES).index(dtype)]
    x = held(inputs, dtype)
    for array in (x, torch.from_numpy(x)):
        blocks = chosen.quantize(array, dtype)
        assert type(blocks.codes) is type(array)
        scales = [np.asarray(part) for part in (blocks.scales, blocks.mins) if part is not None]
        assert {part.dtype for part in scales} == {np.dtype(np.float16 if dtype == "F16" else np.float32)}
        words = chosen.pack_codes(blocks.codes)
        np.testing.assert_array_equal(rows_of(words, *(part.astype(np.float32) for part in scales)), golden)
        np.testing.assert_array_equal(chosen.unpack_codes(words), blocks.codes)
        np.testing.assert_array_equal(_bits(np.asarray(chosen.dequantize(blocks))), _bits(values(name, blocks)))


def _bits(values: np.ndarray) -> np.ndarray:
    """Float bits; NaN (0 * Inf, where a scale overflowed) has many, and all are one here."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)
