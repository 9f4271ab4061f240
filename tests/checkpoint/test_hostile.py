"""Files that lie: each is refused in one line that names the file, before anything of the claimed size is allocated."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.safetensors_file import read_header
from lowbit.errors import BadConfig, BadFile, LowbitError, NotFound, Unsupported

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
B = {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]}


def safetensors(path: Path, header: Any, n_bytes: int, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


LIES: dict[str, tuple[Any, int, int | None]] = {
    "header longer than the file": (GOOD, 24, 10_000),
    "header of 2^63 bytes": (GOOD, 24, 2**63),
    "not JSON": (b"{nope", 24, None),
    "deep JSON": (b"[" * 100_000, 24, None),
    "not an object": ([1], 24, None),
    "a key twice": (
        b'{"a":' + json.dumps(GOOD["a"]).encode() + b',"a":' + json.dumps(GOOD["a"]).encode() + b"}",
        24,
        None,
    ),
    "truncated data": (GOOD, 23, None),
    "bytes after the end": (GOOD, 25, None),
    "shape against bytes": (entry(shape=[2, 4]), 24, None),
    "shape of 2^61": (entry(shape=[2**61]), 24, None),
    "negative shape": (entry(shape=[-2, -3]), 24, None),
    "shape is text": (entry(shape="23"), 24, None),
    "offsets backwards": (entry(data_offsets=[24, 0]), 24, None),
    "offsets past the end": (entry(data_offsets=[100, 124]), 24, None),
    "unknown dtype": (entry(dtype="Q9"), 24, None),
    "extra key": (entry(code="import os"), 24, None),
    "overlap": (GOOD | {"b": B | {"data_offsets": [16, 24]}}, 24, None),
    "a hole": (GOOD | {"b": B | {"data_offsets": [28, 36]}}, 36, None),
    "metadata is a list": (GOOD | {"__metadata__": [1]}, 24, None),
}


def test_the_good_one_is_read(tmp_path: Path) -> None:
    entries, _ = read_header(safetensors(tmp_path / "x", GOOD | {"b": B}, 32))
    assert entries["a"].shape == (2, 3)
    assert entries["b"].start == entries["a"].start + 24


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors(tmp_path: Path, lie: str) -> None:
    path = safetensors(tmp_path / "model.safetensors", *LIES[lie])
    with pytest.raises(BadFile) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 9])
def test_short_safetensors(tmp_path: Path, size: int) -> None:
    path = safetensors(tmp_path / "x", GOOD, 24)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadFile):
        read_header(path)


@pytest.fixture(scope="module")
def small_gguf(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("hostile")
    save_tiny_llama(folder, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return lowbit.pack(folder, "q4_0", folder / "x.gguf").path.read_bytes()


def test_every_truncation_of_a_gguf_is_refused(small_gguf: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for size in [*range(0, 400), *range(400, len(small_gguf), 997), len(small_gguf) - 1]:
        path.write_bytes(small_gguf[:size])
        with pytest.raises(BadFile) as caught:
            GgufFile(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(small_gguf)
    assert GgufFile(path).entries


def _key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def gguf_lies(data: bytes) -> dict[str, bytes]:
    huge = struct.pack("<Q", 2**62)
    norm = _key("output_norm.weight")
    at = data.index(norm) + len(norm)  # n_dims, dims, type, offset
    blocks = _key("token_embd.weight")
    at_q = data.index(blocks) + len(blocks)
    tokens = _key("tokenizer.ggml.tokens")
    at_t = data.index(tokens) + len(tokens)  # array, subtype, count, strings
    return {
        "magic": b"GGML" + data[4:],
        "tensor count": data[:8] + huge + data[16:],
        "key count": data[:16] + huge + data[24:],
        "first key's length": data[:24] + huge + data[32:],
        "array count": data[: at_t + 8] + huge + data[at_t + 16 :],
        "string length in an array": data[: at_t + 16] + huge + data[at_t + 24 :],
        "nested array": data[: at_t + 4] + struct.pack("<I", 9) + data[at_t + 8 :],
        "unknown value type": data[:at_t] + struct.pack("<I", 77) + data[at_t + 4 :],
        "five dimensions": data[:at] + struct.pack("<I", 5) + data[at + 4 :],
        "no dimensions": data[:at] + struct.pack("<I", 0) + data[at + 4 :],
        "a dimension of 2^62": data[: at + 4] + huge + data[at + 12 :],
        "a dimension of 0": data[: at + 4] + bytes(8) + data[at + 12 :],
        "an offset past the end": data[: at + 16] + struct.pack("<Q", 2**40) + data[at + 24 :],
        "an offset on another tensor": data[: at + 16] + bytes(8) + data[at + 24 :],
        "an offset off the alignment": data[: at + 16] + struct.pack("<Q", 33) + data[at + 24 :],
        "rows that are no whole blocks": data[: at_q + 4] + struct.pack("<Q", 31) + data[at_q + 12 :],
        "a key twice": data.replace(_key("general.name"), _key("general.type"), 1),
    }


LIE_NAMES = [
    "magic", "tensor count", "key count", "first key's length", "array count", "string length in an array",
    "nested array", "unknown value type", "five dimensions", "no dimensions", "a dimension of 2^62",
    "a dimension of 0", "an offset past the end", "an offset on another tensor", "an offset off the alignment",
    "rows that are no whole blocks", "a key twice",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIE_NAMES)
def test_lying_gguf(small_gguf: bytes, tmp_path: Path, lie: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_lies(small_gguf)[lie])
    with pytest.raises(BadFile) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_gguf_with_flipped_bytes_is_read_or_refused(small_gguf: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the header says, opening ends in a checkpoint or in a LowbitError."""
    header = 9000  # key-values and tensor table of the tiny model
    broken = bytearray(small_gguf)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.gguf"
    path.write_bytes(bytes(broken))
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.read(checkpoint.names[0])
    except LowbitError as error:
        assert "\n" not in str(error)


def test_big_endian_gguf(small_gguf: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + small_gguf[8:])
    with pytest.raises(Unsupported, match="big-endian"):
        GgufFile(tmp_path / "x.gguf")


# Folders


def set_config(folder: Path, remove: str | None = None, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    if remove:
        del config[remove]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "model_type"])
def test_a_missing_key_is_named(tiny_llama: Callable[..., Path], key: str) -> None:
    folder = tiny_llama()
    set_config(folder, remove=key)
    with pytest.raises(BadConfig, match=f"config.json: missing key {key}"):
        open_checkpoint(folder)


def test_an_unknown_key_is_named(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    set_config(folder, residual_scale=0.5)
    with pytest.raises(BadConfig, match=r"config.json: unknown key residual_scale"):
        open_checkpoint(folder)


BAD_VALUES: dict[str, tuple[dict[str, Any], type[LowbitError]]] = {
    "a negative size": ({"hidden_size": -64}, BadConfig),
    "a size in text": ({"hidden_size": "64"}, BadConfig),
    "a trillion layers": ({"num_hidden_layers": 10**12}, BadConfig),
    "true for a size": ({"vocab_size": True}, BadConfig),
    "heads that do not divide": ({"num_key_value_heads": 3}, BadConfig),
    "another activation": ({"hidden_act": "relu"}, Unsupported),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, Unsupported),
    "already quantized": ({"quantization_config": {"bits": 4}}, Unsupported),
    "another rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, Unsupported),
    "a rope without its factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, BadConfig),
    "another architecture": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, Unsupported),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, Unsupported),
    "shapes that are not the weights'": ({"intermediate_size": 96}, BadFile),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(tiny_llama: Callable[..., Path], case: str) -> None:
    changes, error = BAD_VALUES[case]
    folder = tiny_llama()
    set_config(folder, **changes)
    with pytest.raises(error):
        open_checkpoint(folder)


GEMMA_VALUES: dict[str, dict[str, Any]] = {
    "another scale": {"query_pre_attn_scalar": 16},
    "another pattern": {"layer_types": ["full_attention"] * 7},
    "capped logits": {"final_logit_softcapping": 30.0},
    "biases": {"attention_bias": True},
    "another local base": {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}},
}


@pytest.mark.parametrize("case", GEMMA_VALUES)
def test_gemma_settings_that_llama_cpp_would_ignore(tiny_gemma3: Callable[..., Path], case: str) -> None:
    folder = tiny_gemma3()
    set_config(folder, **GEMMA_VALUES[case])
    with pytest.raises(Unsupported):
        open_checkpoint(folder)


def test_unsupported_lists_what_is(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    set_config(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(Unsupported, match=r"found GPT2LMHeadModel; expected one of .*LlamaForCausalLM"):
        open_checkpoint(folder)


def test_a_folder_of_pickles(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(Unsupported, match=r"pickle.*save_pretrained"):
        open_checkpoint(folder)


def test_shards(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama()
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    with open_checkpoint(folder) as one, open_checkpoint(sharded) as many:
        assert all((one.read(name) == many.read(name)).all() for name in one.names)
    index["weight_map"]["lm_head.weight"] = "../../etc/passwd.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match="outside the folder"):
        open_checkpoint(sharded)
    index["weight_map"]["lm_head.weight"] = "model-00099-of-00099.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotFound, match="a shard is missing"):
        open_checkpoint(sharded)


def test_a_missing_and_an_extra_tensor(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama()
    set_config(folder, num_hidden_layers=2)
    with pytest.raises(BadFile, match=r"model\.layers\.2\.\S+: a tensor that the config does not have"):
        open_checkpoint(folder)
    set_config(folder, num_hidden_layers=4)
    with pytest.raises(BadFile, match=r"model\.layers\.3\.\S+: a tensor of the model is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff\xfe"])
def test_a_config_that_is_no_config(tiny_llama: Callable[..., Path], text: str) -> None:
    folder = tiny_llama()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadConfig, match=r"config\.json"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="smollm2-135m"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"config\.json"):
        open_checkpoint(tmp_path / "empty")


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match=r"some-org/some-model.*network") as caught:
        open_checkpoint("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_a_lone_safetensors_file(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(Unsupported, match="Give its folder"):
        open_checkpoint(tiny_llama() / "model.safetensors")


def test_a_folder_that_holds_one_gguf(small_gguf: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small_gguf)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.kind == "gguf"
    shutil.copy(tmp_path / "x.gguf", tmp_path / "y.gguf")
    with pytest.raises(NotFound, match=r"one .gguf file"):
        open_checkpoint(tmp_path)
