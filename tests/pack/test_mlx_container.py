"""MLX folders, read by MLX itself: lattices, trained codes and the codes of other formats are in them as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, BadOption, CannotWrite, NotFound, Unsupported
from lowbit.pack import model_folder

Make = Callable[..., Path]
MATRIX = "model.layers.0.mlp.down_proj.weight"
MX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def in_mlx(folder: Path) -> tuple[dict[str, mx.array], dict[str, np.ndarray]]:
    """The folder's arrays as MLX loads them, and the float32 value of each tensor as MLX computes it in float32."""
    arrays: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        arrays |= mx.load(str(path))
    config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization", {})
    values = {}
    for name in [n for n in arrays if n.endswith((".weight", ".bias"))]:
        module, array = name.rpartition(".")[0], arrays[name]
        if f"{module}.scales" in arrays and name.endswith(".weight"):
            own = config.get(module, config)
            scales, biases = (arrays[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            array = mx.dequantize(array, scales, biases, own["group_size"], own["bits"], stream=mx.cpu)
        values[name] = np.array(array.astype(mx.float32))
    return arrays, values


def codes_of(arrays: dict[str, mx.array], name: str) -> np.ndarray:
    """The 4-bit codes of a matrix (rows, n), unpacked by hand."""
    words = np.array(arrays[name])
    return (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(len(words), -1)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", ["extremum/-8", "absmax/7", "absmax/7.5", "free scales"])
def test_a_lattice_is_stored_without_loss(
    qat: Make, tmp_path: Path, rounded: Callable[..., np.ndarray], rule: str, dtype: str
) -> None:
    """What MLX reads of every tensor, rounded, is the source; every group is d and -8 d."""
    folder, out = qat(rule=rule, dtype=dtype), tmp_path / "mlx"
    result = lowbit.pack(folder, None, out, to="mlx", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"] > 0
    arrays, values = in_mlx(out)
    with open_checkpoint(folder) as source:
        assert set(values) == set(source.names)
        for name in source.names:
            assert (rounded(values[name], dtype) == source.read(name)).all(), name
    scales, biases = arrays["model.layers.0.mlp.up_proj.scales"], arrays["model.layers.0.mlp.up_proj.biases"]
    assert mx.array_equal(biases, -8 * scales)
    assert arrays["lm_head.weight"].shape[1] == 64 * 8 // 32  # the head has 8 bits
    stored = {arrays[f"{n.removesuffix('.weight')}.scales"].dtype for n in values if n.endswith("proj.weight")}
    assert stored == {mx.float16 if dtype == "F16" else mx.bfloat16}
    assert lowbit.pack.verify(out, folder).to_json() == json.loads((out / "certificate.json").read_text("utf-8"))


@pytest.mark.parametrize("scales", ["F16", "F32"])
def test_scales_that_bf16_does_not_hold(qat: Make, tmp_path: Path, scales: str) -> None:
    """They are stored in float16, and so are the norms, which float16 holds too."""
    folder, out = qat(scales=scales, dtype="BF16"), tmp_path / "mlx"
    result = lowbit.pack(folder, "mlx_affine4_g32", out, certificate=True)
    assert result.certificate is not None and result.certificate.totals["off_lattice"] == 0
    exact = result.certificate.totals["exact"] / result.certificate.totals["blocks"]
    assert exact == 1 if scales == "F16" else exact > 0.9
    arrays, _ = in_mlx(out)
    assert arrays["model.layers.0.mlp.up_proj.scales"].dtype == mx.float16


@pytest.mark.parametrize("recipe", ["mlx_affine4_g64", "mlx_affine8_g32", "mlx_affine8_g64"])
def test_other_recipes(qat: Make, tmp_path: Path, recipe: str, rounded: Callable[..., np.ndarray]) -> None:
    """A lattice of 4 bits fits into 8; groups of 64 hold only what has one scale for 64 weights."""
    folder, out = qat(intermediate_size=192), tmp_path / "mlx"
    result = lowbit.pack(folder, recipe, out, certificate=True)
    assert result.certificate is not None
    proved = {tensor.name: tensor for tensor in result.certificate.tensors}[MATRIX]
    assert proved.type == recipe
    # Neighbours of 32 weights that happen to have the same scale are exact in 64 too.
    assert proved.exact == proved.blocks if recipe == "mlx_affine8_g32" else proved.exact < proved.blocks / 20
    _, values = in_mlx(out)
    with open_checkpoint(folder) as source, open_checkpoint(out) as ours:
        worst = max(abs(rounded(values[n], "BF16") - source.read(n)).max() for n in source.names)
        assert worst < 0.01 and all((ours.read(n) == values[n]).all() for n in source.names)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_naive_is_mlx(tiny_llama: Make, tmp_path: Path, dtype: str) -> None:
    """Every matrix has the words, scales and biases that mx.quantize gives for the same weights."""
    folder, out = tiny_llama(), tmp_path / "mlx"
    tensors = {name: tensor.to(DTYPE[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lowbit.pack(folder, "mlx_affine4_g32", out, naive=True)
    arrays, _ = in_mlx(out)
    kept = MX["F16" if dtype == "F32" else dtype]
    for name in [n for n, tensor in tensors.items() if tensor.ndim == 2]:
        weights = mx.array(tensors[name].float().numpy()).astype(MX[dtype])
        bits, module = 8 if name == "lm_head.weight" else 4, name.removesuffix(".weight")
        words, scales, biases = mx.quantize(weights, group_size=32, bits=bits, stream=mx.cpu)
        assert mx.array_equal(arrays[name], words), name
        assert mx.array_equal(arrays[f"{module}.scales"], scales.astype(kept)), name
        assert mx.array_equal(arrays[f"{module}.biases"], biases.astype(kept)), name


DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def test_an_ordinary_checkpoint_gets_mlxs_rounding(tiny_llama: Make, tmp_path: Path) -> None:
    lowbit.pack(tiny_llama(), "mlx_affine4_g32", tmp_path / "ours")
    lowbit.pack(tiny_llama(), "mlx_affine4_g32", tmp_path / "naive", naive=True)
    ours, naive = (in_mlx(tmp_path / name)[0] for name in ("ours", "naive"))
    assert ours.keys() == naive.keys() and all(mx.array_equal(ours[name], naive[name]) for name in ours)


def test_what_training_ended_on(trained_on: Callable[[str], Any], tmp_path: Path) -> None:
    """Q4_0 codes plus 8 are MLX's codes; float16 scales stay float16."""
    q4_0, (folder, trained) = grids.get("q4_0"), trained_on("q4_0")
    result = lowbit.pack(folder, None, tmp_path / "mlx", to="mlx", certificate=True)
    arrays, values_of = in_mlx(tmp_path / "mlx")
    for name, blocks in trained.items():
        module = name.removesuffix(".weight")
        assert (codes_of(arrays, name) == blocks.codes.reshape(len(blocks.codes), -1) + 8).all()
        assert arrays[f"{module}.scales"].dtype == mx.float16
        assert (np.array(arrays[f"{module}.scales"]) == blocks.scales).all()
        assert (np.array(arrays[f"{module}.biases"]) == -8 * blocks.scales).all()
        assert (values_of[name] == q4_0.dequantize(blocks)).all()
    assert result.certificate is not None
    assert all(t.exact == t.blocks for t in result.certificate.tensors if t.name in trained)


@pytest.mark.parametrize("recipe", ["q4_0", "q4_1", "q8_0", "q5_0", "q5_1"])
def test_a_ggufs_codes(tiny_llama: Make, tmp_path: Path, recipe: str) -> None:
    """Formats of one scale, or a scale and a minimum, go through code for code, with a GGUF's tokenizer."""
    gguf = lowbit.pack(tiny_llama(), recipe, tmp_path / "x.gguf").path
    to = "mlx_affine4_g32" if recipe in ("q4_0", "q4_1") else "mlx_affine8_g32"
    result = lowbit.pack(gguf, to, tmp_path / "mlx", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"]
    _, values = in_mlx(tmp_path / "mlx")
    with open_checkpoint(gguf) as source:
        assert all((values[name] == source.read(name)).all() for name in source.names)
    assert (tmp_path / "mlx" / "tokenizer.json").is_file()


def test_a_folder_of_mlx_lm(qat: Make, tmp_path: Path) -> None:
    """Made by mlx_lm.convert: inspected, verified, and packed on as it is."""
    from mlx_lm import convert

    folder, theirs = qat(rule="absmax/7", intermediate_size=192), tmp_path / "theirs"
    convert(str(folder), mlx_path=str(theirs), quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16")
    found = lowbit.inspect(theirs)
    assert (found["kind"], found["quantization"], found["problem"]) == ("mlx", "affine", None)
    assert found["types"]["mlx_affine4_g64"]["count"] == 16 and 4.4 < found["bits_per_weight"] < 4.7
    proved = {tensor.name: tensor for tensor in lowbit.pack.verify(theirs, folder).tensors}
    assert proved[MATRIX].type == "mlx_affine4_g64" and proved[MATRIX].off_lattice == proved[MATRIX].blocks
    assert 0 < proved[MATRIX].max_error < 0.02
    again = lowbit.pack(theirs, "mlx_affine4_g64", tmp_path / "again", certificate=True)
    first, second = in_mlx(theirs)[0], in_mlx(tmp_path / "again")[0]
    assert again.certificate is not None and again.certificate.totals["exact"] == again.certificate.totals["blocks"]
    same = [name for name in first if "layers" in name]
    assert len(same) > 40 and all(mx.array_equal(first[name], second[name]) for name in same)


def test_experts(tiny_gemma4_moe: Make, synthesised: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """A lattice in 26B-A4B's experts: MLX has gate and up apart, and both are the source's rows, in every expert."""
    folder, out, rng = tiny_gemma4_moe(), tmp_path / "mlx", np.random.default_rng(5)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            flat = (tensor.shape[:-1].numel(), tensor.shape[-1])
            on = synthesised(rng, flat, rule="absmax/7", scales="BF16", group=32, dtype="BF16")
            tensors[name] = torch.from_numpy(on).reshape(tensor.shape)
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = lowbit.pack(folder, None, out, to="mlx", certificate=True)
    assert result.certificate is not None
    assert result.certificate.totals["exact"] == result.certificate.totals["blocks"]
    _, values = in_mlx(out)
    experts = "model.layers.1.experts"
    gate_up, down = (tensors[f"{experts}.{name}"] for name in ("gate_up_proj", "down_proj"))
    for name, expected in zip(("gate_proj", "up_proj"), gate_up.chunk(2, dim=1), strict=True):
        found = torch.from_numpy(values[f"{experts}.switch_glu.{name}.weight"]).bfloat16()
        assert torch.equal(found, expected) and found.dim() == 3
    assert torch.equal(torch.from_numpy(values[f"{experts}.switch_glu.down_proj.weight"]).bfloat16(), down)
    found = lowbit.inspect(out)
    assert found["problem"] is None and found["weights"] == sum(tensor.numel() for tensor in tensors.values())
    again = lowbit.pack(out, None, tmp_path / "again", to="mlx", certificate=True)  # code for code
    assert again.certificate and again.certificate.totals["exact"] == again.certificate.totals["blocks"]
    arrays = dict(mx.load(str(out / "model.safetensors")))
    del arrays[f"{experts}.switch_glu.up_proj.scales"]
    mx.save_safetensors(str(out / "model.safetensors"), arrays, {"format": "mlx"})
    with pytest.raises(BadFile, match=r"switch_glu\.up_proj\.weight: codes and scales do not fit"):
        open_checkpoint(out)


def test_mlx_to_gguf(qat: Make, tmp_path: Path) -> None:
    """There and back: the codes of the lattice are in the GGUF as if it had been packed from the source."""
    folder = qat()
    lowbit.pack(folder, None, tmp_path / "mlx", to="mlx")
    lowbit.pack(tmp_path / "mlx", "q4_0", tmp_path / "x.gguf")
    proved = lowbit.pack.verify(tmp_path / "x.gguf", folder)
    assert proved.totals["exact"] == proved.totals["blocks"]


def test_shards(qat: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm import load

    folder, out = qat(), tmp_path / "mlx"
    lowbit.pack(folder, None, tmp_path / "one", to="mlx")
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 150_000)
    lowbit.pack(folder, None, out, to="mlx", certificate=True)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    weight_map = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    one, several = in_mlx(tmp_path / "one")[0], in_mlx(out)[0]
    assert weight_map.keys() == one.keys() == several.keys()
    assert all(mx.array_equal(one[name], several[name]) for name in one)
    model, tokenizer = load(str(out))
    assert model.model.layers[0].mlp.up_proj.group_size == 32
    assert tokenizer.encode("the", add_special_tokens=False)
    assert lowbit.pack.verify(out, folder).totals["off_lattice"] == 0


# Bad input


def test_a_folder_of_somebody_else_is_left_alone(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "mlx"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CannotWrite, match="a folder with other files has this name"):
        lowbit.pack(folder, None, out, to="mlx", certificate=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    first = lowbit.pack(folder, None, out, to="mlx", certificate=True)
    second = lowbit.pack(folder, "mlx_affine8_g32", out, certificate=True)  # one of ours is replaced
    assert first.certificate and second.certificate and second.size_bytes > first.size_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mlx"]


def test_nothing_is_left_of_a_failure(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "mlx"
    lowbit.pack(folder, None, out, to="mlx", certificate=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in (out, tmp_path / "new"):
        with pytest.raises(BadFile, match=r"model\.norm\.weight: the weights are not finite; found NaN"):
            lowbit.pack(folder, None, path, to="mlx", certificate=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mlx"]


def test_what_does_not_go_together(qat: Make, tiny_llama: Make, tmp_path: Path) -> None:
    for recipe, to, says in (
        ("q4_0", "mlx", "does not have the recipe's format; found q4_0"),
        ("mlx_affine4_g32", "gguf", "found mlx_affine4_g32"),
        ("int4_g32", "mlx", "found int4_g32"),
        (None, "onnx", "no such container; found 'onnx'; expected one of compressed-tensors, gguf, litert-lm, mlx"),
    ):
        with pytest.raises(BadOption, match=says):
            lowbit.pack(qat(), recipe, tmp_path / "x", to=to)
    with pytest.raises(Unsupported, match="a multiple of 64"):
        lowbit.pack(qat(), "mlx_affine4_g64", tmp_path / "x")
    for file in (folder := tiny_llama()).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NotFound, match=r"no tokenizer\.json"):
        lowbit.pack(folder, None, tmp_path / "x", to="mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_certificate_is_of_its_folder(qat: Make, tmp_path: Path) -> None:
    """Other weights, another config: neither goes with the certificate that lies there."""
    folder, out = qat(), tmp_path / "mlx"
    lowbit.pack(folder, None, out, to="mlx", certificate=True)
    for name, change in (
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("config.json", lambda b: b + b" "),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(change(whole))
        with pytest.raises(BadFile, match=r"certificate\.json: the certificate is of another file"):
            lowbit.pack.verify(out, folder)
        (out / name).write_bytes(whole)
    assert lowbit.pack.verify(out, folder).totals["off_lattice"] == 0


def test_one_changed_code_is_one_lost_group(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "mlx"
    lowbit.pack(folder, None, out, to="mlx")
    arrays: dict[str, Any] = dict(mx.load(str(out / "model.safetensors")))
    words = np.array(arrays[MATRIX])
    words[3, 5] ^= 0x10
    mx.save_safetensors(str(out / "model.safetensors"), arrays | {MATRIX: mx.array(words)}, {"format": "mlx"})
    proved = {tensor.name: tensor for tensor in lowbit.pack.verify(out, folder).tensors}
    assert (proved[MATRIX].off_lattice, proved["model.norm.weight"].exact) == (1, 1)


def test_another_model(qat: Make, tiny_gemma3: Make, tiny_llama: Make, tmp_path: Path) -> None:
    lowbit.pack(qat(), None, tmp_path / "mlx", to="mlx")
    with pytest.raises(BadFile, match="not the source's model; found llama; expected gemma3"):
        lowbit.pack.verify(tmp_path / "mlx", tiny_gemma3())
    with pytest.raises(BadFile, match="a tensor of the source is missing"):
        lowbit.pack.verify(tmp_path / "mlx", tiny_llama())
    with pytest.raises(BadFile, match="not the source's shape"):
        lowbit.pack.verify(tmp_path / "mlx", tiny_llama(num_hidden_layers=2, intermediate_size=192))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="not a model folder"):
        lowbit.pack.verify(tmp_path / "empty", tiny_llama())
