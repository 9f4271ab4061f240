"""w4a16-ct checkpoints: written by the compressed-tensors library itself, read code for code into Q4_0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import grid
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, LowbitError, Unsupported

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
}  # fmt: skip
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def packed(tiny_llama: Callable[..., Path]) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The folder, and each matrix's codes (rows, n) int8 and scales (rows, n / 32) bfloat16."""
    return compressed(tiny_llama())


def compressed(folder: Path) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The folder with the matrices of its language model's layers packed, and what ``packed`` gives."""
    stored, made = load_file(folder / "model.safetensors"), {}
    for name in [n for n in stored if ".layers." in n and "vision" not in n and stored[n].ndim == 2]:
        rows, n = stored[name].shape
        groups = stored.pop(name).reshape(rows, n // 32, 32)
        scales = (groups.abs().amax(-1) / 7.5).bfloat16()
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(rows, n)
        made[name] = codes, scales
        stored[f"{name}_packed"] = pack_to_int32(codes, 4)
        stored[f"{name}_scale"], stored[f"{name}_shape"] = scales, torch.tensor([rows, n])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    rescheme(folder, SCHEME)
    return folder, made


def rescheme(folder: Path, scheme: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"quantization_config": scheme}), "utf-8")


def test_not_a_code_is_touched(packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, made = packed
    lowbit.pack(folder, "q4_0", tmp_path / "q4_0.gguf")
    q4_0 = grid.get("q4_0")
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "q4_0.gguf") as file:
        assert len(made) == 21
        for name, (codes, scales) in made.items():
            expected = codes.float() * scales.float().repeat_interleave(32, 1)
            assert source.info(name).grid == "q4_0" and source.info(name).dtype == "int4_g32"
            assert np.array_equal(source.read(name), expected.numpy()), name
            raw = file.blocks(name)
            assert raw is not None
            blocks = q4_0.unpack(raw)
            assert np.array_equal(blocks.codes.reshape(codes.shape), codes.numpy()), name
            assert np.array_equal(blocks.scales.astype(np.float32), scales.float().numpy()), name
            assert np.array_equal(file.read(name), expected.numpy()), name
        assert source.info("model.embed_tokens.weight").dtype == "F32"


def test_gemma_4_within_a_multimodal_model(tiny_gemma4: Callable[..., Path], tmp_path: Path) -> None:
    """Also where layers that share keys and values have packed ones of their own, as released: nothing reads those."""
    folder, made = compressed(tiny_gemma4("E2B", multimodal=True))
    stored = load_file(folder / "model.safetensors")
    owner, sharer = (f"model.language_model.layers.{i}.self_attn.k_proj.weight" for i in (2, 5))
    for suffix in ("_packed", "_scale", "_shape"):
        stored[sharer + suffix] = stored[owner + suffix].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    lowbit.pack(folder, "q4_0", tmp_path / "q4_0.gguf")
    with open_checkpoint(tmp_path / "q4_0.gguf") as file:
        raw = file.blocks(owner.replace("language_model.", ""))
        assert raw is not None
        codes, _ = made[owner]
        assert np.array_equal(grid.get("q4_0").unpack(raw).codes.reshape(codes.shape), codes.numpy())
        assert len(made) == 6 * 9 - 3 * 2


def test_transformers_reads_the_same(packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Unpacked by lowbit into a plain folder, transformers loads the values that codes x scales are."""
    from transformers import AutoModelForCausalLM

    from lowbit.checkpoint import Tensor, write_checkpoint

    folder, made = packed
    with open_checkpoint(folder) as source:
        write_checkpoint(tmp_path / "plain", source, (Tensor(name=n, values=source.read(n)) for n in source.names))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    codes, scales = made[Q_PROJ]
    assert torch.equal(model.get_parameter(Q_PROJ), codes.float() * scales.float().repeat_interleave(32, 1))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits": ({"config_groups": {"g": {"weights": WEIGHTS | {"num_bits": 8}}}}, "num_bits"),
    "group of 64": ({"config_groups": {"g": {"weights": WEIGHTS | {"group_size": 64}}}}, "group_size"),
    "asymmetric": ({"config_groups": {"g": {"weights": WEIGHTS | {"symmetric": False}}}}, "symmetric"),
    "reordered": ({"config_groups": {"g": {"weights": WEIGHTS | {"actorder": "group"}}}}, "actorder"),
    "activations": (
        {"config_groups": {"g": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
        "activations",
    ),
    "rotated": ({"transform_config": {"config_groups": {}, "a": 1}}, "transform_config"),
    "sparse": ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    "a quantized cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "no groups": ({"config_groups": {}}, "config_groups"),
    "a group of nothing": ({"config_groups": {"g": None}}, "has no weights"),
    "another method": ({"quant_method": "gptq"}, "gptq"),
    "another format": ({"format": "marlin-24"}, "marlin-24"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_schemes_are_refused(packed: tuple[Path, dict[str, Any]], case: str) -> None:
    changes, told = REFUSED[case]
    rescheme(packed[0], SCHEME | changes)
    with pytest.raises(LowbitError, match=told):
        open_checkpoint(packed[0])


def test_an_object_is_expected(packed: tuple[Path, dict[str, Any]]) -> None:
    rescheme(packed[0], ["gptq"])
    with pytest.raises(LowbitError, match="expected an object"):
        open_checkpoint(packed[0])


BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    f"{Q_PROJ}_scale": lambda stored: stored.pop(f"{Q_PROJ}_scale"),
    f"{Q_PROJ}_packed": lambda stored: stored.update({f"{Q_PROJ}_packed": torch.zeros(64, 4, dtype=torch.int32)}),
    f"{Q_PROJ}_shape": lambda stored: stored.update({f"{Q_PROJ}_shape": torch.tensor([64, 32])}),
}


@pytest.mark.parametrize("part", BROKEN)
def test_broken_parts_are_named(packed: tuple[Path, dict[str, Any]], part: str) -> None:
    stored = load_file(packed[0] / "model.safetensors")
    BROKEN[part](stored)
    save_file(stored, packed[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=part.replace(".", r"\.")):
        open_checkpoint(packed[0])


def test_a_matrix_stored_twice_is_refused(packed: tuple[Path, dict[str, Any]]) -> None:
    stored = load_file(packed[0] / "model.safetensors")
    stored[Q_PROJ] = torch.zeros(64, 64)
    save_file(stored, packed[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=r"q_proj\.weight: a matrix is stored twice"):
        open_checkpoint(packed[0])


def test_a_vector_in_parts_is_refused(packed: tuple[Path, dict[str, Any]]) -> None:
    stored = load_file(packed[0] / "model.safetensors")
    stored["model.norm.weight_packed"] = stored.pop("model.norm.weight").int()
    save_file(stored, packed[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match=r"norm\.weight: codes and scales of what is no matrix"):
        open_checkpoint(packed[0])


def test_a_scale_beyond_float16_is_refused(packed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    stored = load_file(packed[0] / "model.safetensors")
    stored[f"{Q_PROJ}_scale"][3, 1] = 1e6
    save_file(stored, packed[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match="beyond float16"):
        lowbit.pack(packed[0], "q4_0", tmp_path / "q4_0.gguf")
    assert not (tmp_path / "q4_0.gguf").exists()


def test_packed_parts_without_a_scheme_are_refused(packed: tuple[Path, dict[str, Any]]) -> None:
    path = packed[0] / "config.json"
    config = json.loads(path.read_text("utf-8"))
    del config["quantization_config"]
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises((BadFile, Unsupported)):
        open_checkpoint(packed[0])
