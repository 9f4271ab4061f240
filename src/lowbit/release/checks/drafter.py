"""Does the drafter belong to the model: vocabulary, width, key-value heads; and what does it bring in llama.cpp?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.errors import LowbitError
from lowbit.measure.statistics import wilson
from lowbit.release import child, drafting, vocabularies
from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.expected import PREFIX, tokens_of
from lowbit.release.members import Member
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.settings import Settings, settings_of
from lowbit.release.tokenizing import version

_TOKENS = 48
_MOST_EXTRA = 128  # tokens that llama.cpp lets the two differ by at the end (SPEC_VOCAB_MAX_SIZE_DIFFERENCE)
_ADVICE = "Take the drafter that was made for this model"
_SHARES_CACHE = "-assistant"  # a drafter that reads its target's keys and values


class Drafter(Check):
    name = "drafter"
    question = "the drafter has the model's vocabulary and shapes, and what it brings"
    rank = 120
    after = ("safety", "hashes", "architecture", "vocabulary")
    roles = (*TEXT_MODELS, "drafter")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        drafter = release.one("drafter")
        if drafter is None:
            raise NotApplicable("no drafter here")
        target = next(iter(release.ggufs("artifact", "checkpoint", "base")), None) or release.reference
        if target is None:
            raise NotApplicable("no model for the drafter")
        with found.problems_of(drafter, _ADVICE):
            self._vocabulary(release, target, drafter, found)
            self._shapes(release, target, drafter, found)
            if not found.problems and not found.quick:
                self._measure(target, drafter, found)

    def _measure(self, target: Member, drafter: Member, found: Findings) -> None:
        """In a child: llama.cpp aborts on some pairs."""
        if target.container != "gguf" or drafter.container != "gguf":
            found.note("not measured: llama.cpp drafts with two GGUFs")
            return
        found.runtimes["llama.cpp"] = f"xllamacpp {version('xllamacpp')}"
        said = child.call(
            "draft", model=str(target.path), drafter=str(drafter.path), prompts=list(drafting.PROMPTS), n=_TOKENS
        )
        share = said["accepted"] / said["drafted"]
        faster = said["helped"] / said["alone"]
        low, high = wilson(int(said["accepted"]), int(said["drafted"]))
        found.note(
            f"{100 * share:.0f}% [{100 * low:.0f}, {100 * high:.0f}] of {said['drafted']:.0f} drafted tokens accepted, "
            f"{faster:.2f}x the speed ({said['helped']:.0f} against {said['alone']:.0f} tokens a second, "
            f"{len(drafting.PROMPTS)} prompts of {_TOKENS} tokens, on this machine)"
        )
        if faster < 1:
            found.note("slower than without it here")

    def _vocabulary(self, release: ReleaseSet, target: Member, drafter: Member, found: Findings) -> None:
        ours, theirs = (tokens_by_id(release, member) for member in (target, drafter))
        if not ours or not theirs:
            found.note("its vocabulary is not compared: one of the two has no tokenizer")
            return
        wrong = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
        extra = abs(len(ours) - len(theirs))
        said = [f"token {i} is {theirs[i]!r:.30}, in {target} {ours[i]!r:.30}" for i in wrong]
        if wrong or extra > _MOST_EXTRA:
            words = shortened(said, 2) if wrong else f"{len(theirs):,} tokens, {target} has {len(ours):,}"
            few = f"{len(wrong):,} tokens differ: {words}" if wrong else words
            found.problem(f"{drafter} has another vocabulary than {target}: {few}", _ADVICE)
            return
        if target.container == "gguf" and drafter.container == "gguf":
            self._ends(release.values(target), release.values(drafter), drafter, found)
        found.note(f"{drafter}: {len(theirs):,} tokens, those of {target}")

    def _ends(self, ours: Mapping[str, Any], theirs: Mapping[str, Any], drafter: Member, found: Findings) -> None:
        for key in ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token"):
            first, second = ours.get(f"{PREFIX}{key}"), theirs.get(f"{PREFIX}{key}")
            if first is not None and second is not None and first != second:
                found.problem(f"{drafter}: tokenizer.ggml.{key} is {second}, the model's is {first}", _ADVICE)

    def _shapes(self, release: ReleaseSet, target: Member, drafter: Member, found: Findings) -> None:
        own, model = settings_of(release, drafter), settings_of(release, target)
        if not own.architecture.endswith(_SHARES_CACHE):
            return
        if not model.architecture.startswith(own.architecture.removesuffix(_SHARES_CACHE)):
            found.problem(f"{drafter} drafts for {own.architecture.removesuffix(_SHARES_CACHE)}, "
                          f"and {target} is {model.architecture}", _ADVICE)  # fmt: skip
            return
        width, wide = own.keys.get("embedding_length_out"), model.keys.get("embedding_length")
        if width != wide:
            found.problem(f"{drafter} is for a model {width} wide, and {target} is {wide} wide", _ADVICE)
        for kind, (first, second) in _caches(model, own).items():
            if first != second and None not in (first, second):
                said = f"{second[0]} of {second[1]} in {kind} layers, and {target} keeps {first[0]} of {first[1]}"  # type: ignore[index]
                found.problem(f"{drafter} reads other key-value heads: {said}; llama.cpp aborts on it", _ADVICE)


def _caches(model: Settings, drafter: Settings) -> dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]]:
    """Key-value heads and their size of the last layer of each kind, in the model and in its drafter."""
    return {
        kind: (_last(model, window=kind == "window"), _last(drafter, window=kind == "window"))
        for kind in ("full", "window")
    }


def _last(settings: Settings, *, window: bool) -> tuple[int, int] | None:
    keys = settings.keys
    pattern, heads = keys.get("attention.sliding_window_pattern"), keys.get("attention.head_count_kv")
    if not isinstance(pattern, list):
        return None
    layers = [i for i, is_window in enumerate(pattern) if is_window == window]
    size = keys.get("attention.key_length_swa" if window else "attention.key_length")
    if not layers or not isinstance(size, int):
        return None
    n = heads[layers[-1]] if isinstance(heads, list) else heads
    return (n, size) if isinstance(n, int) else None


def tokens_by_id(release: ReleaseSet, member: Member) -> dict[int, str]:
    """A member's tokens; {} where it has no tokenizer."""
    if member.container == "gguf":
        return dict(enumerate(tokens_of(release.values(member))))
    try:
        return vocabularies.of_folder(member.path)[0]
    except LowbitError:
        return {}


CHECK = Drafter
