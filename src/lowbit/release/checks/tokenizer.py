"""Do transformers, llama.cpp and MLX split the same texts into the same tokens?"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from lowbit.errors import NotFound
from lowbit.release import tokenizing, vocabularies
from lowbit.release.checks.base import Check, Findings, NotApplicable, printable
from lowbit.release.expected import tokens_of
from lowbit.release.members import Member, read_loosely
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.texts_to_split import adversarial
from lowbit.release.tokenizing import Tokenize

_ADVICE = "Convert the artifact again with this tokenizer; is its splitting, tokenizer.ggml.pre, the right one?"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizer(Check):
    name = "tokenizer"
    question = "transformers, llama.cpp and MLX split the same texts into the same tokens"
    rank = 80
    after = ("safety", "architecture", "vocabulary", "special-tokens")
    roles = (*TEXT_MODELS, "tokenizer")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        folder = release.tokenizer_folder
        texts = adversarial(_special(release, folder))
        if folder is None:
            self._among_ggufs(release, texts, found)
            return
        others = [m for m in release.text_models if m.container == "gguf" or (
            m.path != folder and (m.path / "tokenizer.json").is_file()
        )]  # fmt: skip
        if not others:
            raise NotApplicable("one tokenizer only, nothing to compare with")
        try:
            reference = tokenizing.by_encode(tokenizing.load_transformers(folder))
        except NotFound as missing:
            raise NotApplicable(str(missing)) from None
        found.runtimes["transformers"] = str(tokenizing.version("transformers"))
        composes = _composes(read_loosely(folder / "tokenizer.json", most=256 << 20).get("normalizer"))
        for member in others:
            if member.container not in ("gguf", "mlx") and _same_files(folder, member.path):
                found.note(f"{member}: the same files")
                continue
            self._compare(reference, member, texts, found, composes=composes and member.container == "gguf")

    def _among_ggufs(self, release: ReleaseSet, texts: list[str], found: Findings) -> None:
        first, *others = release.ggufs() or (None,)
        if first is None or not others:
            raise NotApplicable("no tokenizer.json to compare the artifact with")
        with tokenizing.opened(first) as (_, _, reference):
            for member in others:
                if member is not None:
                    self._compare(reference, member, texts, found, composes=False)

    def _compare(
        self, reference: Tokenize, member: Member, texts: list[str], found: Findings, *, composes: bool
    ) -> None:
        """composes: the reference's tokenizer composes characters (NFC) and llama.cpp has no step that does."""
        differing, composed = [], 0
        try:
            with found.problems_of(member), tokenizing.opened(member) as (runtime, version, tokenize):
                found.runtimes[runtime] = version
                for text in texts:
                    for special in (True, False):
                        ours, theirs = reference(text, special), tokenize(text, special)
                        if ours == theirs:
                            continue
                        whole = unicodedata.normalize("NFC", text)
                        if composes and whole != text and ours == tokenize(whole, special):
                            composed += 1
                            break
                        differing.append((text, ours, theirs))
                        break
        except NotFound as missing:
            found.note(f"{member}: not run ({missing})")
            return
        if differing:
            text, ours, theirs = differing[0]
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            said = f"from token {at} on {ours[at : at + 4]} and {theirs[at : at + 4]} ({runtime})"
            few = f"{len(differing)} of {len(texts)} texts are split in another way"
            found.problem(f"{member}: {few}, such as {printable(text, 40)}: {said}", _ADVICE)
            return
        found.note(f"{member}: {len(texts)} texts, {runtime}")
        if composed:
            found.note(f"{composed} of them the same once composed (NFC), which llama.cpp leaves to its callers")


def _special(release: ReleaseSet, folder: Path | None) -> list[str]:
    """The special tokens that a user could spell."""
    if folder is not None:
        tokens, _, added = vocabularies.of_folder(folder)
        return [tokens[i] for i in sorted(added) if added[i]]
    for member in release.ggufs():
        values = release.values(member)
        types = values.get("tokenizer.ggml.token_type") or []
        return [token for token, kind in zip(tokens_of(values), types, strict=False) if kind == 3]
    return []


def _composes(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    inner = step.get("normalizers")
    return step.get("type") == "NFC" or (isinstance(inner, list) and any(map(_composes, inner)))


def _same_files(one: Path, other: Path) -> bool:
    pairs = [(one / name, other / name) for name in _TOKENIZER_FILES]
    return all(a.is_file() == b.is_file() and (not a.is_file() or a.read_bytes() == b.read_bytes()) for a, b in pairs)


CHECK = Tokenizer
