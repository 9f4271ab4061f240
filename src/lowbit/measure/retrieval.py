"""Whether a fact at depth d of a text of length n is found again, for each KV cache type.

Each haystack is read once a model; every question then goes on from a copy of the sequence. Scored twice: greedily
(the answer's words come first) and by the probability of the right answer among eight, which says something of models
too small to answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import BadOption
from lowbit.measure import statistics
from lowbit.measure.needles import CANDIDATES, Haystack, Question
from lowbit.measure.record import Figure, repeated
from lowbit.run._llama_slots import Slots

KEPT = ("log_probability", "choice", "greedy")
CHANCE = 1 / CANDIDATES
_MORE = 3  # tokens past the answer's own in which its end must show


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Where facts are put and how many.

    lengths:   of the whole prompt, tokens
    depths:    0 (before the text) to 1 (after it), one fact each in every haystack; eight at most
    haystacks: texts per length, each with other facts, words and stretch of text
    seed:      of all of that
    """

    lengths: tuple[int, ...] = (512, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    haystacks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 256:
            raise BadOption("impossible lengths", found=self.lengths, expected="at least one of 256 or more tokens")
        if not 0 < len(self.depths) <= CANDIDATES or not all(0 <= depth <= 1 for depth in self.depths):
            raise BadOption("impossible depths", found=self.depths, expected="1 to 8 of them, each from 0 to 1")
        if len(set(self.depths)) < len(self.depths):
            raise BadOption("a depth is given twice", found=self.depths, expected="each once")
        if self.haystacks < 1:
            raise BadOption("impossible number of haystacks", found=self.haystacks, expected="at least 1")


def ask(model: Slots, haystack: Haystack) -> np.ndarray:
    """Reads the haystack and answers its questions; float64 (questions, 3) as KEPT says.

    model: of three sequences in a unified cache
    """
    model.reset()
    model.extend(haystack.tokens, [0], last=False)
    return np.array([_answer(model, question) for question in haystack.questions], np.float64)


def _answer(model: Slots, question: Question) -> tuple[float, float, float]:
    model.copy(0, 1)
    row = model.extend(question.tokens, [1])[0].copy()
    scores = np.array([_log_probability(model, row, ids) for ids in question.candidates])
    scores -= scores.max()
    log_probability = float(scores[0] - np.log(np.exp(scores).sum()))
    found = log_probability, float(scores.argmax() == 0), float(_says(model, row, question))
    model.drop(1)
    return found


def _log_probability(model: Slots, row: np.ndarray, ids: np.ndarray) -> float:
    """log p of the tokens after sequence 1, whose last logits are ``row``."""
    total = _log_softmax(row)[ids[0]]
    if len(ids) > 1:
        model.copy(1, 2)
        for token, following in itertools.pairwise(ids):
            total += _log_softmax(model.extend([int(token)], [2])[0])[following]
        model.drop(2)
    return float(total)


def _says(model: Slots, row: np.ndarray, question: Question) -> bool:
    """Whether the greedy continuation is the answer, as a whole word."""
    said, answer = b"", question.answer
    for _ in range(question.candidates.shape[1] + _MORE):
        token = int(row.argmax())
        if model.ends(token):
            break
        said += model.piece(token)
        text = said.decode("utf-8", "replace").lstrip()
        if len(text) > len(answer):
            return text.startswith(answer) and not text[len(answer)].isalnum()
        if not answer.startswith(text):
            return False
        row = model.extend([token], [1])[0]
    return said.decode("utf-8", "replace").strip() == answer


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def summarize(found: np.ndarray, base: np.ndarray | None, depths: Sequence[float]) -> dict[str, Any]:
    """Figures of one model with one cache at one length, over all depths and at each.

    found: float64 (haystacks, questions, 3); base: the same of the f16 cache, to compare with
    """
    result = {**_figures(found), "depths": []}
    for i, depth in enumerate(sorted(depths)):
        result["depths"].append({"depth": depth, **_figures(found[:, i : i + 1])})
    if base is not None:
        result["against_f16"] = {
            key: statistics.of_items(base[..., k].ravel() > 0.5, found[..., k].ravel() > 0.5).as_json()
            for k, key in enumerate(KEPT)
            if key != "log_probability"
        }
        difference = (np.exp(found[..., 0]) - np.exp(base[..., 0])).mean(1)
        if len(difference) > 1:
            result["against_f16"]["probability"] = _mean(difference, -1.0).as_json()
    return result


def _figures(found: np.ndarray) -> dict[str, Any]:
    """probability: of the right answer among the eight, mean; choice: how often it is the likeliest of them; greedy:
    how often it is what the model says. Intervals of shares are Wilson's; of the mean Student's, over haystacks."""
    figures: dict[str, Any] = {
        key: statistics.share(found[..., k].ravel() > 0.5).as_json() for k, key in ((1, "choice"), (2, "greedy"))
    }
    by_haystack = np.exp(found[..., 0]).mean(1)
    if len(by_haystack) > 1:
        figures["probability"] = _mean(by_haystack, 0.0).as_json()
    return figures


def _mean(values: np.ndarray, least: float) -> Figure:
    figure = repeated([float(value) - least for value in values], "probability")
    span = 1 - least
    return Figure(
        value=figure.value + least,
        low=figure.low + least,
        high=min(span, figure.high) + least,
        unit=figure.unit,
        n=figure.n,
    )
