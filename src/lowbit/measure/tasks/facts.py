"""Adversarial factual probes: a true statement against its false twin, and questions with a tempting wrong answer.

Both are scored by log-probability, so that models too small to chat give a signal: the true statement as a whole must
be likelier than the false one, and the right answer likelier than every tempting one. The set that comes with lowbit
is its own (data/SOURCES.md); a JSONL file of the same form is taken too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.measure.tasks import _source
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, data_file, spread
from lowbit.measure.tasks.multiple_choice import asked_for_the_letter

PROMPT = "Question: {question}\nAnswer:"


@dataclass(kw_only=True)
class Facts(Task):
    kind = "facts"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "acc": Metric(label="Right", note="the true statement or answer is the likeliest"),
        "margin": Metric(label="Margin", note="nats by which it is likelier than the best wrong one", unit="nats"),
    }
    main = "acc"
    sets: ClassVar[Mapping[str, str]] = {"facts": "true and false twins, and questions with a tempting wrong answer"}

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        return head is not None and ({"true", "false"} <= head.keys() or {"question", "right", "wrong"} <= head.keys())

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        own = source in cls.sets
        path = data_file("facts.jsonl") if own else Path(source)
        settings, lines = _source.read(path)
        _source.check_settings(path, settings, {})
        items = [_item(line, i) for i, line in enumerate(lines, start=1)]
        return cls(name=path.stem, source="comes with lowbit" if own else source,
                   items=spread(items, options.limit), total=len(items), settings={"prompt": PROMPT})  # fmt: skip

    def way(self, engine: Engine) -> str:
        return "log-likelihood of the true and the false" if engine.scores else "asked for the letter"

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        if not engine.scores:
            return _asked(item, engine)
        context, options = item.fields["context"], item.fields["options"]
        found = [x.logprob for x in engine.loglikelihoods(context, options)]
        return outcome_of(found, options)


def outcome_of(logprobs: Sequence[float], options: Sequence[str]) -> Outcome:
    """The first of the options is the right one."""
    best = max(range(len(options)), key=lambda i: logprobs[i])
    margin = logprobs[0] - max(logprobs[1:])
    return {"scores": {"acc": float(margin > 0), "margin": margin}, "answer": options[best].strip(),
            "logprobs": list(logprobs)}  # fmt: skip


def _asked(item: Item, engine: Engine) -> Outcome:
    """The options in an order of their own, which does not tell the right one."""
    options = sorted(option.strip() for option in item.fields["options"])
    right = options.index(item.expected)
    asked = Item(id=item.id, question=item.question, expected=item.expected,
                 fields={"choices": options, "answer": right})  # fmt: skip
    found = asked_for_the_letter(asked, engine)
    return {"scores": {"acc": found["scores"]["acc"], "margin": None}, "answer": found["answer"]}


def _item(line: _source.Line, at: int) -> Item:
    name, group = line.name(at), line.group()
    if "true" in line.fields:
        options = [line.text("true"), line.text("false")]
        if options[0] == options[1]:
            raise line.wrong('"true" and "false" are the same', options[0])
        return Item(id=name, group=group, question="Which of these is true?", expected=options[0],
                    fields={"context": "", "options": options})  # fmt: skip
    right, wrong, question = line.text("right"), line.texts("wrong"), line.text("question")
    if right in wrong:
        raise line.wrong("the right answer is among the wrong ones", right)
    return Item(id=name, group=group, question=question, expected=right,
                fields={"context": PROMPT.replace("{question}", question),
                        "options": [f" {answer}" for answer in (right, *wrong)]})  # fmt: skip


TASK = Facts
