"""The folders compute what transformers computes: MLX's in MLX, compressed-tensors' in transformers itself.

Of a quantized folder the reference is a plain one of its values, codes times scales. MLX computes in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.run.mlx import Mlx

sys.path.insert(0, str(Path(__file__).parent))

from test_gemma4 import CASES as GEMMA4S
from test_gemma4 import decided_tokens
from test_logits import GEMMAS, LLAMAS, QWENS, compare, tokens_of, transformers_logits

VARIANTS = [
    *(("tiny_llama", name, changes) for name, changes in LLAMAS.items()),
    *(("tiny_qwen3", name, changes) for name, changes in QWENS.items()),
    *(("tiny_gemma3", name, changes) for name, changes in GEMMAS.items()),
]
FAMILIES = ["tiny_llama", "tiny_qwen3", "tiny_gemma3"]


def mlx_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with Mlx(folder, context=256, dtype="float32") as model:
        return np.concatenate([rows for _, rows in model.logits(tokens)])


def dequantized(folder: Path, out: Path) -> Path:
    """A plain folder of the values that ``folder`` holds."""
    with open_checkpoint(folder) as packed:
        return write_checkpoint(out, packed, (Tensor(name=n, values=packed.read(n)) for n in packed.names))


@pytest.mark.parametrize(("family", "variant", "changes"), VARIANTS, ids=[f"{f}: {v}" for f, v, _ in VARIANTS])
def test_mlx(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Any, family: str, variant: str, changes: Any
) -> None:
    folder, tokens = request.getfixturevalue(family)(**changes), tokens_of()
    lowbit.pack(folder, "f32", tmp_path / "mlx", to="mlx")
    compare(mlx_logits(tmp_path / "mlx", tokens), transformers_logits(folder, tokens), record_property, 1e-6)


@pytest.mark.parametrize("case", GEMMA4S)
def test_mlx_gemma4(tiny_gemma4: Callable[..., Path], tmp_path: Path, record_property: Any, case: str) -> None:
    layout, changes = GEMMA4S[case]
    folder = tiny_gemma4(layout, **changes)
    tokens = decided_tokens(folder)
    lowbit.pack(folder, "f32", tmp_path / "mlx", to="mlx")
    compare(mlx_logits(tmp_path / "mlx", tokens), transformers_logits(folder, tokens), record_property, 1e-6)


@pytest.mark.parametrize("layout", ["E2B", "31B", "26B-A4B", "12B"])
def test_quantized_mlx_gemma4(
    tiny_gemma4: Callable[..., Path], tmp_path: Path, record_property: Any, layout: str
) -> None:
    """Experts too: what transformers has in one tensor, gate and up, MLX has in two."""
    folder = tiny_gemma4(layout)
    result = lowbit.pack(folder, "mlx_affine4_g32", tmp_path / "mlx", certificate=True)
    assert result.certificate is not None
    types = {tensor.name: tensor.type for tensor in result.certificate.tensors}
    assert types.get("model.layers.0.experts.gate_up_proj", "mlx_affine4_g32") == "mlx_affine4_g32"
    tokens = decided_tokens(plain := dequantized(tmp_path / "mlx", tmp_path / "plain"))
    compare(mlx_logits(tmp_path / "mlx", tokens), transformers_logits(plain, tokens), record_property, 1e-6)


@pytest.mark.parametrize("layout", ["E2B", "31B", "12B"])
def test_compressed_tensors_gemma4(
    tiny_gemma4: Callable[..., Path], tmp_path: Path, record_property: Any, layout: str
) -> None:
    folder, tokens = tiny_gemma4(layout), tokens_of()
    lowbit.pack(folder, "int4_g32", tmp_path / "ct", certificate=True)
    reference = transformers_logits(dequantized(tmp_path / "ct", tmp_path / "plain"), tokens)
    compare(transformers_logits(tmp_path / "ct", tokens), reference, record_property, 1e-6)


@pytest.mark.parametrize("recipe", ["mlx_affine4_g32", "mlx_affine8_g64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_mlx(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Any, family: str, recipe: str
) -> None:
    folder, tokens = request.getfixturevalue(family)(intermediate_size=192), tokens_of()
    lowbit.pack(folder, recipe, tmp_path / "mlx")
    reference = transformers_logits(dequantized(tmp_path / "mlx", tmp_path / "plain"), tokens)
    compare(mlx_logits(tmp_path / "mlx", tokens), reference, record_property, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors(request: pytest.FixtureRequest, tmp_path: Path, record_property: Any, family: str) -> None:
    folder, tokens = request.getfixturevalue(family)(), tokens_of()
    lowbit.pack(folder, "int4_g32", tmp_path / "ct")
    reference = transformers_logits(dequantized(tmp_path / "ct", tmp_path / "plain"), tokens)
    ours = transformers_logits(tmp_path / "ct", tokens)
    compare(ours, reference, record_property, 1e-6)
    assert (ours == reference).all()
