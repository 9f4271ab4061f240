"""Facts to find again in a long text: sentences, questions with one right answer, and wrong answers beside it.

A haystack holds one fact a depth, each about another person, in the same wording: to answer is to find the right one
of several, as in the multi-key needles of RULER (Hsieh et al. 2024). One reading of the text serves all questions.
The answers are words that the text does not contain, all of the same number of tokens, so that their log
probabilities compare without a correction for length.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowbit.errors import BadText

CANDIDATES = 8  # the right answer and seven others; chance is one in eight
_SEARCH = 64  # tokens back from a fact's place in which the end of a sentence is looked for
_FEWEST = 16  # words of one length in tokens that a tokenizer must have

# (fact, question up to the answer); the answer follows a space and ends with the word
WORDINGS = (
    (
        "The secret word of {who} is {word}.",
        "Question: What is the secret word of {who}?\nAnswer: The secret word of {who} is",
    ),
    (
        "The password that {who} chose is {word}.",
        "Question: Which password did {who} choose?\nAnswer: The password that {who} chose is",
    ),
    (
        "The box of {who} contains one {word}.",
        "Question: What is in the box of {who}?\nAnswer: The box of {who} contains one",
    ),
    (
        "The team of {who} is named after the word {word}.",
        "Question: Which word is the team of {who} named after?\nAnswer: The team of {who} is named after the word",
    ),
)
PEOPLE = (
    "Amelia", "Boris", "Carmen", "Dmitri", "Esther", "Farid", "Greta", "Hiroshi", "Ingrid", "Jorge", "Katya", "Leopold",
    "Miriam", "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Stefan", "Tamara", "Ulrich", "Viktor", "Wanda", "Yusuf",
)  # fmt: skip
WORDS = (
    "anchor", "apple", "arrow", "banana", "barrel", "basket", "bell", "blanket", "bottle", "bridge", "bucket",
    "button", "camera", "candle", "carpet", "castle", "chair", "cherry", "circle", "coffee", "compass", "copper",
    "cotton", "crown", "curtain", "diamond", "dragon", "drum", "eagle", "engine", "feather", "flag", "flute",
    "forest", "fountain", "guitar", "hammer", "harbor", "helmet", "honey", "island", "jacket", "kettle", "ladder",
    "lamp", "lemon", "lion", "magnet", "marble", "mirror", "monkey", "mountain", "needle", "orange", "oven",
    "paint", "paper", "pencil", "pepper", "piano", "pillow", "planet", "potato", "pumpkin", "rabbit", "ribbon",
    "river", "rocket", "salad", "saddle", "shovel", "silver", "spider", "spoon", "squirrel", "station", "sugar",
    "sword", "table", "tiger", "tomato", "tower", "tractor", "trumpet", "tunnel", "turtle", "umbrella", "valley",
    "velvet", "violin", "wagon", "walnut", "whistle", "window", "wolf", "zebra",
)  # fmt: skip


class Tokenizer(Protocol):
    """What a runtime's model does with text."""

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a haystack.

    depth:      where its fact stands: 0 before the text, 1 after all of it
    at:         the fact's first token in the haystack
    tokens:     int32 (n,), to follow the haystack
    candidates: int32 (CANDIDATES, m): answers to follow the question; the first is right, and those of the other
                facts are among the rest
    answer:     the right one as text
    """

    depth: float
    at: int
    tokens: np.ndarray
    candidates: np.ndarray
    answer: str


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """A text with facts in it, int32 (n,), and a question about each."""

    tokens: np.ndarray
    questions: tuple[Question, ...]


def haystack(
    model: Tokenizer,
    filler: np.ndarray,
    *,
    length: int,
    depths: Sequence[float],
    bos: int | None,
    rng: np.random.Generator,
) -> Haystack:
    """A haystack that with the longest of its questions and an answer takes at most ``length`` tokens.

    filler: int32 (n,), a real text; a stretch of it is used, and it is repeated where it is too short
    depths: 0 to 1, one fact each
    Raises BadText where the length has no room for the facts, or the tokenizer has too few words of one length.
    """
    fact, question = WORDINGS[rng.integers(len(WORDINGS))]
    people = rng.permutation(PEOPLE)[: len(depths)]
    asked = [_ids(model, "\n\n" + question.format(who=who)) for who in people]
    # The longest fact bounds the room: which words are free to be used is known only once the filler is chosen.
    longest = max(len(_ids(model, " " + fact.format(who=who, word=word))) for who in people for word in WORDS[::8])
    room = length - (longest + 4) * len(depths) - max(map(len, asked)) - 8
    if room < 16 * len(depths):
        raise BadText("no room for the facts", found=f"{length} tokens", expected="a longer context or fewer depths")
    begin = int(rng.integers(max(1, len(filler) - room)))
    text = np.resize(filler[begin:] if len(filler) - begin >= room else filler, room)
    words = _words(model, model.detokenize(text.tolist()), question.format(who=people[0]))
    chosen = [words[i] for i in rng.permutation(len(words))]
    ours, others = chosen[: len(depths)], chosen[len(depths) :]

    pieces: list[np.ndarray] = [] if bos is None else [np.array([bos], np.int32)]
    places, cut = [], 0
    for depth, who, (word, _) in sorted(zip(depths, people, ours, strict=True)):
        at = _sentence_end(model, text, round(depth * room), cut)
        pieces.append(text[cut:at])
        places.append(sum(map(len, pieces)))
        pieces.append(_ids(model, " " + fact.format(who=who, word=word)))
        cut = at
    pieces.append(text[cut:])
    questions = []
    for i, place in zip(np.argsort(depths, kind="stable"), places, strict=True):
        wrong = [word for k, word in enumerate(ours) if k != i][: CANDIDATES // 2]
        picked = [ours[i], *wrong, *others[: CANDIDATES - 1 - len(wrong)]]
        questions.append(
            Question(
                depth=depths[i],
                at=place,
                tokens=asked[i],
                candidates=np.array([ids for _, ids in picked], np.int32),
                answer=ours[i][0],
            )
        )
    return Haystack(tokens=np.concatenate(pieces).astype(np.int32), questions=tuple(questions))


def _ids(model: Tokenizer, text: str) -> np.ndarray:
    return np.array(model.tokenize(text, add_special=False), np.int32)


def _words(model: Tokenizer, text: str, question: str) -> list[tuple[str, list[int]]]:
    """(word, its tokens after the question) of those that the text lacks, all of the same number of tokens."""
    text, stem = text.lower(), model.tokenize(question, add_special=False)
    by_length: dict[int, list[tuple[str, list[int]]]] = collections.defaultdict(list)
    for word in WORDS:
        ids = model.tokenize(f"{question} {word}", add_special=False)
        if word not in text and ids[: len(stem)] == stem and len(ids) > len(stem):
            by_length[len(ids) - len(stem)].append((word, ids[len(stem) :]))
    for _, found in sorted(by_length.items()):
        if len(found) >= _FEWEST:
            return found
    raise BadText(
        "too few words to ask for", found="words of unlike numbers of tokens, or in the text",
        expected=f"{_FEWEST} that the text lacks", hint="Another --text may do",
    )  # fmt: skip


def _sentence_end(model: Tokenizer, text: np.ndarray, at: int, least: int) -> int:
    """The last place at or before ``at``, but not before ``least``, that follows a full stop or a line's end."""
    if at >= len(text):
        return len(text)
    for place in range(at, max(least, at - _SEARCH), -1):
        if model.detokenize([int(text[place - 1])]).rstrip(" ")[-1:] in (".", "\n", "!", "?"):
            return place
    return max(at, least)
