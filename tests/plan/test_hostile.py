"""Configs and files from strangers: a plan or one line, never a crash, whatever the numbers are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit
from layouts import LAYOUTS, drafter
from lowbit.checkpoint import families
from lowbit.cli import main
from lowbit.errors import LowbitError
from random_gguf import write_random

CONFIGS = LAYOUTS | {"drafter": drafter(LAYOUTS["Gemma 4 E2B"])}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 70), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-3, 600), st.sampled_from(["full_attention", "sliding_attention"])), max_size=70),
    st.dictionaries(st.sampled_from(["0", "5", "head_dim", "x"]), st.integers(-1, 600), max_size=3),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_config_has_caches_or_is_refused(name: str, data: st.DataObject) -> None:
    config = dict(CONFIGS[name])
    inner = config["text_config"] = dict(config["text_config"]) if "text_config" in config else config
    if inner is config:
        del config["text_config"]
    for key in data.draw(st.lists(st.sampled_from(sorted(inner)), min_size=1, max_size=3)):
        inner[key] = data.draw(ODD)
    try:
        family = families.by_config(config, "config.json", to_plan=True)
        checked = family.text_config(config, "config.json")
    except LowbitError as error:
        assert "\n" not in str(error)
        return
    layers = family.cache(checked)
    assert len(layers) == checked.get("text_config", checked)["num_hidden_layers"]
    for i, layer in enumerate(layers):
        assert min(layer.kv_heads, layer.k_dim, layer.v_dim) > 0
        assert layer.window is None or layer.window > 0
        if layer.owner is not None and layer.owner >= 0:
            assert layer.owner < i
            assert layers[layer.owner].owner is None
            assert layers[layer.owner].window == layer.window


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"sliding_window": True}, "sliding_window"),
        ({"kv_cache_window": 128}, "unknown key kv_cache_window"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"vocab_size": 2**31}, "llama.cpp refuses to lay this out"),
        ({"model_type": "mamba"}, "unsupported architecture"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "remote code"),
    ],
)
def test_hostile_numbers_are_one_line(
    change: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LAYOUTS["Gemma 3 4B"] | change))
    refused(capsys, [str(path)], says)


@pytest.mark.parametrize("change", [{"hidden_size": 2**30}, {"max_position_embeddings": 2**31}])
def test_what_is_larger_than_any_machine_is_still_planned(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LAYOUTS["Gemma 3 4B"] | change))
    plan = lowbit.plan(path)
    assert plan.total_bytes > 2**33


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}', "\xff\xfe", '{"a":' * 5000])
def test_what_is_no_config_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    refused(capsys, [str(path)], "config.json")


@pytest.mark.parametrize("key", ["block_count", "attention.head_count_kv", "attention.key_length", "context_length"])
@pytest.mark.parametrize("value", [0, 2**32 - 1])
def test_hostile_headers_are_one_line(key: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_random(LAYOUTS["Qwen 3 0.6B"], tmp_path)
    raw, name = bytearray(path.read_bytes()), f"qwen3.{key}".encode()
    at = raw.index(name) + len(name) + 4
    raw[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(raw)
    refused(capsys, [str(path), "--ctx", "0"], "model.gguf")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv", "q3_k"], "unknown kv_type_k"),
        (["--kv", "q8_0:"], "total"),
        (["--kv", "q8_0", "-fa", "off"], "flash attention"),
        (["--slots", "0"], "--slots"),
        (["--slots", "300"], "300"),
        (["--ctx", "-4"], "context"),
        (["--runtime", "ollama"], "no such runtime"),
        (["--recipe", "q9"], "no such recipe"),
        (["--drafter", "no-such"], "no such model"),
        (["--mmproj", "no-such"], "no such model"),
    ],
)
def test_options_that_cannot_work(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LAYOUTS["Gemma 3 4B"]))
    if says == "total":
        assert main(["plan", str(path), *words]) == 0
        return
    refused(capsys, [str(path), *words], says)


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(capsys, ["nobody/no-such-model"], "the hub did not give a model")


def refused(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["plan", *words, "--json", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lowbit: ") and err.count("\n") == 1, err
    assert says in err
