"""lowbit inspect over real containers: what it says is what the bytes are, and a lie is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit
from lowbit import grid
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.errors import BadFile, NotFound


def _strange_gguf(path: Path, *, name: str = "Strange") -> Path:
    """A valid GGUF of an architecture that lowbit does not know."""
    writer = gguf.GGUFWriter(path, "mamba-next")
    writer.add_name(name)
    writer.add_block_count(3)
    writer.add_tensor("a.weight", np.zeros((6, 64), np.float32))
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("b.weight", np.zeros((4, 68), np.uint8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_real_gguf(packaged_gguf: Callable[[str], Path]) -> None:
    path = packaged_gguf("smollm2-135m")
    found = lowbit.inspect("smollm2-135m")
    assert json.loads(json.dumps(found)) == found
    assert {key: found[key] for key in ("path", "kind", "architecture", "license", "tied", "problem", "layers")} == {
        "path": str(path), "kind": "gguf", "architecture": "llama", "license": "apache-2.0", "tied": True,
        "problem": None, "layers": 30,
    }  # fmt: skip
    assert found["weights"] == 134_515_008
    assert found["size_bytes"] == path.stat().st_size
    # gguf-py's own reader agrees on every tensor.
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert {t["name"] for t in found["tensors"]} == set(theirs)
    for tensor in found["tensors"]:
        other = theirs[tensor["name"]]
        assert tensor["shape"] == other.shape.tolist()[::-1]
        assert (tensor["dtype"], tensor["bytes"]) == (other.tensor_type.name, other.n_bytes)
    assert found["bits_per_weight"] == 8 * sum(int(t.n_bytes) for t in theirs.values()) / found["weights"]
    assert {dtype: t["count"] for dtype, t in found["types"].items()} == {"Q8_0": 1, "F32": 61, "Q4_1": 210}


def test_a_gguf_of_an_unknown_architecture_still_shows_its_tensors(tmp_path: Path) -> None:
    found = lowbit.inspect(_strange_gguf(tmp_path / "strange.gguf"))
    assert (found["architecture"], found["name"], found["layers"]) == ("mamba-next", "Strange", 3)
    assert "mamba-next" in found["problem"]
    assert found["tensors"] == [
        {"name": "a.weight", "shape": [6, 64], "dtype": "F32", "bytes": 6 * 64 * 4, "lattice": "none"},
        {"name": "b.weight", "shape": [4, 64], "dtype": "Q8_0", "bytes": 4 * 68},
    ]
    assert found["types"]["Q8_0"] == {"count": 1, "weights": 256, "bytes": 272}
    assert found["bits_per_weight"] == 8 * (1536 + 272) / (384 + 256)


def test_a_name_that_is_not_utf8_still_gives_json(tmp_path: Path) -> None:
    path = _strange_gguf(tmp_path / "strange.gguf", name="Str@nge")
    path.write_bytes(path.read_bytes().replace(b"Str@nge", b"Str\xffnge"))
    json.dumps(lowbit.inspect(path), ensure_ascii=False).encode("utf-8")


def test_a_hugging_face_folder(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    found = lowbit.inspect(folder)
    stored = load_file(folder / "model.safetensors")
    assert (found["kind"], found["architecture"], found["tied"], found["problem"]) == (
        "safetensors", "llama", False, None,
    )  # fmt: skip
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == {n: v.shape for n, v in stored.items()}
    assert (found["layers"], found["hidden_size"], found["context_length"]) == (3, 64, 512)
    assert found["weights"] == sum(v.size for v in stored.values())
    assert found["bits_per_weight"] == 32
    assert found["grids"] == {}
    alone = lowbit.inspect(folder / "model.safetensors")
    assert alone["tensors"] == found["tensors"]
    assert "config.json" in alone["problem"]


def test_a_trained_checkpoint_names_its_grids(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    q4_0, on_grid = grid.get("q4_0"), "model.layers.1.mlp.up_proj.weight"
    with open_checkpoint(tiny_llama()) as source:
        blocks = q4_0.quantize(source.read(on_grid))
        tensors = [
            Tensor(name=name, values=q4_0.dequantize(blocks), grid="q4_0", blocks=q4_0.pack(blocks))
            if name == on_grid
            else Tensor(name=name, values=source.read(name))
            for name in source.names
        ]
        write_checkpoint(tmp_path / "trained", source, tensors)
    found = lowbit.inspect(tmp_path / "trained")
    assert found["grids"] == {"q4_0": 1}
    assert {t["name"]: t["grid"] for t in found["tensors"] if "grid" in t} == {on_grid: "q4_0"}
    assert found["problem"] is None


def test_an_unsupported_folder_shows_its_tensors_and_the_reason(tmp_path: Path) -> None:
    save_file({"w": np.zeros((2, 8), np.int32)}, tmp_path / "model.safetensors")
    config = {"model_type": "mystery", "quantization_config": {"quant_method": "gptq"}, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = lowbit.inspect(tmp_path)
    assert (found["architecture"], found["quantization"], found["hidden_size"]) == ("mystery", "gptq", 8)
    assert "mystery" in found["problem"]
    assert found["tensors"] == [{"name": "w", "shape": [2, 8], "dtype": "I32", "bytes": 64}]
    assert found["bits_per_weight"] is None  # several weights in one integer: what each costs is not known


def test_truncated_and_lying_files_are_refused(tmp_path: Path) -> None:
    whole = _strange_gguf(tmp_path / "strange.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 60, len(whole) - 300):
        cut.write_bytes(whole[:size])
        with pytest.raises(BadFile, match=r"cut\.gguf"):
            lowbit.inspect(cut)
    lying = bytearray(whole)
    lying[8:16] = (2**40).to_bytes(8, "little")  # the tensor count
    cut.write_bytes(lying)
    with pytest.raises(BadFile, match="more than the file can hold"):
        lowbit.inspect(cut)
    with pytest.raises(NotFound, match="no such model"):
        lowbit.inspect(tmp_path / "none.gguf")
