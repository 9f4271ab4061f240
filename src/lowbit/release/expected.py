"""What a GGUF's tokenizer keys should be, by the release's Hugging Face folder: what packing would write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint import families
from lowbit.errors import LowbitError, NotFound
from lowbit.pack import tokenizer
from lowbit.release.members import Member, read_loosely
from lowbit.release.release_set import ReleaseSet

PREFIX = "tokenizer.ggml."
TOKENS = f"{PREFIX}tokens"


def tokens_of(values: Mapping[str, Any]) -> list[str]:
    """A GGUF's tokens by id; [] where it has none."""
    found = values.get(TOKENS)
    return found if isinstance(found, list) and all(isinstance(token, str) for token in found) else []


def expected(release: ReleaseSet, folder: Path, member: Member) -> dict[str, Any]:
    """``tokenizer.*`` as packing the folder's tokenizer for this GGUF's architecture would write it, padded to the
    GGUF's own count. Raises BadFile, Unsupported (a kind of tokenizer that lowbit does not pack), NotFound."""
    values = release.values(member)
    n_tokens = len(tokens_of(values))
    if not n_tokens:
        raise NotFound("the file has no tokens", where=member.path)
    config = config_beside(release, folder)
    try:
        spm_model = families.by_arch(values.get("general.architecture"), member.path).spm_model
    except LowbitError:
        spm_model = "llama"
    fields = tokenizer.metadata(folder, config, n_tokens, spm_model=spm_model)
    return {field.key: field.value for field in fields}


def config_beside(release: ReleaseSet, folder: Path) -> Mapping[str, Any]:
    """config.json of the tokenizer's folder, or of the reference."""
    config = read_loosely(folder / "config.json")
    if not config and (reference := release.reference) is not None and reference.is_folder:
        config = dict(release.config(reference))
    return config


def end_tokens(release: ReleaseSet, folder: Path) -> dict[int, str]:
    """Ids that end an answer, each with the file that says so: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        value = read_loosely(folder / name).get("eos_token_id")
        if value is None and name == "config.json":
            text = config_beside(release, folder).get("text_config")
            value = text.get("eos_token_id") if isinstance(text, dict) else None
        ids = value if isinstance(value, list) else [value]
        found = {i: name for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0}
        if found:
            return found
    return {}
