"""Checkpoints of the mobile schema as training leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lowbit import grid as grids
from lowbit import recipe
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint


def trained(folder: Path, out: Path, name: str) -> tuple[Path, dict[str, grids.Blocks]]:
    """A checkpoint as training leaves it, on BF16 scales that no rule would choose; and its blocks."""
    blocks, tensors = {}, []
    with open_checkpoint(folder) as source:
        types = recipe.get(name).assign(source)
        for tensor in source.names:
            values, raw, grid = source.read(tensor), None, grids.get(types[tensor])
            if grid.whole_rows:
                wide = np.float32(0.77) * grid.quantize(values).scales
                scales = (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
                found = blocks[tensor] = grid.encode(values, scales)
                values, raw = grid.dequantize(found), grid.pack(found)
            tensors.append(Tensor(name=tensor, values=values, grid=grid.name if raw is not None else None, blocks=raw))
        return write_checkpoint(out, source, tensors), blocks
