from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit import grid as grids
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # what these tests share beside this file

Make = Callable[..., Path]


@pytest.fixture
def qat(tiny_llama: Make, synthesised: Callable[..., np.ndarray]) -> Make:
    """qat(rule=, scales=, dtype=) makes a folder whose matrices are as quantization-aware training stores them."""

    def make(*, rule: str = "absmax/7", scales: str = "BF16", dtype: str = "BF16", **changes: Any) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        folder = tiny_llama(num_hidden_layers=2, **changes)
        kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(5)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                values = synthesised(rng, tuple(tensor.shape), rule=rule, scales=scales, group=32, dtype=dtype)
                tensor = torch.from_numpy(values)
            tensors[name] = tensor.to(kind)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def trained_on(tiny_llama: Make, tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, grids.Blocks]]]:
    """trained_on(grid) makes a checkpoint as training leaves it: the layers' matrices in blocks of that grid, on scales
    that no rule would choose. Gives its folder, and the blocks by tensor."""

    def make(grid_name: str) -> tuple[Path, dict[str, grids.Blocks]]:
        grid, trained = grids.get(grid_name), {}
        with open_checkpoint(tiny_llama()) as source:
            tensors = []
            for name in source.names:
                values, raw = source.read(name), None
                if "layers" in name and values.ndim == 2:
                    blocks = grid.quantize(values)
                    scales = (blocks.scales.astype(np.float32) * np.float32(1.234)).astype(np.float16)
                    blocks = trained[name] = grid.encode(values, scales)
                    values, raw = grid.dequantize(blocks), grid.pack(blocks)
                on = grid_name if raw is not None else None
                tensors.append(Tensor(name=name, values=values, grid=on, blocks=raw))
            return write_checkpoint(tmp_path / f"trained-{grid_name}", source, tensors), trained

    return make
