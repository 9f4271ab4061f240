"""What fuzzing (tests/fuzz) found, each as the least file that shows it: once a traceback, a warning or gigabytes."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import Field, GgufFile, TensorHead, write_header
from lowbit.errors import BadConfig, BadFile, LowbitError, Unsupported
from lowbit.inspect import inspect
from lowbit.pack import tokenizer

UINT32, Q4_0, F32 = 4, 2, 0


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        b'{"model_type": "llama", "architectures": [{}]}',
        b'{"model_type": "llama", "architectures": 1}',
        b'{"model_type": "llama", "architectures": "LlamaForCausalLM"}',
    ],
)
def test_architectures_that_are_no_names(tiny_llama: Callable[..., Path], text: bytes) -> None:
    folder = tiny_llama()
    (folder / "config.json").write_bytes(text)
    with pytest.raises(BadConfig, match="architectures"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": []}, {"type": {}}, {"rope_theta": 10**400}, {"rope_theta": 1e300}, {"rope_type": 1, "type": "a"}],
)
def test_a_rope_of_another_kind(tiny_llama: Callable[..., Path], rope: dict[str, Any]) -> None:
    folder = tiny_llama()
    change(folder / "config.json", rope_parameters=rope)
    with pytest.raises((BadConfig, Unsupported), match="rope"):
        open_checkpoint(folder)


def write_gguf(path: Path, fields: list[Field], heads: list[TensorHead]) -> Path:
    with open(path, "wb") as handle:
        for head, offset in zip(heads, write_header(handle, fields, heads), strict=True):
            handle.write(bytes(offset + head.n_bytes - handle.tell()))
    return path


@pytest.fixture
def good(tiny_llama: Callable[..., Path], tmp_path: Path) -> GgufFile:
    return GgufFile(lowbit.pack(tiny_llama(), "q4_0", tmp_path / "good.gguf").path)


def heads_of(file: GgufFile) -> list[TensorHead]:
    types = {"F32": F32, "Q4_0": Q4_0, "Q8_0": 8}
    return [TensorHead(name, entry.shape, types[entry.dtype]) for name, entry in file.entries.items()]


@pytest.mark.parametrize("keys", [["block_count"], ["attention.key_length", "rope.dimension_count"]])
def test_a_gguf_that_claims_billions(good: GgufFile, tmp_path: Path, keys: list[str]) -> None:
    """Layers were listed, and rotary frequencies computed, before anything compared them with the file."""
    claimed = {f"llama.{key}" for key in keys}
    fields = [f._replace(value=2**31 - 2) if f.key in claimed else f for f in good.fields]
    heads = [*heads_of(good), TensorHead("rope_freqs.weight", (8,), F32)]
    path = write_gguf(tmp_path / "x.gguf", fields, heads)
    tracemalloc.start()
    with pytest.raises(LowbitError):
        open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_layers_in_a_config_that_the_weights_do_not_have(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    change(folder / "config.json", num_hidden_layers=10_000)
    tracemalloc.start()
    with pytest.raises(BadFile, match="more layers"):
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_norm_in_blocks(good: GgufFile, tmp_path: Path) -> None:
    """Read as values; blocks are for matrices, whose rows they are."""
    name = "output_norm.weight"
    heads = [TensorHead(h.name, h.shape, Q4_0) if h.name == name else h for h in heads_of(good)]
    with open_checkpoint(write_gguf(tmp_path / "x.gguf", good.fields, heads)) as checkpoint:
        assert checkpoint.info("model.norm.weight").grid is None
        assert checkpoint.blocks("model.norm.weight") is None
        assert checkpoint.read("model.norm.weight").shape == (64,)


@pytest.mark.parametrize("keys", [{"source": []}, {"tensors": {"model.norm.weight": {"grid": {}}}}])
def test_a_manifest_of_other_kinds(tiny_llama: Callable[..., Path], keys: dict[str, Any]) -> None:
    folder = tiny_llama()
    (folder / "lowbit.json").write_text(json.dumps({"format": "lowbit-checkpoint/1"} | keys), encoding="utf-8")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.name == "llama" and checkpoint.license is None
        assert checkpoint.blocks("model.norm.weight") is None


def test_a_grid_that_is_no_unicode(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    tensors = {"model.norm.weight": {"grid": "\ud800"}}
    (folder / "lowbit.json").write_text(json.dumps({"format": "lowbit-checkpoint/1", "tensors": tensors}))
    assert json.dumps(inspect(folder), ensure_ascii=False).encode("utf-8")


def test_a_quantization_that_is_no_unicode(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    change(folder / "config.json", quantization_config={"quant_method": "\ud800"})
    assert inspect(folder)["quantization"] == "?"


@pytest.mark.parametrize("dtype", [28, F32])
def test_values_beyond_float32_warn_of_nothing(good: GgufFile, tmp_path: Path, dtype: int) -> None:
    """A double that overflows, and a signalling NaN, are told in one line where the values are used."""
    name = "output_norm.weight"
    heads = [TensorHead(h.name, h.shape, dtype) if h.name == name else h for h in heads_of(good)]
    path = write_gguf(tmp_path / "x.gguf", good.fields, heads)
    data, start = bytearray(path.read_bytes()), GgufFile(path).entries[name].start
    data[start : start + 8] = b"\x01\x00\xa0\x7f\x01\x00\xa0\x7f"
    path.unlink()
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadFile, match=r"output_norm|model\.norm"):
            lowbit.pack(path, "q4_0", tmp_path / "out.gguf")


SETTINGS = "tokenizer_config.json"
TOKENIZERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "half a surrogate": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"\ud800": 5})),
    "a merge of three": ("tokenizer.json", lambda t: t["model"].update(byte_fallback=True, merges=["a b c"])),
    "a template's name is a list": (SETTINGS, lambda t: t.update(chat_template=[{"name": [], "template": "x"}])),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(tiny_llama: Callable[..., Path], tmp_path: Path, case: str) -> None:
    folder, (name, edit) = tiny_llama(), TOKENIZERS[case]
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(value)
    if value.get("model", {}).get("byte_fallback"):
        value |= {"normalizer": None, "pre_tokenizer": None}
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(BadFile):
        lowbit.pack(folder, "q4_0", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_template_that_is_no_text(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadFile, match=r"chat_template\.jinja: not UTF-8"):
        tokenizer.metadata(folder, {}, 320)


def test_steps_within_steps(tiny_llama: Callable[..., Path]) -> None:
    """Python 3.11's JSON parser gives up first; that of later versions goes deeper than Python's own stack."""
    folder = tiny_llama()
    deep = '{"type": "Sequence", "pretokenizers": [' * 900 + "]}" * 900
    text = '{"model": {"type": "BPE"}, "pre_tokenizer": ' + deep + "}"
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadFile, match=r"tokenizer\.json"):
        tokenizer.metadata(folder, {}, 320)


def test_compressed_parts_of_a_vector_and_scales_beyond_float32(tmp_path: Path) -> None:
    from lowbit.checkpoint import compressed_tensors
    from lowbit.checkpoint.safetensors_file import SafetensorsFile, write_files

    scheme = compressed_tensors.CompressedTensors(32)
    with pytest.raises(BadFile, match="no matrix"):
        scheme.check({}, "model.norm.weight", (64,))
    parts = {
        "x_packed": (np.zeros((1, 4), np.int32), "I32"),
        "x_scale": (np.full((1, 1), 3e38, np.float32), "F32"),
        "x_shape": (np.array([1, 32], np.int64), "I64"),
    }

    def fill(writers: dict[str, Any]) -> None:
        for name, (values, dtype) in parts.items():
            writers["x"].add(name, values, dtype)

    write_files({"x": tmp_path / "x.safetensors"}, parts, fill)
    files = dict.fromkeys(parts, SafetensorsFile(tmp_path / "x.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(scheme.read_rows(files, "x", 0, 1)).all()
