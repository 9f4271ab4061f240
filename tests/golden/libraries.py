"""What the library that executes a format stores for given weights, and which values it computes with.

A grid's own bytes where GGUF has the format. MLX and compressed-tensors keep codes and scales in tensors of their own,
and in the dtype of the weights: for them a row is the codes' words, then scales, then biases (both widened to float32).
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import quantize as to_codes
from compressed_tensors.quantization.utils import calculate_qparams

from lowbit import ggml, grid

OF_GGML = tuple(name for name in grid.names() if grid.get(name).ggml_type is not None)
OF_MLX = tuple(name for name in grid.names() if name.startswith("mlx_"))
OF_COMPRESSED_TENSORS = tuple(name for name in grid.names() if name.startswith(("int4_", "channelwise")))
APART = OF_MLX + OF_COMPRESSED_TENSORS  # those whose scales lie apart from their codes
DTYPES = {  # of weights and scales
    "F32": (mx.float32, torch.float32),
    "F16": (mx.float16, torch.float16),
    "BF16": (mx.bfloat16, torch.bfloat16),
}


def held(x: np.ndarray, dtype: str) -> np.ndarray:
    """``x`` float32 rounded to ``dtype``, float32 again; 0 where it is beyond the dtype."""
    rounded = torch.from_numpy(x).to(DTYPES[dtype][1]).float().numpy()
    return np.where(np.isfinite(rounded), rounded, np.float32(0))


def stored(name: str, x: np.ndarray) -> np.ndarray:
    """(rows, n) float32 -> uint8: (rows, row_bytes), or (3, rows, bytes) of F32, F16 and BF16 weights."""
    ggml_type = grid.get(name).ggml_type
    if ggml_type is not None:
        return ggml.quantize(x, ggml_type)
    return np.stack([stored_apart(name, held(x, dtype), dtype) for dtype in DTYPES])


def stored_apart(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """(rows, n) float32, numbers that ``dtype`` holds -> uint8 (rows, bytes), as above."""
    group = grid.get(name).block_size
    if name in OF_MLX:
        weights = mx.array(x).astype(DTYPES[dtype][0])
        words, *scales = mx.quantize(weights, group_size=group, bits=_bits(name), stream=mx.cpu)
        return rows_of(np.array(words), *(np.array(part.astype(mx.float32)) for part in scales))
    weights = torch.from_numpy(x).to(DTYPES[dtype][1])
    bits = _bits(name)
    kind = {"strategy": "channel"} if grid.get(name).whole_rows else {"strategy": "group", "group_size": group}
    scheme = QuantizationArgs(num_bits=bits, symmetric=True, **kind)
    groups = weights[:, None] if grid.get(name).whole_rows else weights.unflatten(-1, (-1, group))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme)
    codes = to_codes(weights, scales, None, scheme, dtype=torch.int8)
    # Its words of 8 bits hold codes plus 128; the runtime of channelwise codes has them as they are.
    words = codes.numpy() if bits == 8 else pack_to_int32(codes, bits).numpy()
    return rows_of(words, scales.float().numpy())


def rows_of(*parts: np.ndarray) -> np.ndarray:
    """Arrays (rows, ...) as bytes side by side: uint8 (rows, bytes)."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts], -1)


def values(name: str, blocks: grid.Blocks) -> np.ndarray:
    """The float32 (rows, n) that the library computes of codes, on scales and mins widened to float32."""
    codes, scales = np.asarray(blocks.codes), np.asarray(blocks.scales).astype(np.float32)
    if name in OF_COMPRESSED_TENSORS:
        product = torch.from_numpy(codes).float() * torch.from_numpy(scales)[..., None]
        return product.reshape(len(codes), -1).numpy()
    words = grid.get(name).pack_codes(codes).reshape(len(codes), -1).view(np.uint32)
    bits, group = _bits(name), grid.get(name).block_size
    mins = mx.array(np.asarray(blocks.mins).astype(np.float32))
    return np.array(mx.dequantize(mx.array(words), mx.array(scales), mins, group, bits, stream=mx.cpu))


def _bits(name: str) -> int:
    return int(name.removeprefix("mlx_affine").removeprefix("int").removeprefix("channelwise").partition("_")[0])
