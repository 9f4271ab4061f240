"""Tokenizers that GGUF cannot say are refused, not approximated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import BadFile, Unsupported
from lowbit.pack import tokenizer as packer


@pytest.fixture
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=1)


def change(folder: Path, file: str = "tokenizer.json", **parts: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | parts), "utf-8")


def values(folder: Path, vocab_size: int = 320, **config: Any) -> dict[str, Any]:
    return {field.key: field.value for field in packer.metadata(folder, config, vocab_size)}


def model(folder: Path, **parts: Any) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"] | parts


REFUSED: dict[str, dict[str, Any]] = {
    "a normalizer": {"normalizer": {"type": "NFC"}},
    "an unknown split": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}},
    "whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    "no split": {"pre_tokenizer": None},
    "a prefix space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, case: str) -> None:
    change(folder, **REFUSED[case])
    with pytest.raises(Unsupported, match=r"tokenizer\.json"):
        values(folder)


def test_other_models_are_refused(folder: Path) -> None:
    change(folder, model=model(folder, type="Unigram"))
    with pytest.raises(Unsupported, match="found Unigram"):
        values(folder)


BROKEN: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "merges of three": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}},
    "a vocabulary of lists": {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
    "an added token without id": {"added_tokens": [{"content": "x"}]},
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(folder: Path, case: str) -> None:
    change(folder, **BROKEN[case])
    with pytest.raises(BadFile, match=r"tokenizer\.json"):
        values(folder)


def test_more_tokens_than_rows(folder: Path) -> None:
    with pytest.raises(BadFile, match="no row in the embedding"):
        values(folder, vocab_size=100)


def test_missing_tokens_are_padded(folder: Path) -> None:
    made = values(folder)
    assert made["tokenizer.ggml.tokens"][319] == "[PAD319]"
    assert made["tokenizer.ggml.token_type"][319] == 5
    assert made["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_bos_follows_the_post_processor(folder: Path) -> None:
    assert values(folder)["tokenizer.ggml.add_bos_token"] is False
    bos, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    change(
        folder, post_processor={"type": "TemplateProcessing", "single": [bos, text], "pair": [], "special_tokens": {}}
    )
    assert values(folder)["tokenizer.ggml.add_bos_token"] is True
    assert values(folder)["tokenizer.ggml.add_eos_token"] is False


def test_special_ids_by_name_then_by_config(folder: Path) -> None:
    made = values(folder, bos_token_id=77)
    assert (made["tokenizer.ggml.bos_token_id"], made["tokenizer.ggml.eos_token_id"]) == (1, 2)
    change(folder, "tokenizer_config.json", bos_token=None, eos_token={"content": "<|endoftext|>"})
    made = values(folder, bos_token_id=77, eos_token_id=[5, 6])
    assert (made["tokenizer.ggml.bos_token_id"], made["tokenizer.ggml.eos_token_id"]) == (77, 0)


def test_the_template_of_a_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert values(folder)["tokenizer.chat_template"] == "from the file"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change(folder, "tokenizer_config.json", chat_template=named)
    assert values(folder)["tokenizer.chat_template"] == "plain"


@pytest.fixture
def gemma4(tiny_gemma4: Callable[..., Path]) -> Path:
    return tiny_gemma4("31B")


def test_gemma_4_follows_its_merges(gemma4: Path) -> None:
    """Keys, types and scores as llama.cpp's converter writes them."""
    made = {field.key: field.value for field in packer.metadata(gemma4, {}, 320, spm_model="gemma4")}
    tokens, types = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"]
    assert made["tokenizer.ggml.model"] == "gemma4"
    assert "tokenizer.ggml.pre" not in made
    assert made["tokenizer.ggml.merges"][:3] == ["\n \n", "▁ ▁", "▁ t"]
    assert set(made["tokenizer.ggml.scores"]) == {-1000.0}
    visible = {
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
        "<|channel>",
        "<channel|>",
    }
    assert {token for token, kind in zip(tokens, types, strict=True) if kind == 4} == visible
    assert {token for token, kind in zip(tokens[:17], types, strict=False) if kind == 3} == set(tokens[:17]) - visible
    assert types[17:273] == [6] * 256  # bytes
    assert set(types[273:291]) == {1}
    special = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "mask": 4}
    assert {key: made[f"tokenizer.ggml.{key}_token_id"] for key in special} == special
    ends = ("add_bos_token", "add_eos_token", "add_space_prefix")
    assert [made[f"tokenizer.ggml.{key}"] for key in ends] == [True, False, False]


def test_gemma_4_always_has_bos(gemma4: Path) -> None:
    """llama.cpp sets it so whatever the file says."""
    change(gemma4, post_processor=None)
    made = {field.key: field.value for field in packer.metadata(gemma4, {}, 320, spm_model="gemma4")}
    assert made["tokenizer.ggml.add_bos_token"] is True


def test_gemma_4_has_no_space_before_the_text(gemma4: Path) -> None:
    normalizer = json.loads((gemma4 / "tokenizer.json").read_text("utf-8"))["normalizer"]
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, normalizer]}
    change(gemma4, normalizer=prepend)
    with pytest.raises(Unsupported, match="no space before the text for Gemma 4"):
        packer.metadata(gemma4, {}, 320, spm_model="gemma4")


def test_tokens_that_are_never_generated(gemma4: Path) -> None:
    (gemma4 / "generation_config.json").write_text('{"suppress_tokens": [5, 6, 400]}')
    assert values(gemma4)["tokenizer.ggml.suppress_tokens"] == [5, 6]
    (gemma4 / "generation_config.json").write_text('{"suppress_tokens": null}')
    assert "tokenizer.ggml.suppress_tokens" not in values(gemma4)
    (gemma4 / "generation_config.json").write_text('{"suppress_tokens": ["5"]}')
    with pytest.raises(BadFile, match="suppress_tokens is not a list of token ids"):
        values(gemma4)
