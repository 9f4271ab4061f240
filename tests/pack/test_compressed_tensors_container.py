"""compressed-tensors folders, read by the library and by transformers: they hold the source's own codes and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile

Make = Callable[..., Path]
DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MATRIX = "model.layers.0.mlp.down_proj.weight"


def parts(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each packed matrix's codes (rows, n) int8, unpacked by the library, and its scales."""
    stored = load_file(folder / "model.safetensors")
    names = [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]
    shapes = {name: torch.Size(stored[f"{name}_shape"].tolist()) for name in names}
    return {n: (unpack_from_int32(stored[f"{n}_packed"], 4, shapes[n]), stored[f"{n}_scale"]) for n in names}


def in_transformers(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Every parameter as transformers loads the folder, matrices decompressed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():  # the first forward pass decompresses what is left
        model(torch.tensor([[1, 2, 3]]))
    return {n: parameter.detach() for n, parameter in model.named_parameters() if not n.endswith(("_scale", "_shape"))}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", ["extremum/-8", "absmax/7", "absmax/7.5", "free scales"])
def test_a_lattice_is_stored_without_loss(qat: Make, tmp_path: Path, rule: str, dtype: str) -> None:
    """transformers loads the source's numbers: in BF16 and F16 bit for bit, as the library rounds once to the dtype."""
    folder, out = qat(rule=rule, dtype=dtype), tmp_path / "ct"
    result = lowbit.pack(folder, None, out, to="compressed-tensors", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"] > 0
    kinds = {t.type for t in result.certificate.tensors}
    # F32 that 16 bits hold as well is stored in 16.
    assert kinds == ({"int4_g32", "f16", "f32"} if dtype == "F32" else {"int4_g32", dtype.lower()})
    loaded, source = in_transformers(out, dtype=DTYPE[dtype]), load_file(folder / "model.safetensors")
    assert len(parts(out)) == 14 and loaded.keys() == source.keys()
    assert all(torch.equal(loaded[name], source[name]) for name in source)
    assert {scales.dtype for _, scales in parts(out).values()} == {torch.float16 if dtype == "F16" else torch.bfloat16}
    assert lowbit.pack.verify(out, folder).to_json() == json.loads((out / "certificate.json").read_text("utf-8"))


def test_groups_of_128(qat: Make, tmp_path: Path) -> None:
    """Off the lattice, as its groups have 32: the codes are the nearest ones on the stored scales."""
    folder, out = qat(hidden_size=128, intermediate_size=256), tmp_path / "ct"
    result = lowbit.pack(folder, "int4_g128", out, certificate=True)
    assert result.certificate is not None
    with open_checkpoint(folder) as source, open_checkpoint(out) as ours:
        for name, (codes, scales) in parts(out).items():
            wide = scales.float().repeat_interleave(128, 1)
            assert scales.dtype == torch.bfloat16 and scales.shape[1] * 128 == codes.shape[1]
            values = torch.from_numpy(source.read(name))
            assert ((values / wide).clamp(-8, 7) - codes).abs().max() < 0.50001
            assert (ours.read(name) == (codes * wide).numpy()).all()
            assert ours.info(name).grid == "q4_0" and ours.info(name).dtype == "int4_g128"
    lowbit.pack(out, "q4_0", tmp_path / "x.gguf")  # a scale of 128 weights goes into four blocks
    assert lowbit.pack.verify(tmp_path / "x.gguf", out).totals["off_lattice"] < result.certificate.totals["blocks"]
    with open_checkpoint(out) as ours, open_checkpoint(tmp_path / "x.gguf") as gguf:
        assert all((gguf.read(name) == ours.read(name)).all() for name in parts(out))
    in_transformers(out)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_naive_is_the_library(tiny_llama: Make, tmp_path: Path, dtype: str) -> None:
    folder, out = tiny_llama(), tmp_path / "ct"
    tensors = {name: tensor.to(DTYPE[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lowbit.pack(folder, "int4_g32", out, naive=True)
    scheme = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    found = parts(out)
    assert len(found) == 21
    if dtype == "F32":  # kept in float16: the scales are the library's, rounded
        return
    for name, (codes, scales) in found.items():
        groups = tensors[name].unflatten(-1, (-1, 32))
        theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme)
        assert torch.equal(scales, theirs), name
        assert torch.equal(codes, quantize(tensors[name], theirs, None, scheme, dtype=torch.int8)), name


def test_a_ggufs_q4_0(tiny_llama: Make, tmp_path: Path) -> None:
    gguf = lowbit.pack(tiny_llama(), "q4_0", tmp_path / "x.gguf").path
    result = lowbit.pack(gguf, None, tmp_path / "ct", to="compressed-tensors", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"]
    with open_checkpoint(gguf) as source:
        for name, (codes, scales) in parts(tmp_path / "ct").items():
            _, blocks = source.coded_rows(name, 0, codes.shape[0]) or ("", None)
            assert blocks is not None and (blocks.codes.reshape(codes.shape) == codes.numpy()).all()
            assert (blocks.scales == scales.numpy()).all()
    assert (tmp_path / "ct" / "tokenizer.json").is_file()


@pytest.mark.parametrize("grid_name", ["q4_0", "int4_g32"])
def test_what_training_ended_on(trained_on: Callable[[str], Any], tmp_path: Path, grid_name: str) -> None:
    folder, trained = trained_on(grid_name)
    lowbit.pack(folder, "int4_g32", tmp_path / "ct")
    found = parts(tmp_path / "ct")
    assert found.keys() == trained.keys()
    for name, (codes, scales) in found.items():
        assert (trained[name].codes.reshape(codes.shape) == codes.numpy()).all()
        assert scales.dtype == torch.float16 and (trained[name].scales == scales.numpy()).all()


def test_scales_beyond_float16_go_to_mlx_as_they_are(qat: Make, tmp_path: Path) -> None:
    """compressed-tensors to MLX without touching a code: also where a GGUF, whose scales are float16, cannot follow."""
    import mlx.core as mx

    folder, ct, out = qat(), tmp_path / "ct", tmp_path / "mlx"
    lowbit.pack(folder, None, ct, to="compressed-tensors")
    stored = load_file(ct / "model.safetensors")
    stored[f"{MATRIX}_scale"][3, 1], stored[f"{MATRIX}_scale"][4, 1] = 1e-20, 2.0**20
    save_file(stored, ct / "model.safetensors", {"format": "pt"})
    result = lowbit.pack(ct, None, out, to="mlx", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"]
    arrays = dict(mx.load(str(out / "model.safetensors")))
    for name, (codes, scales) in parts(ct).items():
        module = name.removesuffix(".weight")
        words = torch.from_numpy(np.array(arrays[name]).view(np.int32))
        assert torch.equal(words, stored[f"{name}_packed"])  # the two formats' words are the same
        assert arrays[f"{module}.scales"].dtype == mx.bfloat16
        ours = (np.array(arrays[f"{module}.{part}"].astype(mx.float32)) for part in ("scales", "biases"))
        assert all((part == times * scales.float().numpy()).all() for part, times in zip(ours, (1, -8), strict=True))
        assert codes.dtype == torch.int8
    with pytest.raises(BadFile, match="beyond float16"):
        lowbit.pack(ct, "q4_0", tmp_path / "x.gguf")


def test_the_config_is_what_vllm_and_transformers_read(qat: Make, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    lowbit.pack(qat(), "int4_g32", tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text("utf-8"))
    scheme = QuantizationConfig.model_validate(config["quantization_config"])
    [group] = scheme.config_groups.values()
    assert (scheme.format, scheme.quantization_status, scheme.ignore) == ("pack-quantized", "compressed", ["lm_head"])
    assert group.targets == ["Linear"] and group.weights is not None and group.input_activations is None
    assert (group.weights.num_bits, group.weights.group_size, group.weights.symmetric) == (4, 32, True)
    assert config["dtype"] == "bfloat16"


def on_lattice(folder: Path) -> None:
    """Puts the experts on a lattice of absmax/7, BF16 scales, as a checkpoint trained for 4 bit has them."""
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if ".experts." in name:
            groups = stored[name].reshape(*stored[name].shape[:-1], -1, 32)
            scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
            stored[name] = ((groups / scale).round() * scale).bfloat16().float().reshape(stored[name].shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def test_experts_are_matrices_of_their_own(tiny_gemma4_moe: Make, tmp_path: Path) -> None:
    """Every expert's codes lie under its own name, proved to be the source's; on into a GGUF no code changes."""
    folder, out = tiny_gemma4_moe(), tmp_path / "ct"
    on_lattice(folder)
    certificate = lowbit.pack(folder, None, out, to="compressed-tensors", certificate=True).certificate
    assert certificate is not None
    experts = [tensor for tensor in certificate.tensors if ".experts." in tensor.name]
    assert len(experts) == 4 and all(tensor.exact == tensor.blocks > 0 for tensor in experts)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.1.experts.5"
    assert stored[f"{name}.gate_proj.weight_packed"].shape == stored[f"{name}.up_proj.weight_packed"].shape == (32, 8)
    assert stored[f"{name}.down_proj.weight_shape"].tolist() == [64, 32]
    assert not any("experts.gate_up_proj" in key for key in stored)
    config = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert "model.layers.0.router.proj" in config["ignore"]
    lowbit.pack(out, "q4_0", tmp_path / "x.gguf", certificate=True)
    with open_checkpoint(out) as ct, open_checkpoint(tmp_path / "x.gguf") as gguf:
        for tensor in experts:
            ours, theirs = ct.coded_rows(tensor.name, 3, 101), gguf.coded_rows(tensor.name, 3, 101)
            assert ours is not None and theirs is not None and (ours[1].codes == theirs[1].codes).all()
            assert (ct.read(tensor.name) == gguf.read(tensor.name)).all()
    seen = {t["name"]: t["shape"] for t in lowbit.inspect(out)["tensors"]}
    assert seen["model.layers.1.experts.gate_up_proj"] == [8, 64, 64]


@pytest.mark.parametrize("lost", [".3.up_proj.weight_scale", ".7.", ".0.down_proj.weight_packed", "moved"])
def test_experts_that_are_not_whole(tiny_gemma4_moe: Make, tmp_path: Path, lost: str) -> None:
    lowbit.pack(tiny_gemma4_moe(), None, tmp_path / "ct", to="compressed-tensors")
    path = tmp_path / "ct" / "model.safetensors"
    stored = load_file(path)
    if lost == "moved":
        stored = {name.replace("layers.1.experts.7.", "layers.1.experts.9."): t for name, t in stored.items()}
    else:
        stored = {name: t for name, t in stored.items() if f"layers.1.experts{lost}" not in name}
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(BadFile, match=r"not the config's experts|a part of a packed matrix|does not have"):
        open_checkpoint(tmp_path / "ct")


def test_through_the_command_line(qat: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lowbit import console
    from lowbit.cli import main

    folder, out = qat(), tmp_path / "ct"
    assert main(["pack", str(folder), "--to", "compressed-tensors", "-o", str(out)]) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{out}\n" and "int4_g32" in captured.err and "bits per weight" in captured.err
    words = ["pack", "--verify", str(out), "--source", str(folder), "--json", "-", "--quiet"]
    assert main(words) == 0
    console.set_quiet(False)
    assert json.loads(capfd.readouterr().out) == json.loads((out / "certificate.json").read_text("utf-8"))
    assert main(["pack", "--verify", str(out), "--source", str(folder), "--to", "mlx"]) == 2
    assert capfd.readouterr().err == "lowbit: --verify writes nothing; found --to; expected --source alone\n"
