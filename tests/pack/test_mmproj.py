"""The mmproj: which tensor has which type, what is proved of it, and nothing half-written where it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.projector import open_projector
from lowbit.cli import main
from lowbit.errors import BadFile, BadOption

Make = Callable[..., tuple[Path, Any]]
# What conversion/gemma.py of llama.cpp makes of these checkpoints with --mmproj and --outtype, tensors named in full.
GEMMA3_TYPES = {
    "f16": {"v.patch_embd.weight": "F32", "v.position_embd.weight": "F32", "mm.input_projection.weight": "F16",
            "v.blk.0.attn_q.weight": "F16", "v.blk.0.ffn_down.weight": "F16"},
    "bf16": {"v.patch_embd.weight": "F32", "v.position_embd.weight": "F32", "mm.input_projection.weight": "F16",
             "v.blk.0.attn_q.weight": "BF16", "v.blk.0.ffn_down.weight": "BF16"},
    # ffn_down has rows of 80, as SigLIP's has 4304: not whole blocks of 32.
    "q8_0": {"v.patch_embd.weight": "F32", "v.position_embd.weight": "F32", "mm.input_projection.weight": "F16",
             "v.blk.0.attn_q.weight": "Q8_0", "v.blk.0.ffn_down.weight": "F16"},
    "f32": {"v.patch_embd.weight": "F32", "mm.input_projection.weight": "F32", "v.blk.0.attn_q.weight": "F32"},
}  # fmt: skip
GEMMA4_TYPES = {
    "f16": {"v.patch_embd.weight": "F16", "v.position_embd.weight": "F32", "mm.input_projection.weight": "F16",
            "a.conv1d.0.weight": "F32", "a.input_projection.weight": "F32", "a.blk.0.conv_dw.weight": "F32",
            "a.blk.0.conv_pw1.weight": "F16", "mm.a.input_projection.weight": "F16"},
    "q8_0": {"v.patch_embd.weight": "F32", "v.position_embd.weight": "F32", "mm.input_projection.weight": "Q8_0",
             "a.conv1d.1.weight": "F32", "a.input_projection.weight": "F32", "a.blk.0.conv_dw.weight": "F32",
             "a.blk.0.attn_k_rel.weight": "Q8_0", "a.pre_encode.out.weight": "Q8_0",
             "mm.a.input_projection.weight": "F16"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "recipe", "expected"),
    [
        *(("gemma3", recipe, expected) for recipe, expected in GEMMA3_TYPES.items()),
        *(("gemma4", recipe, expected) for recipe, expected in GEMMA4_TYPES.items()),
    ],
)
def test_types(tiny_towers: Make, tmp_path: Path, family: str, recipe: str, expected: dict[str, str]) -> None:
    folder, _ = tiny_towers(family)
    lowbit.pack(folder, recipe, tmp_path / "out.gguf", mmproj=True)
    file = GgufFile(tmp_path / "out.gguf")
    assert {name: file.entries[name].dtype for name in expected} == expected
    assert all(entry.dtype == "F32" for entry in file.entries.values() if len(entry.shape) == 1)


def test_values_and_keys(tiny_towers: Make, tmp_path: Path) -> None:
    """F32: Gemma's norm plus one, all else of SigLIP's as it is; and what every GGUF says of itself."""
    folder, _ = tiny_towers("gemma3")
    result = lowbit.pack(folder, "f32", tmp_path / "out.gguf", mmproj=True)
    file = GgufFile(tmp_path / "out.gguf")
    with open_projector(folder) as source:
        for spec in source.specs.values():
            values = file.raw(spec.gguf_name).view(np.float32).reshape(file.entries[spec.gguf_name].shape)
            offset = 1 if spec.gguf_name == "mm.soft_emb_norm.weight" else 0
            assert np.array_equal(values, source.read(spec.name) + np.float32(offset)), spec.name
        assert result.n_weights == source.n_weights
    assert (file.values["general.architecture"], file.values["general.type"]) == ("clip", "mmproj")
    assert (file.values["general.file_type"], file.values["clip.vision.projector.scale_factor"]) == (0, 2)
    assert not any(key.startswith("tokenizer.") for key in file.values)


def test_orders_of_gemma_4(tiny_towers: Make, tmp_path: Path) -> None:
    """Pixels by colour instead of by place; bounds as one number; softplus of the audio tower's scales."""
    folder, model = tiny_towers("gemma4")
    lowbit.pack(folder, "f32", tmp_path / "out.gguf", mmproj=True)
    file = GgufFile(tmp_path / "out.gguf")

    def stored(name: str) -> np.ndarray:
        return file.raw(name).view(np.float32).reshape(file.entries[name].shape)

    patch = model.model.vision_tower.patch_embedder.input_proj.weight.detach().numpy()
    kernel = stored("v.patch_embd.weight")
    for row, column, colour in ((0, 0, 0), (0, 1, 0), (2, 3, 1), (3, 0, 2)):
        assert np.array_equal(kernel[:, colour, row, column], patch[:, (row * 4 + column) * 3 + colour])
    linear = model.model.vision_tower.encoder.layers[1].mlp.down_proj
    assert stored("v.blk.1.ffn_down.input_max") == linear.input_max.numpy()
    assert stored("v.blk.1.ffn_down.output_min") == linear.output_min.numpy()
    scale = model.model.audio_tower.layers[0].self_attn.per_dim_scale.detach().numpy().astype(np.float64)
    assert np.allclose(stored("a.blk.0.per_dim_scale.weight"), np.log(1 + np.exp(scale)), rtol=1e-6)
    # llama.cpp's files have these two under each other's name.
    conv = model.model.audio_tower.layers[0].lconv1d
    assert np.array_equal(stored("a.blk.0.conv_norm.weight"), conv.pre_layer_norm.weight.detach().numpy())


def test_no_bound_is_the_largest_number(tiny_towers: Make, tmp_path: Path) -> None:
    folder = _copy(tiny_towers("gemma4")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.input_max"
    save_file(tensors | {name: np.array(np.inf, np.float32)}, folder / "model.safetensors", {"format": "pt"})
    lowbit.pack(folder, "f16", tmp_path / "out.gguf", mmproj=True)
    stored = GgufFile(tmp_path / "out.gguf").raw("v.blk.0.attn_q.input_max").view(np.float32)
    assert stored == np.finfo(np.float32).max


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified"])
def test_the_command_and_its_certificate(
    tiny_towers: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder, out = tiny_towers(family)[0], tmp_path / "out.gguf"
    assert main(["pack", str(folder), "--mmproj", "--recipe", "f32", "-o", str(out)]) == 0
    said = json.loads((tmp_path / "out.gguf.certificate.json").read_text())
    with open_projector(folder) as source:
        assert [tensor["name"] for tensor in said["tensors"]] == list(source.names)
    assert said["totals"]["blocks"] == said["totals"]["exact"] > 0
    assert main(["pack", "--verify", str(out), "--source", str(folder)]) == 0
    # F16 is the default, and of values that are finer than it not exact.
    assert main(["pack", str(folder), "--mmproj", "-o", str(out), "--quiet"]) == 0
    assert GgufFile(out).values["general.file_type"] == 1
    said = json.loads((tmp_path / "out.gguf.certificate.json").read_text())
    assert 0 < said["totals"]["exact"] < said["totals"]["blocks"]
    capsys.readouterr()
    assert main(["inspect", str(out), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] is None
    assert (
        found["projectors"]
        == {
            "gemma3": {"vision": "gemma3"},
            "gemma4": {"vision": "gemma4v", "audio": "gemma4a"},
            "gemma4_unified": {"vision": "gemma4uv", "audio": "gemma4ua"},
        }[family]
    )
    assert found["projection_size"] == 64


def test_inspect_shows_what_it_is(tiny_towers: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowbit.pack(tiny_towers("gemma4")[0], "f16", tmp_path / "out.gguf", mmproj=True)
    assert main(["inspect", str(tmp_path / "out.gguf")]) == 0
    assert "gemma4v (vision), gemma4a (audio)" in capsys.readouterr().out


def test_a_tower_for_another_model_is_not_verified(tiny_towers: Make, tmp_path: Path) -> None:
    lowbit.pack(tiny_towers("gemma3")[0], "f16", tmp_path / "out.gguf", mmproj=True)
    with pytest.raises(BadFile, match="made from this source"):
        lowbit.pack.verify(tmp_path / "out.gguf", tiny_towers("gemma4")[0])  # type: ignore[attr-defined]


def test_a_changed_weight_is_found(tiny_towers: Make, tmp_path: Path) -> None:
    folder, out = tiny_towers("gemma4")[0], tmp_path / "out.gguf"
    lowbit.pack(folder, "f32", out, mmproj=True)
    entry, data = GgufFile(out).entries["v.patch_embd.weight"], bytearray(out.read_bytes())
    data[entry.start + 3] ^= 0x40
    out.write_bytes(data)
    proof = lowbit.pack.verify(out, folder)  # type: ignore[attr-defined]
    wrong = [tensor.name for tensor in proof.tensors if tensor.off_lattice]
    assert wrong == ["model.vision_tower.patch_embedder.input_proj.weight"]


def test_source_is_the_checkpoints_own_type(tiny_towers: Make, tmp_path: Path) -> None:
    folder = _copy(tiny_towers("gemma3")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.astype(np.float16) for name, t in tensors.items()}, folder / "model.safetensors")
    lowbit.pack(folder, "source", tmp_path / "out.gguf", mmproj=True)
    assert GgufFile(tmp_path / "out.gguf").entries["v.blk.0.attn_q.weight"].dtype == "F16"


def test_recipes_without_kernels_are_refused(tiny_towers: Make, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="f16, bf16, f32, q8_0"):
        lowbit.pack(tiny_towers("gemma3")[0], "q4_0", tmp_path / "out.gguf", mmproj=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"imatrix": "x.gguf"}, "packed by a recipe; found imatrix"),
        ({"calibration": "x.safetensors"}, "packed by a recipe; found calibration"),
        ({"bits": 4.5}, "packed by a recipe; found bits"),
        ({"size": 1 << 20}, "packed by a recipe; found size"),
        ({"to": "mlx"}, "an mmproj is a GGUF; found mlx"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    tiny_towers: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any], says: str
) -> None:
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    folder, out = tiny_towers("gemma3")[0], tmp_path / "out.gguf"
    assert main(["pack", str(folder), "--mmproj", *given, "-o", str(out), "--quiet"]) == 2
    assert says in capfd.readouterr().err
    assert main(["pack", "--verify", str(out), "--source", str(folder), *given]) == 2
    assert f"found {given[0]}" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_open_text_model_has_no_towers(tiny_towers: Make, tmp_path: Path) -> None:
    with (
        open_checkpoint(tiny_towers("gemma3")[0]) as text_model,
        pytest.raises(BadOption, match="open as a text model"),
    ):
        lowbit.pack(text_model, "f16", tmp_path / "out.gguf", mmproj=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["no tower", "missing", "not a number", "a bound that is no number"])
def test_what_cannot_be_packed_is_one_line(
    tiny_towers: Make, tiny_llama: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    says = {"no tower": "no vision or audio tower", "missing": "missing"}.get(case, "NaN")
    if case == "no tower":
        folder = tiny_llama()
    else:
        folder = _copy(tiny_towers("gemma4")[0], tmp_path)
        tensors = load_file(folder / "model.safetensors")
        name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"
        if case == "missing":
            del tensors[name]
        elif case == "not a number":
            tensors[name][3, 4] = np.nan
        else:
            tensors[name.replace("linear.weight", "input_max")] = np.array(np.nan, np.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    assert main(["pack", str(folder), "--mmproj", "-o", str(tmp_path / "out" / "out.gguf"), "--quiet"]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert list((tmp_path / "out").iterdir()) == []


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))
