"""Logits of an artifact in its own runtime against transformers' on the values that the artifact stores.

The artifact is dequantized into a plain float32 folder, which transformers runs; so what differs is the runtime: what
it makes of the key-values, of the layout, of its kernels. llama.cpp rounds activations to 8 bits where weights are
quantized and to 16 where they are, so a threshold goes with the type of the weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import run
from lowbit.checkpoint import Checkpoint, Tensor, open_checkpoint, write_checkpoint

# The largest mean KLD, in nats, of a runtime from transformers on the same values. Measured in llama.cpp: SmolLM2-135M
# 1e-11 in F32 and 4e-3 in Q4_1, Gemma 3 270M 6e-7 in F32; MLX in float32 is at F32's level whatever it stores.
MOST = {"f32": 1e-4, "16 bits": 2e-3, "quantized": 5e-2}
_SIXTEEN = ("F16", "BF16")


def compare(artifacts: Sequence[Path], reference: Path | None, ids: list[int]) -> list[dict[str, float]]:
    """For each artifact {kld, largest, top1, from_reference}: mean KLD and the largest difference of a logit between
    its runtime and transformers on its own values, how often the two agree on the likeliest token, and the mean KLD of
    its values from the reference's (nan where there is none). Raises LowbitError."""
    values_of_reference = in_transformers(reference, ids) if reference is not None else None
    return [_compare(path, values_of_reference, ids) for path in artifacts]


def _compare(path: Path, reference: np.ndarray | None, ids: list[int]) -> dict[str, float]:
    expected = in_transformers(path, ids)
    found = in_runtime(path, ids)
    width = min(expected.shape[1], found.shape[1])  # rows that pad the vocabulary are no tokens
    expected, found = expected[:, :width], found[:, :width]
    return {
        "kld": kld(expected, found),
        "largest": float(np.abs(expected - found).max()),
        "top1": float((expected.argmax(1) == found.argmax(1)).mean()),
        "from_reference": kld(reference[:, :width], expected) if reference is not None else float("nan"),
    }


def kld(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of rows of logits in nats, computed in float64."""
    p, q = (_log_softmax(rows.astype(np.float64)) for rows in (reference, other))
    return max(0.0, float((np.exp(p) * (p - q)).sum(1).mean()))


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def in_runtime(path: Path, ids: list[int]) -> np.ndarray:
    """An artifact's logits in the runtime that it is for, in float32 with a float32 cache: (tokens, n_vocab)."""
    options: dict[str, Any] = {"context": len(ids)}
    name = run.runtime_for(path).name
    if name == "llama.cpp":
        options |= {"kv_type": "f32", "flash_attention": False}
    else:
        options["dtype"] = "float32"
    with run.open_artifact(path, None, **options) as opened:
        return np.concatenate([rows for _, rows in opened.logits(ids)])


def in_transformers(path: Path, ids: list[int]) -> np.ndarray:
    """The logits of the values that a file or folder stores: (tokens, n_vocab). Raises LowbitError."""
    with tempfile.TemporaryDirectory(prefix="lowbit-parity-") as temporary:
        with open_checkpoint(path) as opened:
            plain = Path(temporary) / "plain"
            write_checkpoint(plain, opened, (Tensor(name=n, values=opened.read(n)) for n in opened.names))
        with run.open_artifact(plain, "transformers", context=len(ids), dtype="float32") as model:
            return np.concatenate([rows for _, rows in model.logits(ids)])


def level(opened: Checkpoint, container: str) -> str:
    """Which of MOST an artifact is held to."""
    if container == "mlx":
        return "f32"
    kinds = {opened.info(name).dtype for name in opened.names if len(opened.info(name).shape) > 1}
    if container != "gguf" or kinds <= {"F32"}:
        return "f32"
    return "16 bits" if kinds <= {"F32", *_SIXTEEN} else "quantized"
