"""What every grid promises beside its bits: shapes, refusals, nearest codes, no gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from libraries import OF_GGML

from lowbit import grid
from lowbit.errors import BadFile, Unsupported

SCALED = [name for name in grid.names() if grid.get(name).has_scales]
TRAINABLE = [name for name in grid.names() if grid.get(name).is_trainable]


def _weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def _scale_group(chosen: grid.Grid, n: int) -> int:
    """Weights that share a scale in a row of n."""
    return n if chosen.whole_rows else chosen.block_size


@pytest.mark.parametrize("name", grid.names())
@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 5, 512), (0, 256)])
def test_shapes_come_back_and_bytes_are_as_promised(name: str, shape: tuple[int, ...]) -> None:
    chosen, x = grid.get(name), _weights(*shape)
    blocks = chosen.quantize(x)
    raw = chosen.pack(blocks)
    assert chosen.dequantize(blocks).shape == shape
    assert raw.shape == (*shape[:-1], chosen.row_bytes(shape[-1]))
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(chosen.pack(chosen.unpack(raw)), raw)
    assert raw.size * 8 == x.size * chosen.bits_per_weight + 8 * chosen.scale_bytes * (x.size // shape[-1])


@pytest.mark.parametrize("name", grid.names())
def test_a_strided_view_is_read_as_it_is_and_left_alone(name: str) -> None:
    chosen, wide = grid.get(name), _weights(4, 512)
    view, before = wide[::2, 256:], wide.copy()
    expected = chosen.pack(chosen.quantize(np.ascontiguousarray(view)))
    np.testing.assert_array_equal(chosen.pack(chosen.quantize(view)), expected)
    np.testing.assert_array_equal(chosen.pack(chosen.quantize(torch.from_numpy(wide)[::2, 256:])), expected)
    np.testing.assert_array_equal(wide, before)


@pytest.mark.parametrize("name", grid.names())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(name: str, bad: float) -> None:
    x = _weights(4, 512)
    x[2, 300] = bad
    for array in (x, torch.from_numpy(x)):
        with pytest.raises(BadFile, match="not finite"):
            grid.get(name).quantize(array)
        with pytest.raises(BadFile, match=r"layers\.3\.up: the weights are not finite; found (NaN|Inf)"):
            grid.check_finite(array, "layers.3.up")
    x[2, 300] = 3.4e38
    grid.check_finite(x, "layers.3.up")


@pytest.mark.parametrize("name", SCALED)
def test_rows_that_are_not_whole_blocks_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=r"rows of 50; expected a multiple of (4|32|128|256)"):
        grid.get(name).quantize(_weights(2, 50))


@pytest.mark.parametrize("name", SCALED)
def test_encode_gives_the_nearest_code_on_any_scale(name: str) -> None:
    chosen = grid.get(name)
    x = _weights(8, 2 * chosen.block_size)
    size = _scale_group(chosen, x.shape[1])
    scales = _weights(8, x.shape[1] // size).astype(np.float16)
    scales[0] = 0
    scales[1:3] = [[6e-8], [-6e-8]]  # the least float16 there is
    blocks = chosen.encode(x, scales)
    every = np.arange(chosen.min_code, chosen.max_code + 1)
    wide = scales.astype(np.float64)[..., None]
    error = np.abs(x.reshape(8, -1, size, 1).astype(np.float64) - every * wide[..., None])
    reached = np.abs(x.reshape(8, -1, size).astype(np.float64) - blocks.codes * wide)
    np.testing.assert_allclose(reached, error.min(-1), rtol=1e-6, atol=1e-7)
    assert blocks.codes.dtype == np.int8
    assert not blocks.codes[0].any()
    assert blocks.codes.min() >= chosen.min_code
    assert blocks.codes.max() <= chosen.max_code
    in_torch = chosen.encode(torch.from_numpy(x), torch.from_numpy(scales))
    np.testing.assert_array_equal(in_torch.codes.numpy(), blocks.codes)


@pytest.mark.parametrize("name", SCALED)
def test_encoding_what_a_grid_holds_changes_nothing(name: str) -> None:
    chosen = grid.get(name)
    blocks = chosen.quantize(_weights(64, 256))
    again = chosen.encode(chosen.dequantize(blocks), blocks.scales)
    np.testing.assert_array_equal(again.codes, blocks.codes)


@pytest.mark.parametrize("name", SCALED)
def test_nearest_values_are_the_encoded_values_bit_for_bit(name: str) -> None:
    chosen, x = grid.get(name), _weights(16, 256)
    x[3] = 0
    scales = (_weights(16, 256 // _scale_group(chosen, 256)) * 0.1).astype(np.float16)
    scales[5, 0] = 0
    expected = chosen.dequantize(chosen.encode(x, scales)).view(np.uint32)
    np.testing.assert_array_equal(chosen.nearest_values(x, scales).view(np.uint32), expected)
    in_torch = chosen.nearest_values(torch.from_numpy(x), torch.from_numpy(scales))
    np.testing.assert_array_equal(in_torch.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("name", TRAINABLE)
def test_codes_on_a_frame_are_the_nearest_that_it_has(name: str) -> None:
    """Whatever code is put in a weight's place instead, its value is no nearer."""
    chosen, x = grid.get(name), _weights(6, 512)
    frame = chosen.quantize(_weights(6, 512)[::-1].copy())
    blocks = chosen.encode_on(x, frame)
    assert blocks.codes.shape == frame.codes.shape
    assert blocks.codes.dtype == frame.codes.dtype
    reached = np.abs(chosen.dequantize(blocks) - x)
    for code in np.unique(frame.codes):
        other = chosen.dequantize(replace(blocks, codes=np.full_like(blocks.codes, code)))
        assert (reached <= np.abs(other - x) * (1 + 1e-6) + 1e-7).all()
    in_torch = chosen.encode_on(torch.from_numpy(x), _in_torch(frame))
    np.testing.assert_array_equal(in_torch.codes.numpy(), blocks.codes)
    np.testing.assert_array_equal(chosen.pack(_in_numpy(in_torch)), chosen.pack(blocks))


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_lies_on_a_frame_stays(name: str) -> None:
    chosen = grid.get(name)
    blocks = chosen.quantize(_weights(6, 512))
    again = chosen.encode_on(chosen.dequantize(blocks), blocks)
    np.testing.assert_array_equal(chosen.dequantize(again), chosen.dequantize(blocks))


def _in_torch(blocks: grid.Blocks) -> grid.Blocks:
    parts = {key: part if part is None else torch.from_numpy(np.array(part)) for key, part in vars(blocks).items()}
    return grid.Blocks(**parts)


def _in_numpy(blocks: grid.Blocks) -> grid.Blocks:
    return grid.Blocks(**{key: part if part is None else part.numpy() for key, part in vars(blocks).items()})


@pytest.mark.parametrize("name", SCALED)
def test_inverse_is_zero_where_the_scale_is(name: str) -> None:
    scales = np.array([0.0, -0.0, -0.5, 4.0], np.float16)
    for array in (scales, torch.from_numpy(scales)):
        assert grid.get(name).inverse(array).tolist() == [0, 0, -2, 0.25]


@pytest.mark.parametrize("name", grid.names())
def test_a_parameter_may_be_rounded_and_gets_no_gradient(name: str) -> None:
    chosen, weight = grid.get(name), torch.nn.Parameter(torch.from_numpy(_weights(2, 256)))
    blocks = chosen.quantize(weight)
    assert not blocks.codes.requires_grad
    assert not chosen.dequantize(blocks).requires_grad
    if chosen.has_scales:
        assert not chosen.nearest_values(weight, blocks.scales).requires_grad


def test_q4_0_of_a_block_worked_by_hand() -> None:
    # The extreme is -4, so the scale is 0.5 and the codes are the weights over 0.5; +4 would be code 8, cut to 7.
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [-4, 4, 1, -1, 0.26, 0.24]
    chosen = grid.get("q4_0")
    blocks = chosen.quantize(x)
    assert blocks.scales.tolist() == [[0.5]]
    assert blocks.codes[0, 0, :6].tolist() == [-8, 7, 2, -2, 1, 0]
    raw = chosen.pack(blocks)[0]
    assert raw[:2].tobytes() == np.float16(0.5).tobytes()
    assert raw[2] == 0x80  # low nibble: weight 0, code -8 + 8; high nibble: weight 16, code 0 + 8
    assert raw[3] == 0x8F
    # The first of two extremes gives the sign.
    blocks = chosen.quantize(-x)
    assert blocks.scales.tolist() == [[-0.5]]
    assert blocks.codes[0, 0, :2].tolist() == [-8, 7]


def test_q5_0_of_a_block_worked_by_hand() -> None:
    # As Q4_0, on 32 values: the extreme -8 gives the scale 0.5 and code -16, and +8 would be code 16, cut to 15.
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = [-8, 8, 1, -1]
    chosen = grid.get("q5_0")
    blocks = chosen.quantize(x)
    assert blocks.scales.tolist() == [[0.5]]
    assert blocks.codes[0, 0, :5].tolist() == [-16, 15, 2, -2, 0]
    raw = chosen.pack(blocks)[0]
    # Above zero the fifth bit is set: all but weights 0 (code -16 + 16 = 0) and 3 (-2 + 16 = 14).
    assert raw[2:6].tolist() == [0b11110110, 255, 255, 255]
    assert raw[6:10].tolist() == [0x00, 0x0F, 0x02, 0x0E]


@pytest.mark.parametrize(("name", "top"), [("q4_1", 15), ("q5_1", 31)])
def test_a_minimum_worked_by_hand(name: str, top: int) -> None:
    x = (2 + 0.5 * (np.arange(32) % (top + 1)))[None].astype(np.float32)
    chosen = grid.get(name)
    blocks = chosen.quantize(x)
    assert (blocks.scales.tolist(), blocks.mins.tolist()) == ([[0.5]], [[2.0]])
    assert blocks.codes[0, 0].tolist() == [i % (top + 1) for i in range(32)]
    np.testing.assert_array_equal(chosen.dequantize(blocks), x)
    raw = chosen.pack(blocks)[0]
    assert raw[:4].tobytes() == np.array([0.5, 2], np.float16).tobytes()
    if name == "q5_1":
        assert raw[4:8].tolist() == [0, 0, 255, 255]
    assert raw[-16:].tolist() == [0x11 * i for i in range(16)]


def test_iq4_nl_of_its_own_values() -> None:
    values = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    x = np.array([values + values[::-1]], np.float32) / 4
    chosen = grid.get("iq4_nl")
    blocks = chosen.quantize(x)
    assert blocks.scales.tolist() == [[0.25]]
    assert blocks.codes[0, 0].tolist() == values + values[::-1]
    assert chosen.pack(blocks)[0, 2:].tolist() == [i | (15 - i) << 4 for i in range(16)]


def test_mxfp4_of_a_block_worked_by_hand() -> None:
    # The extreme 6 lies between 4 and 8: exponent 2, stored as 2 + 125, and the unit is 1. Midpoints go to zero.
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [6, -6, 0.5, 0.25, 0.26, -0.25, -0.75, 5, -5.1]
    chosen = grid.get("mxfp4")
    blocks = chosen.quantize(x)
    assert blocks.scales.tolist() == [[127]]
    assert blocks.codes[0, 0, :10].tolist() == [7, 15, 1, 0, 1, 0, 9, 6, 15, 0]
    assert chosen.dequantize(blocks)[0, :9].tolist() == [6, -6, 0.5, 0, 0.5, 0, -0.5, 4, -6]
    raw = chosen.pack(blocks)[0]
    assert (raw[0], raw[1], raw[2]) == (127, 0x07, 0x0F)


def test_channelwise_worked_by_hand() -> None:
    # One scale for the whole row: the largest magnitude 3 over 1.5 is 2, and codes go from -2 to 1.
    x = np.zeros((1, 8), np.float32)
    x[0, :5] = [3, -3, -4 + 1, 1.1, -1.1]
    chosen = grid.get("channelwise2")
    blocks = chosen.quantize(x)
    assert blocks.scales.tolist() == [[2.0]]
    assert blocks.codes[0, 0, :6].tolist() == [1, -2, -2, 1, -1, 0]
    raw = chosen.pack(blocks)[0]
    assert raw[:4].tobytes() == np.float32(2).tobytes()
    assert raw[4:].tolist() == [0b11_00_00_11, 0b10_10_10_01]  # code plus 2, the first in the lowest bits
    assert chosen.row_bytes(8) == 6


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channelwise_is_what_transformers_computes(bits: int) -> None:
    from transformers.integrations.gemma_quant import QuantizedLinear

    chosen, x = grid.get(f"channelwise{bits}"), _weights(24, 64)
    blocks = chosen.quantize(x)
    layer = QuantizedLinear(64, 24, num_bits=bits)
    codes = torch.from_numpy(chosen.pack_codes(blocks.codes)[:, 0])
    layer.weight.data = codes.view(torch.int8) if bits == 8 else codes
    layer.weight_scale.data = torch.from_numpy(blocks.scales)
    theirs = layer._dequantize_weights(torch.float32).detach().numpy()
    np.testing.assert_array_equal(chosen.dequantize(blocks).view(np.uint32), theirs.view(np.uint32))


def test_the_names_are_sorted_and_have_their_types() -> None:
    assert all(a < b for a, b in pairwise(grid.names()))
    for name in OF_GGML:
        assert grid.by_ggml_type(grid.get(name).ggml_type).name == name
