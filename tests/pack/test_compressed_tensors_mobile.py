"""The mobile schema as compressed-tensors: a scale a row, bits by class; it gives the grid's values, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from trained_for_phones import trained

import lowbit
from lowbit import grid as grids
from lowbit import recipe
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, Unsupported

Make = Callable[..., Path]
EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def in_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter, matrices decompressed, in the dtype that the config names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():  # the first forward pass decompresses what is left
        model(torch.tensor([[1, 2, 3]]))
    scalars = [(n, buffer) for n, buffer in model.named_buffers() if n.endswith("layer_scalar")]
    each = [*model.named_parameters(), *scalars]
    return {n: tensor.detach() for n, tensor in each if not n.endswith(("_scale", "_shape"))}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma3", "mobile"),
        ("llama", "mobile_mlp2"),
        ("llama", "mobile"),
        ("qwen3", "mobile_w8"),
        ("qwen3", "mobile_w4"),
        ("gemma4 E2B", "mobile"),
    ],
)
def test_what_training_ended_on(family: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    family, _, layout = family.partition(" ")
    model = request.getfixturevalue(f"tiny_{family}")(*filter(None, [layout]))
    folder, blocks = trained(model, tmp_path / "trained", name)
    out = tmp_path / "ct"
    certificate = lowbit.pack(folder, name, out, to="compressed-tensors", certificate=True).certificate
    assert certificate is not None and certificate.totals["exact"] == certificate.totals["blocks"] > 0
    assert lowbit.pack.verify(out, folder).to_json() == json.loads((out / "certificate.json").read_text("utf-8"))
    stored, loaded = load_file(out / "model.safetensors"), in_transformers(out)
    bits = set()
    with open_checkpoint(folder) as source, open_checkpoint(out) as ours:
        assert loaded.keys() == set(source.names)
        for tensor in source.names:
            values = torch.from_numpy(source.read(tensor))
            assert torch.equal(loaded[tensor].float(), values), tensor  # the library's values
            assert np.array_equal(ours.read(tensor), source.read(tensor)), tensor
            if tensor not in blocks or "embed_tokens" in tensor:
                assert f"{tensor}_packed" not in stored
                continue
            grid, coded = grids.get(ours.info(tensor).dtype), ours.coded_rows(tensor, 0, len(values))
            assert coded is not None and coded[0] == grid.name == recipe.get(name).assign(source)[tensor]
            theirs = unpack_from_int32(stored[f"{tensor}_packed"], grid.bits, values.shape)  # type: ignore[attr-defined]
            assert np.array_equal(theirs.numpy(), blocks[tensor].codes[:, 0])
            assert np.array_equal(coded[1].codes, blocks[tensor].codes)
            assert stored[f"{tensor}_scale"].dtype == torch.float32
            assert np.array_equal(stored[f"{tensor}_scale"].numpy(), blocks[tensor].scales)
            bits.add(grid.bits)  # type: ignore[attr-defined]
    config = json.loads((out / "config.json").read_text("utf-8"))
    groups = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    assert {group.weights.num_bits for group in groups} == bits  # type: ignore[union-attr]
    assert all(group.weights.strategy == "channel" for group in groups)  # type: ignore[union-attr]
    assert stored[EMBEDDING].dtype == (torch.float32 if name == "mobile_w8" else torch.float16)


def test_what_was_not_trained_is_rounded_by_the_library(tiny_llama: Make, tmp_path: Path) -> None:
    folder, out = tiny_llama(tie_word_embeddings=True), tmp_path / "ct"
    lowbit.pack(folder, "mobile_w4", out, to="compressed-tensors")
    with open_checkpoint(folder) as source, open_checkpoint(out) as ours:
        for tensor, kind in recipe.get("mobile_w4").assign(source).items():
            values, grid = source.read(tensor), grids.get(kind)
            expected = grid.dequantize(grid.quantize(values)) if grid.whole_rows else values
            assert np.array_equal(ours.read(tensor), expected), tensor
        assert ours.info(EMBEDDING).dtype in ("F32", "F16")


def test_it_goes_on_to_litert_and_f32(tiny_gemma3: Make, tmp_path: Path) -> None:
    """Codes of a folder are those of the next file."""
    folder, blocks = trained(tiny_gemma3(), tmp_path / "trained", "mobile_w4")
    lowbit.pack(folder, "mobile_w4", tmp_path / "ct", to="compressed-tensors")
    lowbit.pack(tmp_path / "ct", "mobile_w4", tmp_path / "x.litertlm", to="litert-lm", context=256)
    with open_checkpoint(tmp_path / "x.litertlm") as there:
        coded = there.coded_rows(DOWN, 0, len(blocks[DOWN].codes))
        assert coded is not None and np.array_equal(coded[1].codes, blocks[DOWN].codes)
    lowbit.pack(tmp_path / "ct", "f32", tmp_path / "x.gguf")
    with open_checkpoint(tmp_path / "x.gguf") as there, open_checkpoint(folder) as source:
        assert np.array_equal(there.read(DOWN), source.read(DOWN))


def test_rows_that_are_no_whole_words(tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="multiple of 16, which channelwise2 needs"):
        lowbit.pack(tiny_llama(intermediate_size=120), "mobile_mlp2", tmp_path / "ct", to="compressed-tensors")


def test_parts_of_another_kind_than_the_config_has(tiny_llama: Make, tmp_path: Path) -> None:
    out = tmp_path / "ct"
    lowbit.pack(tiny_llama(), "mobile_mlp2", out, to="compressed-tensors")
    good, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text("utf-8"))
    spoiled: dict[str, dict[str, Any]] = {
        "of no kind": {f"{DOWN}_packed": good[f"{DOWN}_packed"][:, :-1].contiguous()},
        "of no kind that": {f"{DOWN}_scale": good[f"{DOWN}_scale"].repeat(1, 2)},
        "not what the config gives": {f"{DOWN}_shape": good[f"{DOWN}_shape"].float()},
        "weight_shape is not the shape": {f"{DOWN}_shape": good[f"{DOWN}_shape"] + torch.tensor([1, 0])},
    }
    for told, parts in spoiled.items():
        save_file(good | parts, out / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadFile, match=told):
            open_checkpoint(out)
    save_file(good, out / "model.safetensors", {"format": "pt"})
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 3
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Unsupported, match="num_bits = 3; expected 2 or 4 or 8"):
        open_checkpoint(out)
