"""Exact match: a greedy answer, compared with the right ones after a normalisation that the file states."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.errors import BadText
from lowbit.measure.tasks import _source
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, shortened, spread

_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "normalize": str, "stop": (str, list), "shots": int, "max_tokens": int, "description": str,
}  # fmt: skip
_MAX_TOKENS = 64


def _words(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _number(text: str) -> str:
    """The last number in the text, without thousands separators: "it is 1,200.50 euros" -> "1200.5"."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return ""
    whole, _, fraction = found[-1].replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return f"{int(whole) if len(whole) < 400 else whole}" + (f".{fraction}" if fraction else "")


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "words": _words,
    "case": lambda text: " ".join(text.lower().split()),
    "number": _number,
    "none": str.strip,
}


@dataclass(kw_only=True)
class ExactMatch(Task):
    """examples: worked prompts that precede each; normalize: a key of NORMALISATIONS; stop: strings that end an
    answer."""

    kind = "exact_match"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "exact_match": Metric(label="Exact match", note="after normalisation"),
        "contains": Metric(label="Contains the answer", note="as whole words, after normalisation"),
    }
    main = "exact_match"

    examples: str = ""
    normalize: str = "words"
    stop: list[str] = field(default_factory=lambda: ["\n"])
    max_tokens: int = _MAX_TOKENS
    chat: bool = False

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        return head is not None and "prompt" in head and ("answers" in head or "answer" in head)

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        path = Path(source)
        settings, lines = _source.read(path)
        _source.check_settings(path, settings, _SETTINGS)
        normalize = settings.get("normalize", "words")
        if normalize not in NORMALISATIONS:
            raise BadText("unknown normalisation", where=f"{path}: line 1", found=repr(normalize),
                          expected=", ".join(NORMALISATIONS))  # fmt: skip
        stop = settings.get("stop", ["\n"])
        stop = [stop] if isinstance(stop, str) else [str(s) for s in stop]
        shots = settings.get("shots", 0) if options.shots is None else options.shots
        shown, scored = _source.split_shots(lines, max(0, shots), path)
        before = settings.get("description", "")
        for line in shown:
            before += line.text("prompt") + " " + _answers(line)[0] + "\n\n"
        items = [_item(line, i, normalize) for i, line in enumerate(scored, start=1 + len(shown))]
        max_tokens = options.max_tokens or max(1, settings.get("max_tokens", _MAX_TOKENS))
        return cls(
            name=path.stem, source=source, items=spread(items, options.limit), total=len(items), shots=len(shown),
            settings={"normalize": normalize, "stop": stop, "max_tokens": max_tokens, "chat": options.chat,
                      "before": before},
            examples=before, normalize=normalize, stop=stop, max_tokens=max_tokens, chat=options.chat,
        )  # fmt: skip

    def way(self, engine: Engine) -> str:
        return f"greedy generation, compared by {self.normalize}"

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        prompt = self.examples + item.fields["prompt"]
        if self.chat and engine.templated:
            said = engine.chat([{"role": "user", "content": prompt}], max_tokens=self.max_tokens)
            said = said.strip()
        else:
            said = engine.complete(prompt, max_tokens=self.max_tokens, stop=self.stop)
        return graded(said, item.fields["answers"], self.normalize)


def graded(said: str, answers: list[str], normalize: str) -> Outcome:
    """An answer against the right ones."""
    change = NORMALISATIONS[normalize]
    found, right = change(said), [change(a) for a in answers]
    within = any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", found) for a in right if a)
    return {"scores": {"exact_match": float(found in right), "contains": float(within)},
            "answer": shortened(said.strip())}  # fmt: skip


def _answers(line: _source.Line) -> list[str]:
    return line.texts("answers" if "answers" in line.fields else "answer")


def _item(line: _source.Line, at: int, normalize: str) -> Item:
    answers = _answers(line)
    if not all(NORMALISATIONS[normalize](a) for a in answers):
        raise line.wrong("nothing is left of an answer after normalisation", answers, f"more, or not {normalize!r}")
    prompt = line.text("prompt")
    return Item(id=line.name(at), question=prompt, expected=answers[0], group=line.group(),
                fields={"prompt": prompt, "answers": answers})  # fmt: skip


TASK = ExactMatch
