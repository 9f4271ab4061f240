"""What a GGUF tells the harness: its control tokens, and how its chat template writes tool calls."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.harness import dialects
from lowbit.harness.upstream import HttpUpstream

_CONTROL = 3  # tokenizer.ggml.token_type of a control token


def control_tokens(path: Path) -> list[str]:
    """Spellings of the model's control tokens."""
    values = GgufFile(path).values
    tokens, types = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    return [t for t, kind in zip(tokens, types, strict=False) if kind == _CONTROL and isinstance(t, str) and len(t) > 1]


def told_by_template(path: Path, template: Path | None) -> tuple[str | None, bool]:
    """The dialect of the chat template, and whether it knows tools at all."""
    text = template.read_text(encoding="utf-8") if template else GgufFile(path).values.get("tokenizer.chat_template")
    text = text if isinstance(text, str) else ""
    return dialects.of_template(text), "tools" in text


def introduce(upstream: HttpUpstream, path: Path, template: Path | None) -> None:
    """Tells an upstream that is llama.cpp's server with this GGUF what follows from both. template: instead of the
    file's own."""
    upstream.name = path.stem
    upstream.holds.add("grammar")
    upstream.dialect, has_tools = told_by_template(path, template)
    if not has_tools:
        upstream.refused.add("tools")
