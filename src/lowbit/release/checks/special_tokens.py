"""Are begin, end, end of turn and padding the same in every artifact, and does each runtime stop where it should?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from lowbit.errors import LowbitError, Unsupported
from lowbit.release import templates
from lowbit.release.checks.base import Check, Findings, NotApplicable, printable
from lowbit.release.conversations import CONVERSATIONS
from lowbit.release.expected import PREFIX, end_tokens, expected, tokens_of
from lowbit.release.members import Member, read_loosely
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.tokenizing import version
from lowbit.run._llama_vocab import LlamaVocab

_NAMES = {"bos": "bos", "padding": "pad"}
_ANSWER = "It is 4."
_ADVICE = "Convert the artifact again from the folder with the right tokenizer_config.json and generation_config.json"


class SpecialTokens(Check):
    name = "special-tokens"
    question = "begin, end and padding are the same tokens, and every runtime stops at them"
    rank = 70
    after = ("safety", "architecture", "vocabulary")
    roles = (*TEXT_MODELS, "tokenizer", "chat_template")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        folder = release.tokenizer_folder
        compared = 0
        for member in release.text_models:
            if member.container == "gguf":
                with found.problems_of(member, _ADVICE), LlamaVocab(member.path) as vocab:
                    self._gguf(release, folder, member, vocab, found)
                    compared += 1
            elif folder is not None and member.path != folder and (member.path / "tokenizer_config.json").is_file():
                self._folder(release, folder, member, found)
                compared += 1
        if not compared:
            raise NotApplicable("one tokenizer only, nothing to compare with")

    def _gguf(
        self, release: ReleaseSet, folder: Path | None, member: Member, vocab: LlamaVocab, found: Findings
    ) -> None:
        found.runtimes["llama.cpp"] = f"xllamacpp {version('xllamacpp')}"
        values, tokens = release.values(member), tokens_of(release.values(member))
        should: Mapping[str, Any] = {}
        if folder is not None:
            try:
                should = expected(release, folder, member)
            except Unsupported as reason:
                found.note(f"{member}: its tokens are not compared with the folder's ({reason})")
        for key, word in _NAMES.items():
            here, there = values.get(f"{PREFIX}{key}_token_id"), should.get(f"{PREFIX}{key}_token_id")
            if here is not None and there is not None and here != there:
                said = f"{word} is {_token(tokens, here)}, should be {_token(tokens, there)}"
                found.problem(f"{member}: {said}", _ADVICE)
        if should:
            self._at_ends(member, vocab, should, found)
        turn_end = self._end_of_turn(release, folder, values, vocab)
        ends = self._ends(release, folder, should)
        if turn_end is not None:
            ends.setdefault(turn_end, "the chat template, which ends an answer with it")
        eos = values.get(f"{PREFIX}eos_token_id")
        if ends and eos is not None and eos not in ends:
            known = ", ".join(_token(tokens, i) for i in sorted(ends))
            found.problem(f"{member}: eos is {_token(tokens, eos)}, should be {known}", _ADVICE)
            return  # that llama.cpp does not stop at the right one follows
        for i, where in sorted(ends.items()):
            if i < vocab.n_vocab and not vocab.ends(i):
                advice = "Set tokenizer.ggml.eos_token_id or eot_token_id of the GGUF, or answers will not end"
                found.problem(f"{member}: llama.cpp does not stop at {_token(tokens, i)}, named by {where}", advice)
        stops = ", ".join(_token(tokens, i) for i in sorted({*ends, *([eos] if eos is not None else [])}))
        found.note(f"{member}: {'begins with bos' if vocab.adds_bos else 'no bos'}, stops at {stops or 'nothing'}")

    def _at_ends(self, member: Member, vocab: LlamaVocab, should: Mapping[str, Any], found: Findings) -> None:
        """What llama.cpp puts around a text, which is what add_bos_token and add_eos_token mean or, where they are
        missing, its own default."""
        bare, around = vocab.tokenize("a", add_special=False), vocab.tokenize("a")
        has = {"bos": bool(around) and vocab.bos >= 0 and around[:1] == [vocab.bos] and around != bare}
        has["eos"] = bool(around) and len(around) > len(bare) + has["bos"] and around[-1] == vocab.eos
        for end, word in (("bos", "begins a text with bos"), ("eos", "ends a text with eos")):
            wanted = should.get(f"{PREFIX}add_{end}_token")
            if wanted is not None and wanted != has[end]:
                no = "does not" if wanted else "does"
                advice = f"Set {PREFIX}add_{end}_token = {str(wanted).lower()} in the GGUF, or convert it again"
                found.problem(f"{member}: the tokenizer {word if wanted else 'does not ' + word.replace('s a', ' a')}, "
                              f"llama.cpp {no}", advice)  # fmt: skip

    def _ends(self, release: ReleaseSet, folder: Path | None, should: Mapping[str, Any]) -> dict[int, str]:
        """Ids that must end an answer, and who says so."""
        ends = end_tokens(release, folder) if folder is not None else {}
        eos = should.get(f"{PREFIX}eos_token_id")
        return ends | ({eos: "tokenizer_config.json"} if isinstance(eos, int) and eos not in ends else {})

    def _end_of_turn(
        self, release: ReleaseSet, folder: Path | None, values: Mapping[str, Any], vocab: LlamaVocab
    ) -> int | None:
        """The special token that the chat template puts right behind an answer."""
        source = (templates.of_folder(folder) if folder is not None else None) or templates.of_gguf(values)
        if source is None:
            return None
        whole = next(c for c in CONVERSATIONS if c.name == "a whole exchange")
        job = {"messages": whole.messages, "add_generation_prompt": False}
        spelled = {f"{end}_token": _spelled(vocab, getattr(vocab, end)) for end in ("bos", "eos")}
        try:
            text = templates.render(source, [job], **spelled).results[0].text
        except LowbitError:
            return None  # the chat-template check tells
        if text is None or _ANSWER not in text:
            return None
        types = values.get(f"{PREFIX}token_type") or []
        behind = text.rpartition(_ANSWER)[2]
        for i in vocab.tokenize(behind, add_special=False, parse_special=True)[:3]:
            if i < len(types) and types[i] in (TokenType.CONTROL, TokenType.USER_DEFINED):
                return i if types[i] == TokenType.CONTROL else None
        return None

    def _folder(self, release: ReleaseSet, folder: Path, member: Member, found: Findings) -> None:
        for name, where, said in _settings_differ(folder, member.path):
            found.problem(f"{member}: {name} {said} in {where}", _ADVICE)
        here, there = end_tokens(release, member.path), end_tokens(release, folder)
        if missing := sorted(there.keys() - here.keys()) if here else []:
            said = ", ".join(str(i) for i in missing)
            found.problem(f"{member}: answers do not end at token {said}, which {there[missing[0]]} names", _ADVICE)
        found.note(f"{member}: stops at {', '.join(map(str, sorted(here))) or 'its eos_token'}")


def _settings_differ(one: Path, other: Path) -> Iterator[tuple[str, str, str]]:
    first, second = (read_loosely(folder / "tokenizer_config.json") for folder in (one, other))
    for name in ("bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token"):
        ours, theirs = _content(first.get(name)), _content(second.get(name))
        if ours is not None and theirs is not None and ours != theirs:
            yield name, "tokenizer_config.json", f"is {printable(theirs, 30)}, should be {printable(ours, 30)}"


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _spelled(vocab: LlamaVocab, token: int) -> str:
    return vocab.detokenize([token], special=True) if token >= 0 else ""


def _token(tokens: list[str], i: Any) -> str:
    known = isinstance(i, int) and 0 <= i < len(tokens)
    return f"{i} {printable(tokens[i], 30)}" if known else f"{i}, which is no token"


CHECK = SpecialTokens
