"""Multiple choice: each choice's log-probability after the question, and the likeliest is the answer.

Scored as lm-eval does: ``acc`` by the log-probability as it is, ``acc_norm`` by it over the choice's length in
characters. An endpoint that gives no log-probabilities of a prompt is asked for the letter instead (``acc`` alone).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lowbit.measure.tasks import _source
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, shortened, spread

PROMPT = "Question: {question}\nAnswer:"
_SETTINGS: dict[str, type | tuple[type, ...]] = {"prompt": str, "delimiter": str, "shots": int, "description": str}


@dataclass(kw_only=True)
class MultipleChoice(Task):
    """examples: worked questions that precede each, as one text; prompt, delimiter: how a question is put, and what
    stands between it and a choice; chat: through the chat template."""

    kind = "multiple_choice"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "acc": Metric(label="Accuracy", note="by log-probability"),
        "acc_norm": Metric(label="Accuracy, by length", note="by log-probability over characters"),
        "margin": Metric(
            label="Margin", note="nats by which the right choice is likelier than the best other", unit="nats"
        ),
    }
    main = "acc"

    examples: str = ""
    prompt: str = PROMPT
    delimiter: str = " "
    chat: bool = False

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        return head is not None and "choices" in head

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        path = Path(source)
        settings, lines = _source.read(path)
        _source.check_settings(path, settings, _SETTINGS)
        shots = settings.get("shots", 0) if options.shots is None else options.shots
        shown, scored = _source.split_shots(lines, max(0, shots), path)
        items = [item_of(line, i) for i, line in enumerate(scored, start=1 + len(shown))]
        prompt, delimiter = settings.get("prompt", PROMPT), settings.get("delimiter", " ")
        description = settings.get("description", "")
        examples = "".join(
            prompt.replace("{question}", x.question) + delimiter + x.expected + "\n\n"
            for x in (item_of(line, i) for i, line in enumerate(shown, start=1))
        )
        return cls(
            name=path.stem, source=source, items=spread(items, options.limit), total=len(items), shots=len(shown),
            settings={"prompt": prompt, "delimiter": delimiter, "chat": options.chat,
                      "before": description + examples},
            examples=description + examples, prompt=prompt, delimiter=delimiter, chat=options.chat,
        )  # fmt: skip

    def way(self, engine: Engine) -> str:
        return "log-likelihood of each choice" if engine.scores else "asked for the letter"

    def prepare(self, engine: Engine) -> None:
        if engine.scores:
            engine.share(self._context(item, engine) for item in self.items)

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        choices, right = item.fields["choices"], item.fields["answer"]
        if not engine.scores:
            return asked_for_the_letter(item, engine, self.examples)
        delimiter = "" if self.chat and engine.templated else self.delimiter
        found = engine.loglikelihoods(self._context(item, engine), [delimiter + choice for choice in choices])
        return outcome_of([x.logprob for x in found], choices, right)

    def _context(self, item: Item, engine: Engine) -> str:
        text = self.examples + self.prompt.replace("{question}", item.question)
        if self.chat and engine.templated:
            return engine.rendered([{"role": "user", "content": text}]) or text
        return text


def outcome_of(logprobs: Sequence[float], choices: Sequence[str], right: int) -> Outcome:
    """Right or wrong by both rules, and the margin: the right choice's log-probability less the best wrong one's."""
    plain = int(np.argmax(logprobs))
    by_length = int(np.argmax(np.array(logprobs) / np.array([float(max(1, len(c))) for c in choices])))
    wrong = [x for i, x in enumerate(logprobs) if i != right]
    return {
        "scores": {
            "acc": float(plain == right),
            "acc_norm": float(by_length == right),
            "margin": logprobs[right] - max(wrong),
        },
        "answer": shortened(choices[plain]),
        "logprobs": [float(x) for x in logprobs],
    }


def asked_for_the_letter(item: Item, engine: Engine, before: str = "") -> Outcome:
    """For a model whose probabilities of a text are out of reach: the choices get letters. The likeliest letter as the
    answer's first token counts, or where that is unknown too, the first that the answer has by itself."""
    choices, right = item.fields["choices"], item.fields["answer"]
    letters = string.ascii_uppercase[: len(choices)]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=False))
    question = f"{before}{item.question}\n{listed}\nAnswer with the letter of the right choice alone."
    messages = [{"role": "user", "content": question}]
    said, chosen = "", engine.letter(messages, letters)
    if chosen is None:
        said = engine.chat(messages, max_tokens=8)
        chosen = letter_in(said, letters)
    return {
        "scores": {"acc": float(chosen == right), "acc_norm": None, "margin": None},
        "answer": shortened(choices[chosen] if chosen is not None else said.strip()),
    }


def letter_in(text: str, letters: str) -> int | None:
    """The first of the letters that stands alone in a text, as its index: "The answer is B." -> 1."""
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return next((letters.index(word) for word in words if len(word) == 1 and word in letters), None)


def item_of(line: _source.Line, at: int) -> Item:
    """A line as an item. Raises BadText naming the line."""
    question, choices = line.text("question"), line.texts("choices", 2)
    if len(choices) > len(string.ascii_uppercase):
        raise line.wrong("too many choices", len(choices), f"{len(string.ascii_uppercase)} at most")
    if len(set(choices)) < len(choices) or not all(c.strip() for c in choices):
        raise line.wrong("a choice is empty or there twice", choices, "choices that differ")
    right = _index(line, choices)
    return Item(id=line.name(at), question=question, expected=choices[right], group=line.group(),
                fields={"question": question, "choices": choices, "answer": right})  # fmt: skip


def _index(line: _source.Line, choices: list[str]) -> int:
    """An index from 0, one of the choices itself, or its letter."""
    answer = line.fields.get("answer")
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer in string.ascii_uppercase[: len(choices)]:
            return string.ascii_uppercase.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    expected = f"an index from 0 to {len(choices) - 1}, a letter, or one of the choices"
    raise line.wrong('bad "answer"', answer, expected)


TASK = MultipleChoice
