"""Is every artifact's vocabulary the tokenizer's, token by token: texts, types, merges and the order of scores?"""

from __future__ import annotations

from lowbit.errors import Unsupported
from lowbit.release import vocabularies
from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.expected import expected, tokens_of
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet


class Vocabulary(Check):
    name = "vocabulary"
    question = "every vocabulary is the tokenizer's, token by token"
    rank = 60
    roles = (*TEXT_MODELS, "tokenizer")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        folder = release.tokenizer_folder
        advice = "Take tokenizer and artifact from one release; convert the artifact again with this tokenizer"
        compared = 0
        for member in release.text_models if folder is not None else ():
            assert folder is not None
            if member.container == "gguf":
                try:
                    wrong = list(vocabularies.gguf_differs(expected(release, folder, member), release.values(member)))
                except Unsupported as reason:
                    found.note(f"{member}: not compared ({reason})")
                    continue
            elif member.path != folder and (member.path / "tokenizer.json").is_file():
                wrong = list(vocabularies.folders_differ(folder, member.path))
            else:
                continue
            compared += 1
            if wrong:
                found.problem(f"{member}: {shortened(wrong)}", advice)
        if folder is None:
            compared = self._ggufs(release, found, advice)
        if not compared and not found.problems:
            raise NotApplicable("; ".join(found.notes) or "one vocabulary only, nothing to compare with")
        n_tokens = (
            len(vocabularies.of_folder(folder)[0])
            if folder is not None
            else len(tokens_of(release.values(release.ggufs()[0])))
        )
        found.note(f"{n_tokens:,} tokens, {compared} compared with the tokenizer's")

    def _ggufs(self, release: ReleaseSet, found: Findings, advice: str) -> int:
        """Without a tokenizer.json the first GGUF is what the others are compared with."""
        first, *others = release.ggufs() or (None,)
        for member in others:
            if first is None or member is None:
                continue
            if wrong := list(vocabularies.ggufs_differ(release.values(first), release.values(member))):
                found.problem(f"{member}, compared with {first}: {shortened(wrong)}", advice)
        return len(others)


CHECK = Vocabulary
