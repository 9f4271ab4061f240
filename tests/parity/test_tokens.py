"""llama.cpp splits any text into the tokens that transformers splits it into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.pack import tokenizer as packer
from lowbit.run.llama_cpp import LlamaCpp

ADVERSARIAL = [
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces   three    four     five",
    "\t\ttabs\tand\n\nnewlines\r\n\r\n   \n mixed \t \n",
    "x" + " " * 97 + "y" + "\n" * 33 + "z" + "\t" * 19,
    "emoji 😀👨‍👩‍👧‍👦🏳️‍🌈🚀 é ñ combining",
    "漢字かな交じり文と한국어 그리고 ไทย и русский עברית العربية हिन्दी",
    "digits 1234567890 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "It's we'll THEY'RE i'M don't 'tis 'S",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<bos><eos><start_of_turn>user\nhi<end_of_turn><unused7><pad>",
    "<|im_start |> <| im_end|> <|im_end <bos > </s> <0x41> [PAD5] <mask",
    "if (x<=0x7F){return a[i]->b&&!c;} // --== ~~ __init__ $%^&*",
    "https://example.org/?q=a%20b&c=d#e  name@host.tld",
    "\u200bzero\u200dwidth\ufeff nbsp\u00a0em\u2003ideographic\u3000",
    "\x01\x7f control",
    "▁▁ lower one eighth blocks ▁a",
    "<div><p>html</p></div>\n\n\n\n<table>",
    "a" * 300,
    "naïve façade — “quotes” … ﬁ ﬀ ǅ ß ẞ İ ı",
    '<|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\n<channel|><|tool_call>call:f{x:<|"|>v<|"|>}<tool_call|>',
    "\n\n\n \n\t\n▁\n" + "\n" * 31 + " </s> <|image|>" + "\n" * 32,
]
# What a tokenizer.json of each kind says before its BPE.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": packer._LLAMA3}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}

QWEN2 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": packer._QWEN2}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}


def smollm_as_released(folder: Path) -> None:
    """transformers rebuilds the tokenizer of a GGUF as GPT-2's; the released one splits digits first."""
    change(folder, pre_tokenizer=SMOLLM)


def llama3_style(folder: Path) -> None:
    """SmolLM's vocabulary under Llama 3's splitting."""
    change(folder, pre_tokenizer=LLAMA3)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


def qwen_style(folder: Path) -> None:
    """SmolLM's vocabulary under Qwen's composing and splitting; the texts above are composed already."""
    change(folder, normalizer={"type": "NFC"}, pre_tokenizer=QWEN2)


def llama2_style(folder: Path) -> None:
    """Gemma's pieces with a space put before the text, as in Llama 2."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    change(folder, normalizer={"type": "Sequence", "normalizers": [prepend, space]}, pre_tokenizer=None)


# Gemma 4's added tokens by id; the names of Gemma 3's that stand there are gone.
GEMMA4_ADDED = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>", 212: "</s>", 255999: "<|image>",
    256000: "<|audio>", 258880: "<|image|>", 258881: "<|audio|>", 258882: "<image|>", 258883: "<audio|>",
    258884: "<|video|>",
}  # fmt: skip


def gemma4_style(folder: Path) -> None:
    """Gemma 3's vocabulary as Gemma 4 has it: its own special tokens, all others without a place among the added
    tokens, and the merges of those first, the longest first, as transformers' conversion orders equal scores."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    words = {i: word for word, i in model["vocab"].items()} | GEMMA4_ADDED
    model["vocab"] = {word: i for i, word in sorted(words.items())}
    loose = {entry["content"] for entry in added if not entry["special"]}
    merges = [tuple(merge) for merge in model["merges"]]
    first = sorted((m for m in merges if "".join(m) in loose), key=lambda m: (len(m[0]), len(m[1])), reverse=True)
    model["merges"] = [*first, *(m for m in merges if "".join(m) not in loose)]
    special = [added[0] | {"id": i, "content": word} for i, word in GEMMA4_ADDED.items() if word != "</s>"]
    change(folder, model=model, added_tokens=special)
    from transformers import AutoModelForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=262144, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, global_head_dim=32, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def change(folder: Path, **parts: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8")) | parts
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    # A class of its own would rebuild what tokenizer.json says.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


CASES: dict[str, tuple[str, Callable[[Path], None] | None, str | None]] = {
    "smollm2, from its GGUF": ("smollm2-135m", None, "gpt-2"),
    "smollm2, as released": ("smollm2-135m", smollm_as_released, "smollm"),
    "llama 3 style": ("smollm2-135m", llama3_style, "llama-bpe"),
    "qwen style": ("smollm2-135m", qwen_style, "qwen2"),
    "gemma 3": ("gemma3-270m", None, "default"),
    "llama 2 style": ("gemma3-270m", llama2_style, "default"),
    "gemma 4 style": ("gemma3-270m", gemma4_style, None),
}


@pytest.fixture(scope="module", params=CASES)
def both(
    request: pytest.FixtureRequest,
    real_tokenizer: Callable[[str], Path],
    save_tiny_llama: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, LlamaCpp, str | None]]:
    """transformers' tokenizer, llama.cpp with a file packed from the same folder, and the expected splitting."""
    name, alter, pre = CASES[request.param]
    folder = tmp_path_factory.mktemp("tokens")
    size = 49152 if name == "smollm2-135m" else 262144
    save_tiny_llama(folder, tokenizer=False, vocab_size=size, hidden_size=32, tie_word_embeddings=True)
    for file in real_tokenizer(name).iterdir():
        shutil.copy(file, folder / file.name)
    if alter:
        alter(folder)
    lowbit.pack(folder, "f16", folder / "packed.gguf")
    with LlamaCpp(folder / "packed.gguf", context=64, threads=1, logits_all=False) as model:
        yield AutoTokenizer.from_pretrained(folder), model, pre


def test_the_splitting_is_recognized(both: tuple[Any, LlamaCpp, str | None]) -> None:
    _, model, pre = both
    assert model.metadata.get("tokenizer.ggml.pre") == pre


@pytest.mark.parametrize("text", ADVERSARIAL, ids=range(len(ADVERSARIAL)))
def test_same_tokens(both: tuple[Any, LlamaCpp, str | None], text: str) -> None:
    tokenizer, model, _ = both
    assert model.tokenize(text, parse_special=True) == tokenizer(text).input_ids


@pytest.mark.parametrize("text", ADVERSARIAL[:8], ids=range(8))
def test_same_tokens_without_bos(both: tuple[Any, LlamaCpp, str | None], text: str) -> None:
    tokenizer, model, _ = both
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert model.tokenize(text, add_special=False, parse_special=True) == expected


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_packaged_tokenizer_survives_transformers(
    name: str, packaged_gguf: Callable[[str], Path], real_tokenizer: Callable[[str], Path]
) -> None:
    """GGUF -> transformers -> GGUF gives the tokens, types and special ids back (but for names lowbit chooses)."""
    original = GgufFile(packaged_gguf(name)).values
    with open_checkpoint(packaged_gguf(name)) as source:
        fields = packer.metadata(real_tokenizer(name), source.config, source.config["vocab_size"])
    made = {field.key: field.value for field in fields}
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token"):
        ours, theirs = made[f"tokenizer.ggml.{key}"], original[f"tokenizer.ggml.{key}"]
        if not isinstance(ours, list):
            assert ours == theirs, key
            continue
        differing = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        # transformers makes plain pieces of the runs of spaces; <unk> is a control token there, unknown here.
        assert {original["tokenizer.ggml.tokens"][i].strip(" ") for i, _, _ in differing} <= {"", "<unk>"}, key


def test_the_real_smollm2_file(
    packaged_gguf: Callable[[str], Path], real_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    """Packed from the GGUF, the tokenizer is carried over: every text splits as the released tokenizer splits it."""
    shutil.copytree(real_tokenizer("smollm2-135m"), tmp_path / "tokenizer")
    smollm_as_released(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    lowbit.pack(packaged_gguf("smollm2-135m"), "q4_0", tmp_path / "packed.gguf")
    with LlamaCpp(tmp_path / "packed.gguf", context=64, threads=1, logits_all=False) as model:
        for text in ADVERSARIAL:
            assert model.tokenize(text, parse_special=True) == tokenizer(text).input_ids, text
