"""Which precision the large products run in: measured on this machine, not assumed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch

_WORTH_IT = 1.3  # how much faster bfloat16 must be: it costs about 2e-4 nats of KLD in the reference's hidden states


def choose(precision: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype of matrix products for "float32", "bfloat16" or "auto".

    Many CPUs emulate bfloat16 at a tenth of their float32 speed; those with AVX512-BF16 or AMX run it at four times.
    """
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if _speed(torch.bfloat16, device, width) > _WORTH_IT * _speed(torch.float32, device, width)
        else torch.float32
    )


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Products in ``dtype``; everything else stays as it is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _speed(dtype: torch.dtype, device: torch.device, width: int) -> float:
    """Products a second of a step's typical shape; the best of several short trials."""
    x = torch.randn(256, width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 1 / best
