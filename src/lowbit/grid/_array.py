"""What the grids share: the few places where numpy and torch differ, and the test for NaN and Inf."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.errors import BadFile, Unsupported
from lowbit.grid.base import Array, Blocks, Grid, namespace

_HINT = "The checkpoint is damaged, or training diverged"


def cast(x: Array, dtype: str) -> Array:
    """``x`` as ``dtype`` ('float32', 'int8', ...), by value; round half to even into float16. A copy only if needed."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):  # beyond 65504 float16 is Inf, in ggml too
            return x.astype(dtype, copy=False)
    return x.to(getattr(namespace(x), dtype))


def plain(x: Array) -> Array:
    """``x`` as float32, without its gradient; a copy only if needed."""
    return cast(x if isinstance(x, np.ndarray) else x.detach(), "float32")


def bitcast(x: Array, dtype: str) -> Array:
    """The same bytes read as ``dtype``, not copied."""
    return x.view(dtype) if isinstance(x, np.ndarray) else x.view(getattr(namespace(x), dtype))


def bf16_bits(x: Array) -> Array:
    """``x`` float32 rounded half to even to BF16: its bits in int32. In integers, because hardware conversions may
    flush subnormals to zero."""
    bits = bitcast(x, "int32")
    rounded = (bits >> 16) & 1  # halves go to the even neighbour
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded


def round_to(x: Array, dtype: str) -> Array:
    """``x`` float32 as a tensor of ``dtype`` holds it: float16 for 'F16', float32 for 'BF16' and 'F32'."""
    if dtype == "BF16":
        return bitcast(bf16_bits(x) << 16, "float32")
    return cast(x, {"F16": "float16", "F32": "float32"}[dtype])


def as_blocks(x: Array, block_size: int) -> Array:
    """(..., n) float32 -> (..., n / block_size, block_size), without its gradient. Raises Unsupported."""
    n_blocks, rest = divmod(x.shape[-1], block_size)
    if rest:
        raise Unsupported(
            "the rows are not whole blocks", found=f"rows of {x.shape[-1]}", expected=f"a multiple of {block_size}"
        )
    return plain(x).reshape(*x.shape[:-1], n_blocks, block_size)


def raw_blocks(raw: np.ndarray, block_bytes: int) -> np.ndarray:
    """(..., n_blocks * block_bytes) uint8 -> (..., n_blocks, block_bytes)."""
    return raw.reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes, block_bytes)


def as_rows(x: Array) -> Array:
    """(..., n_blocks, block_size) -> (..., n)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def first_extreme(x: Array) -> Array:
    """(..., k) -> (...): the first element of largest magnitude, with its sign."""
    return _pick(x, abs(x).argmax(-1))


def first_least(x: Array) -> Array:
    """(..., k) -> (...): the first of the least elements; zeros are equal, whatever their signs."""
    return _pick(x, x.argmin(-1))


def _pick(x: Array, index: Array) -> Array:
    """(..., k), (...) -> (...): the element of each row at its index."""
    index = index[..., None]
    found = np.take_along_axis(x, index, -1) if isinstance(x, np.ndarray) else x.gather(-1, index)
    return found[..., 0]


def lookup(table: np.ndarray, index: Array) -> Array:
    """``table[index]``, in the namespace and on the device of ``index``: whole numbers of any dtype, not below 0."""
    index = cast(index, "int64")
    if isinstance(index, np.ndarray):
        return table.take(index)
    return namespace(index).from_numpy(table).to(index.device)[index]


def inverse_of(d: Array) -> Array:
    """1/d in float32, and 0 where d is 0; Inf where it overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1.0 / d
    inverse[d == 0] = 0.0
    return inverse


def extremes(blocks: Array) -> tuple[Array, Array]:
    """Least and greatest of each block; (..., n_blocks) both. Raises BadFile where a block has NaN or Inf."""
    if isinstance(blocks, np.ndarray):
        # numpy reduces many short rows several times slower than the few long ones of the transposed.
        columns = np.ascontiguousarray(np.moveaxis(blocks, -1, 0))
        low, high = columns.min(0), columns.max(0)
    else:
        low, high = blocks.amin(-1), blocks.amax(-1)
    # Both reductions carry a NaN through, so the blocks' extremes tell whether all of x is finite.
    if not _is_empty(low):
        _refuse(low.min(), high.max())
    return low, high


def check_finite(x: Array, name: str | None = None) -> None:
    """Raises BadFile, naming the tensor ``name``, if ``x`` has a NaN or an Inf."""
    if _is_empty(x):
        return
    x = plain(x)
    _refuse(x.min(), x.max(), name)


def _is_empty(x: Array) -> bool:
    return 0 in x.shape


def _refuse(low: Any, high: Any, name: str | None = None) -> None:
    low, high = float(low), float(high)
    if np.isfinite(low) and np.isfinite(high):
        return
    found = "NaN" if np.isnan(low) or np.isnan(high) else "Inf"
    raise BadFile("the weights are not finite", where=name, found=found, expected="finite numbers", hint=_HINT)


class ScaledGrid(Grid):
    """A block of codes times one float16 scale: value = code * scale."""

    def dequantize(self, blocks: Blocks) -> Array:
        return as_rows(_times(cast(blocks.codes, "float32"), blocks.scales))

    def encode_on(self, x: Array, frame: Blocks) -> Blocks:
        return self.encode(x, frame.scales)

    def encode(self, x: Array, scales: Array) -> Blocks:
        return Blocks(codes=cast(self._nearest(x, scales), "int8"), scales=scales)

    def nearest_values(self, x: Array, scales: Array) -> Array:
        codes = self._nearest(x, scales)
        codes += 0.0  # integers have no -0.0, so the values shall have none from it either
        return as_rows(_times(codes, scales))

    def inverse(self, scales: Array) -> Array:
        return inverse_of(cast(scales, "float32"))

    def _as_blocks(self, x: Array) -> Array:
        return as_blocks(x, self.block_size)

    def _nearest(self, x: Array, scales: Array) -> Array:
        """The codes, still float32: (..., n_blocks, block_size)."""
        xp = namespace(x)
        q = self._as_blocks(x) * self.inverse(scales)[..., None]
        xp.round(q, out=q)
        return xp.clip(q, self.min_code, self.max_code, out=q)


def _times(codes: Array, scales: Array) -> Array:
    """code * scale, in the float32 ``codes`` (..., n_blocks, block_size) themselves."""
    with np.errstate(invalid="ignore", over="ignore"):  # 0 * Inf, of a scale beyond float16: NaN, as in the runtime
        codes *= cast(scales, "float32")[..., None]
    return codes
