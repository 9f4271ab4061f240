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
from safetensors.torch import load_file, save_file

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


def on_lattice(folder: Path) -> None:
    """Puts every matrix of the layers on a lattice whose scales are powers of two, so that no product is rounded."""
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if name.endswith("_proj.weight") or ".experts." in name:
            groups = stored[name].reshape(*stored[name].shape[:-1], -1, 32)
            scale = 2 ** (groups.abs().amax(-1, keepdim=True) / 7).log2().ceil()
            stored[name] = ((groups / scale).round() * scale).reshape(stored[name].shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def test_compressed_tensors_experts(tiny_gemma4_moe: Callable[..., Path], tmp_path: Path, record_property: Any) -> None:
    """transformers 5.23 has no conversion of Gemma 4's experts and would leave them random; with the one it has for
    others, as docs/formats.md gives it, it computes what the folder says."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    folder, tokens = tiny_gemma4_moe(), tokens_of()
    on_lattice(folder)
    lowbit.pack(folder, None, tmp_path / "ct", to="compressed-tensors", certificate=True)
    reference = transformers_logits(folder, tokens)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", output_loading_info=True, **options)[1]
    assert len(told["missing_keys"]) == 4  # as long as this is so, it must be told
    gate_up = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    stack = MergeModulelist(dim=0)
    conversion_mapping.register_checkpoint_conversion_mapping("gemma4_text", [
        WeightConverter(gate_up, "experts.gate_up_proj", operations=[stack, Concatenate(dim=1)]),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", operations=[stack]),
    ])  # fmt: skip
    try:
        ours = transformers_logits(tmp_path / "ct", tokens, **options)
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("gemma4_text")
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("gemma4_text")
    compare(ours, reference, record_property, 1e-9)
    assert (ours == reference).all()


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
