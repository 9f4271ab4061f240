"""A Hugging Face tokenizer as GGUF key-values, so that llama.cpp splits any text into the same tokens.

Everything is read from tokenizer.json (what transformers itself runs), never by running code. Two kinds are known:
byte-level BPE ('gpt2'), whose regular expressions llama.cpp has under a name of its own (``tokenizer.ggml.pre``), and
BPE with byte fallback (SentencePiece's form). Of the latter the merge order becomes scores ('llama'), or, for Gemma 4,
llama.cpp follows the merges themselves ('gemma4').
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, TokenType

from lowbit.checkpoint.families.base import text, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadFile, NotFound, Unsupported

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2 and 3: numbers a digit at a time, else the same.
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_ABSENT_SCORE = -1000.0  # what llama.cpp's converter gives tokens that no merge may make
_SPACE = "▁"
# Tokens that llama.cpp must show in its answers, as it reads thoughts and tool calls out of the text.
_GEMMA4_VISIBLE = {
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Vocab:
    """Tokens by id, their GGUF types, and the ids of added tokens' texts."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]


def metadata(folder: Path, config: Mapping[str, Any], vocab_size: int, *, spm_model: str = "llama") -> list[Field]:
    """``tokenizer.*`` for a Hugging Face folder. ``vocab_size``: rows of the embedding; missing tokens are padded.
    ``spm_model``: 'llama' or 'gemma4', the one of the two that llama.cpp runs for this model if it has byte fallback.

    Raises NotFound (no tokenizer.json), BadFile, Unsupported (a kind llama.cpp does not split the same way).
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFound(
            "no tokenizer.json in the folder",
            where=folder,
            hint="Write one with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    tokenizer = read_json(path, BadFile)
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path, BadFile) if settings_path.is_file() else {}
    try:
        model = tokenizer["model"]
        if model["type"] != "BPE":
            raise Unsupported("unsupported kind of tokenizer", where=path, found=model["type"], expected="BPE")
        spm = _gemma4 if spm_model == "gemma4" else _spm
        kind = spm if model.get("byte_fallback") else _byte_level
        fields, vocab = kind(path, tokenizer, vocab_size)
        fields += _special_ids(settings, config, vocab)
        fields += _added_at_ends(tokenizer, settings, always_bos=kind is _gemma4)
        fields += _suppressed(folder / "generation_config.json", vocab)
        fields += _chat_template(folder, settings)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        # The file's structure is a stranger's: any surprise in it means the same thing.
        raise BadFile("not the structure of a tokenizer.json", where=path, found=repr(error)[:80]) from error
    return fields


def _byte_level(path: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[Field], _Vocab]:
    pre = _pre(path, tokenizer)
    normalizers = [step["type"] for step in _flatten(tokenizer.get("normalizer"), "normalizers")]
    # Qwen composes characters (NFC) first. llama.cpp does not, and its own conversions leave it at that: text that is
    # composed already, as nearly all text is, splits the same.
    if normalizers and not (pre == "qwen2" and normalizers == ["NFC"]):
        raise Unsupported(
            "llama.cpp does not normalize text for this kind of tokenizer", where=path, found="a normalizer"
        )
    vocab = _vocab(path, tokenizer, vocab_size, spm=False)
    return [
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", pre),
        _strings("tokenizer.ggml.tokens", vocab.tokens),
        _numbers("tokenizer.ggml.token_type", vocab.types, GGUFValueType.INT32),
        _strings("tokenizer.ggml.merges", _merges(tokenizer)),
        _flag("tokenizer.ggml.add_space_prefix", False),
    ], vocab


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    merges = tokenizer["model"]["merges"]
    return [m if isinstance(m, str) else f"{_no_space(m[0])} {_no_space(m[1])}" for m in merges]


def _no_space(part: str) -> str:
    # The space separates a merge's two parts; byte-level vocabularies write it as U+0120, and so must a stray one.
    return part.replace(" ", "Ġ")


def _pre(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the splitting before BPE, from its structure."""
    steps = _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    shape = [_step(step) for step in steps]
    if shape == ["bytes+regex"]:
        return "gpt-2"
    if shape == ["digits", "bytes+regex"]:
        return "smollm"
    if shape == [f"split {_LLAMA3}", "bytes"]:
        # The same expression; only the first takes a word that is a token of its own without merging.
        return "llama-bpe" if ignore_merges else "smaug-bpe"
    if shape == [f"split {_QWEN2}", "bytes"]:
        return "qwen2"
    raise Unsupported(
        "llama.cpp has no name for this tokenizer's splitting, or lowbit does not know it",
        where=path,
        found=", ".join(shape)[:120] or "no pre_tokenizer",
        expected="that of Llama 3, Qwen, SmolLM or GPT-2",
    )


def _step(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes+regex" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and "Regex" in step["pattern"]:
        # Removed and inverted keeps what matches: the same pieces, as the expression matches every character.
        removed, inverted = step.get("behavior") == "Removed", bool(step.get("invert"))
        if removed == inverted and (removed or step.get("behavior") == "Isolated"):
            return f"split {step['pattern']['Regex']}"
    return f"{kind} {sorted((k, str(v)) for k, v in step.items() if k != 'type')}"


def _flatten(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [s for part in step[inner] for s in _flatten(part, inner)] if step["type"] == "Sequence" else [step]


def _spm(path: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[Field], _Vocab]:
    add_space_prefix = _space_prefix(path, tokenizer)
    vocab = _vocab(path, tokenizer, vocab_size, spm=True)
    return [
        text("tokenizer.ggml.model", "llama"),
        text("tokenizer.ggml.pre", "default"),
        _strings("tokenizer.ggml.tokens", vocab.tokens),
        _numbers("tokenizer.ggml.scores", _scores(tokenizer["model"], vocab), GGUFValueType.FLOAT32),
        _numbers("tokenizer.ggml.token_type", vocab.types, GGUFValueType.INT32),
        _flag("tokenizer.ggml.add_space_prefix", add_space_prefix),
    ], vocab


def _gemma4(path: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[Field], _Vocab]:
    if _space_prefix(path, tokenizer):
        raise Unsupported("llama.cpp puts no space before the text for Gemma 4", where=path, found="a space prefix")
    vocab = _vocab(path, tokenizer, vocab_size, spm=True)
    for token in _GEMMA4_VISIBLE & vocab.ids.keys():
        vocab.types[vocab.ids[token]] = int(TokenType.USER_DEFINED)
    if (unknown := vocab.ids.get(tokenizer["model"].get("unk_token") or "")) is not None:
        vocab.types[unknown] = int(TokenType.CONTROL)
    return [
        text("tokenizer.ggml.model", "gemma4"),
        _strings("tokenizer.ggml.tokens", vocab.tokens),
        _numbers("tokenizer.ggml.scores", [_ABSENT_SCORE] * vocab_size, GGUFValueType.FLOAT32),
        _numbers("tokenizer.ggml.token_type", vocab.types, GGUFValueType.INT32),
        _strings("tokenizer.ggml.merges", _merges(tokenizer)),
        _flag("tokenizer.ggml.add_space_prefix", False),
    ], vocab


def _space_prefix(path: Path, tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space goes before the text; refuses anything but 'a space is written as U+2581' around it."""
    prefix = False
    for step in _flatten(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE):
            raise Unsupported("llama.cpp does not normalize text so", where=path, found=str(dict(step))[:100])
    for step in _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("replacement") == _SPACE and not step.get("split"):
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise Unsupported("llama.cpp does not split text so", where=path, found=str(dict(step))[:100])
        # Gemma's split at spaces finds none: its normalizer has replaced them all.
    return prefix


def _scores(model: Mapping[str, Any], vocab: _Vocab) -> list[float]:
    """A score for each token such that taking the best-scored pair first follows the order of the merges."""
    scores = [_ABSENT_SCORE if t in (TokenType.CONTROL, TokenType.USER_DEFINED) else 0.0 for t in vocab.types]
    ranked: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranked.setdefault(left + right, rank)
    for i, (token, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if kind == TokenType.NORMAL:
            # A piece that no merge makes (a single character, mostly) is below all that one makes.
            scores[i] = -float(ranked.get(token, len(ranked) + len(model["merges"])))
    return scores


def _vocab(path: Path, tokenizer: Mapping[str, Any], vocab_size: int, *, spm: bool) -> _Vocab:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    ids: dict[str, int] = {}
    added_ids = {entry["id"] for entry in tokenizer.get("added_tokens") or []}
    for token, i in tokenizer["model"]["vocab"].items():
        if not isinstance(i, int) or not 0 <= i < vocab_size:
            if i in added_ids:
                continue
            hint = "Is this tokenizer the one that belongs to these weights?"
            raise BadFile("a token has no row in the embedding", where=path, found=f"{token!r} = {i}", hint=hint)
        tokens[i], types[i], ids[token] = token, int(TokenType.NORMAL), i
        if spm and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = int(TokenType.BYTE)
    unknown = tokenizer["model"].get("unk_token")
    for entry in tokenizer.get("added_tokens") or []:
        i, content = entry["id"], entry["content"]
        if not 0 <= i < vocab_size:
            continue  # Gemma 3's text models name an image token beyond their embedding; no text can use it
        special = bool(entry.get("special"))
        # llama.cpp looks for user-defined tokens in the text itself, where a space is a space.
        tokens[i] = content.replace(_SPACE, " ") if spm and not special else content
        types[i] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        ids[content] = i
    if spm and unknown in ids:
        types[ids[unknown]] = int(TokenType.UNKNOWN)
    return _Vocab(tokens=tokens, types=types, ids=ids)


def _special_ids(settings: Mapping[str, Any], config: Mapping[str, Any], vocab: _Vocab) -> list[Field]:
    config, fields = config.get("text_config", config), []
    for ours, theirs in _SPECIAL_KEYS.items():
        named = settings.get(f"{ours}_token")
        content = named.get("content") if isinstance(named, dict) else named
        i = vocab.ids.get(content) if isinstance(content, str) else None
        if i is None:
            fallback = config.get(f"{ours}_token_id")
            i = fallback[0] if isinstance(fallback, list) and fallback else fallback  # type: ignore[assignment]
        if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(vocab.tokens):
            fields.append(uint(f"tokenizer.ggml.{theirs}_token_id", i))
    return fields


def _added_at_ends(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], *, always_bos: bool) -> list[Field]:
    """Whether BOS and EOS go around the text: what the post-processor does, else what the settings say.

    always_bos: llama.cpp puts BOS before the text whatever the file says (Gemma 4), so the file says so.
    """
    add = {"bos": bool(settings.get("add_bos_token")), "eos": bool(settings.get("add_eos_token"))}
    for step in _flatten(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            add = {"bos": "SpecialToken" in step["single"][0], "eos": "SpecialToken" in step["single"][-1]}
    add["bos"] |= always_bos
    return [_flag(f"tokenizer.ggml.add_{end}_token", value) for end, value in add.items()]


def _suppressed(path: Path, vocab: _Vocab) -> list[Field]:
    """Tokens that are never to be generated, of a generation_config.json that names any (Gemma 4 12B's does)."""
    generation = read_json(path, BadFile) if path.is_file() else {}
    named = generation.get("suppress_tokens") or []
    if not isinstance(named, list) or not all(type(i) is int for i in named):
        raise BadFile("suppress_tokens is not a list of token ids", where=path, found=repr(named)[:60])
    known = [i for i in named if 0 <= i < len(vocab.tokens)]
    return [_numbers("tokenizer.ggml.suppress_tokens", known, GGUFValueType.INT32)] if known else []


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> list[Field]:
    file = folder / "chat_template.jinja"
    try:
        template: Any = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    except UnicodeDecodeError as error:
        raise BadFile("not UTF-8", where=file, found=error) from error
    if isinstance(template, list):  # several named templates; llama.cpp uses the one called default
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= set(t)}
        template = named.get("default")
    return [text("tokenizer.chat_template", template)] if isinstance(template, str) and template else []


def _strings(key: str, values: list[str]) -> Field:
    if not all(isinstance(v, str) for v in values):
        raise TypeError(f"{key} has a value that is not text")
    return Field(key, values, GGUFValueType.ARRAY, GGUFValueType.STRING)


def _numbers(key: str, values: list[Any], kind: GGUFValueType) -> Field:
    return Field(key, values, GGUFValueType.ARRAY, kind)


def _flag(key: str, value: bool) -> Field:
    return Field(key, value, GGUFValueType.BOOL)
