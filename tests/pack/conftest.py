from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
