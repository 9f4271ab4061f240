"""A shard of a master weight that is rounded where it lies, before FSDP2 gathers the whole.

FSDP2 shards rows. A grid's blocks lie within a row, so no block is ever in two processes, and each process rounds its
own rows only. What travels is the values on the grid in the products' dtype; what every module then computes with is
what the file will hold. The gradient of those values comes back reduce-scattered to the float32 rows of the master:
that is the straight-through estimator.

The two ``fsdp_`` methods are FSDP2's extension point for tensor subclasses (torch.distributed.fsdp.fully_shard).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lowbit.train.fake_quant import FakeQuantizer

_aten = torch.ops.aten
# What FSDP2 and DTensor do to a parameter to shard, pad, move or alias it; everything else works on the plain rows.
_KEEPING = {
    _aten.detach.default, _aten.split.Tensor, _aten.slice.Tensor, _aten.view.default, _aten.as_strided.default,
    _aten.new_zeros.default, _aten.empty_like.default, _aten.clone.default, _aten._to_copy.default,
    _aten._pin_memory.default, _aten.copy_.default, _aten.alias.default,
}  # fmt: skip


class RoundedShard(torch.Tensor):
    """(rows, ..., n) float32 of a master weight, with the fake quantizer that rounds them and the gathered dtype."""

    _rows: torch.Tensor
    _quantizer: FakeQuantizer
    _dtype: torch.dtype

    @staticmethod
    def __new__(cls, rows: torch.Tensor, quantizer: FakeQuantizer, dtype: torch.dtype) -> RoundedShard:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, rows.size(), strides=rows.stride(), storage_offset=rows.storage_offset(), dtype=rows.dtype,
            layout=rows.layout, device=rows.device, requires_grad=rows.requires_grad,
        )  # fmt: skip

    def __init__(self, rows: torch.Tensor, quantizer: FakeQuantizer, dtype: torch.dtype) -> None:
        self._rows, self._quantizer, self._dtype = rows, quantizer, dtype

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RoundedShard({self._quantizer.grid.name}, {tuple(self.shape)})"

    @property
    def rows(self) -> torch.Tensor:
        """The plain float32 rows, on the same memory."""
        return self._rows

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        plain = tree_map_only(RoundedShard, lambda shard: shard._rows, (args, kwargs or {}))
        if func is _aten.copy_.default:
            func(*plain[0], **plain[1])
            return first
        out = func(*plain[0], **plain[1])
        if func not in _KEEPING or not isinstance(first, RoundedShard):
            return out
        return tree_map_only(torch.Tensor, lambda t: cls(t, first._quantizer, first._dtype), out)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], None]:
        """What this process sends: its rows on the grid, padded to the rows of the largest shard."""
        rows = self._rows
        values = self._quantizer.shard_values(rows, self._dtype)
        padded = -(-outer_size[0] // mesh.size())
        if len(rows) == padded:
            return (values.contiguous(),), None
        sent = values.new_zeros(padded, *outer_size[1:])
        sent[: len(rows)] = values
        return (sent,), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[torch.Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """The whole weight, as it was gathered."""
        (whole,) = all_gather_outputs
        return None if out is not None else (whole, (whole,))
