"""Vocabularies compared token by token: a folder's with a folder's or a GGUF's, a GGUF's with another GGUF's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from lowbit.release.checks.base import printable
from lowbit.release.expected import PREFIX, tokens_of
from lowbit.release.members import read_loosely

_PLAIN = (int(TokenType.NORMAL), int(TokenType.USER_DEFINED))
_SPECIAL = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))


def of_folder(folder: Path) -> tuple[dict[int, str], list[Any], dict[int, bool]]:
    """A tokenizer.json's tokens by id, its merges, and of added tokens whether they are special."""
    found = read_loosely(folder / "tokenizer.json", most=256 << 20)
    model = found.get("model")
    model = model if isinstance(model, dict) else {}
    vocab, merges = model.get("vocab"), model.get("merges")
    tokens: dict[int, str] = {}
    if isinstance(vocab, dict):
        tokens = {i: token for token, i in vocab.items() if isinstance(i, int)}
    elif isinstance(vocab, list):  # of Unigram: [piece, score]
        tokens = {i: str(entry[0]) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    added = {}
    for entry in found.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            tokens[entry["id"]] = str(entry.get("content"))
            added[entry["id"]] = bool(entry.get("special"))
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges or [] if m]
    return tokens, pairs, added


def folders_differ(one: Path, other: Path) -> Iterator[str]:
    """How the second folder's vocabulary is not the first's."""
    tokens, merges, added = of_folder(one)
    others, other_merges, other_added = of_folder(other)
    yield from _tokens_differ(tokens, others)
    for i in sorted(added.keys() & other_added.keys()):
        if added[i] != other_added[i]:
            yield f"token {i} {printable(tokens[i], 30)} is {'not ' * (not other_added[i])}special"
    if (first := _first_difference(merges, other_merges)) is not None:
        yield f"merge {first} is {_said(other_merges, first)}, should be {_said(merges, first)}"


def gguf_differs(expected: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """How a GGUF's vocabulary is not the one that packing the folder gives."""
    ours, theirs = expected[f"{PREFIX}tokens"], tokens_of(values)
    our_types, their_types = expected[f"{PREFIX}token_type"], values.get(f"{PREFIX}token_type") or []
    used = [i for i, kind in enumerate(our_types) if kind != TokenType.UNUSED]
    yield from _tokens_differ({i: ours[i] for i in used}, {i: theirs[i] for i in used if i < len(theirs)})
    if len(their_types) != len(theirs):
        yield f"{len(their_types)} token types for {len(theirs)} tokens"
        return
    for i in used:
        if i < len(theirs) and ours[i] == theirs[i] and _kind(our_types[i]) != _kind(their_types[i]):
            yield f"token {i} {printable(ours[i], 30)} is {_kind(their_types[i])}, should be {_kind(our_types[i])}"
    key = f"{PREFIX}merges"
    if key in expected and key in values:
        first = _first_difference(expected[key], values[key])
        if first is not None:
            yield f"merge {first} is {_said(values[key], first)}, should be {_said(expected[key], first)}"
    yield from _scores_differ(expected.get(f"{PREFIX}scores"), values, used)
    for key in ("model", "pre"):
        here, should = values.get(f"{PREFIX}{key}"), expected.get(f"{PREFIX}{key}")
        if key == "model" and here != should:
            yield f"tokenizer.ggml.model is {here}, should be {should}"


def ggufs_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """How the second GGUF's vocabulary is not the first's."""
    ours, theirs = tokens_of(one), tokens_of(other)
    yield from _tokens_differ(dict(enumerate(ours)), dict(enumerate(theirs)))
    for key in ("token_type", "merges", "scores"):
        first, second = one.get(f"{PREFIX}{key}") or [], other.get(f"{PREFIX}{key}") or []
        if (i := _first_difference(first, second)) is not None:
            yield f"{key} {i} is {_said(second, i)}, should be {_said(first, i)}"
    for key in ("model", "pre"):
        if one.get(f"{PREFIX}{key}") != other.get(f"{PREFIX}{key}"):
            yield f"tokenizer.ggml.{key} is {other.get(f'{PREFIX}{key}')}, should be {one.get(f'{PREFIX}{key}')}"


def _tokens_differ(ours: Mapping[int, str], theirs: Mapping[int, str]) -> Iterator[str]:
    missing = [i for i in ours if i not in theirs]
    if missing:
        first = f"{min(missing)} {printable(ours[min(missing)], 30)}"
        yield f"{len(missing)} of {len(ours)} tokens are missing, the first {first}"
    wrong = sorted(i for i in ours if i in theirs and ours[i] != theirs[i])
    for i in wrong[:3]:
        yield f"token {i} is {printable(theirs[i], 30)}, should be {printable(ours[i], 30)}"
    if len(wrong) > 3:
        yield f"and {len(wrong) - 3} more tokens"


def _scores_differ(ours: Sequence[float] | None, values: Mapping[str, Any], used: Sequence[int]) -> Iterator[str]:
    """Which of two pieces llama.cpp joins first is what scores say: their order is compared, not their size."""
    theirs = values.get(f"{PREFIX}scores")
    if ours is None or values.get(f"{PREFIX}model") != "llama":
        return
    if not isinstance(theirs, list) or len(theirs) != len(tokens_of(values)):
        yield "there is no score for each token"
        return
    merged = [i for i in used if i < len(theirs) and min(ours) < ours[i] < 0]
    order = sorted(merged, key=lambda i: -ours[i])
    for first, second in pairwise(order):
        if ours[first] > ours[second] and theirs[first] < theirs[second]:
            yield f"token {second} is scored above token {first}, should be below"
            return


def _kind(number: Any) -> str:
    if number in _PLAIN:
        return "text"
    if number in _SPECIAL:
        return "special"
    return "a byte" if number == TokenType.BYTE else "unused" if number == TokenType.UNUSED else f"of type {number}"


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    if one == other:
        return None
    return next(i for i, (a, b) in enumerate(zip_longest(one, other)) if a != b)


def _said(items: Sequence[Any], i: int) -> str:
    return printable(items[i], 40) if i < len(items) else "missing"
