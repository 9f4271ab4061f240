"""Needles: what is asked has one right answer, prefixes are reused without a trace, and a copying model finds facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.errors import BadOption, BadText
from lowbit.measure import MeasureOptions, RetrievalOptions, measure, needles, retrieval
from lowbit.measure.needles import CANDIDATES, haystack
from lowbit.run._llama_slots import Slots
from lowbit.run.llama_cpp import LlamaCpp

DEPTHS = (0.0, 0.5, 1.0)


def slots(path: Path) -> Slots:
    return Slots(path, sequences=3, context=1536, unified=True, threads=1, kv_type="f32", flash_attention=False)


def made(model: Any, folder: Path, seed: int = 0, length: int = 1024) -> needles.Haystack:
    filler = np.array(model.tokenize((folder / "text.txt").read_text(encoding="utf-8")), np.int32)
    return haystack(model, filler, length=length, depths=DEPTHS, bos=1, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(6))
def test_each_question_has_one_answer_in_the_text(folder: Path, seed: int) -> None:
    with slots(folder / "reference.gguf") as model:
        stack = made(model, folder, seed)
        text = model.detokenize(stack.tokens.tolist())
        assert stack.tokens[0] == 1 and len(stack.questions) == len(DEPTHS)
        for question in stack.questions:
            words = [model.detokenize(ids.tolist()).strip() for ids in question.candidates]
            assert words[0] == question.answer and len(set(words)) == CANDIDATES
            assert text.count(question.answer) == 1
            asked = model.detokenize(question.tokens.tolist())
            # The last line of the question is the fact up to its answer.
            stem = asked.rpartition("Answer: ")[2]
            assert f"{stem} {question.answer}." in text
            longest = len(stack.tokens) + len(question.tokens) + question.candidates.shape[1]
            assert longest <= 1024
            share = question.at / len(stack.tokens)
            assert abs(share - question.depth) < 0.25
        places = [question.at for question in sorted(stack.questions, key=lambda q: q.depth)]
        assert places == sorted(places)


def test_the_same_seed_gives_the_same_haystack(folder: Path) -> None:
    with slots(folder / "reference.gguf") as model:
        first, again, other = made(model, folder, 3), made(model, folder, 3), made(model, folder, 4)
    assert np.array_equal(first.tokens, again.tokens) and not np.array_equal(first.tokens, other.tokens)


def test_answers_are_those_of_whole_prompts(folder: Path) -> None:
    """The reuse of the prefix changes nothing: against each candidate's whole prompt, read anew."""
    with slots(folder / "reference.gguf") as model:
        stack = made(model, folder, 1)
        found = retrieval.ask(model, stack)
    with LlamaCpp(folder / "reference.gguf", context=1536, threads=1, kv_type="f32", flash_attention=False) as model:
        for question, kept in zip(stack.questions, found, strict=True):
            scores = []
            prompt = np.concatenate([stack.tokens, question.tokens])
            for ids in question.candidates:
                rows = np.concatenate([r for _, r in model.logits(np.concatenate([prompt, ids]), len(prompt) - 1)])
                rows = rows[: len(ids)].astype(np.float64)
                log_p = rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
                log_p -= rows.max(-1, keepdims=True)
                scores.append(log_p[np.arange(len(ids)), ids].sum())
            scores = np.array(scores) - max(scores)
            assert kept[0] == pytest.approx(scores[0] - np.log(np.exp(scores).sum()), abs=2e-3)
            assert kept[1] == (scores.argmax() == 0)
            said = model.detokenize(list(model.generate(prompt, 30))).lstrip()
            assert kept[2] == (said.startswith(question.answer) and not said[len(question.answer) :][:1].isalnum())


def test_a_real_model_finds_what_is_near(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M: a fact right before the question is found, far better than chance."""
    held_out = Path(needles.__file__).parents[1] / "data" / "held-out.txt"
    probes = RetrievalOptions(lengths=(256,), depths=(0.0, 1.0), haystacks=3)
    options = MeasureOptions(chunk=64, chunks=1, threads=1, speed=False, memory=False, retrieval=probes)
    found = measure(smollm2, against=smollm2, text=held_out, options=options)["retrieval"]
    [cell] = found["artifacts"][0]["cells"]
    assert cell == {**found["reference"][0], "haystacks": 3}
    near = cell["depths"][1]
    assert near["depth"] == 1 and near["probability"]["value"] > 0.4 and near["choice"]["n"] == 3
    assert near["probability"]["low"] <= near["probability"]["value"] <= near["probability"]["high"] <= 1
    assert cell["greedy"]["n"] == 6 and found["chance"] == 1 / 8


def test_impossible_options_are_refused(folder: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"lengths": ()}, {"lengths": (100,)}, {"depths": ()}, {"depths": (1.5,)}, {"depths": (0.5, 0.5)},
        {"depths": tuple(i / 10 for i in range(9))}, {"haystacks": 0},
    ]  # fmt: skip
    for options in bad:
        with pytest.raises(BadOption):
            RetrievalOptions(**options)
    with slots(folder / "reference.gguf") as model, pytest.raises(BadText, match="no room"):
        made(model, folder, length=300)
