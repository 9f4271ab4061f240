"""Tool calls: BFCL's questions, as the PyPI package bfcl-eval ships them, through the model's chat template.

The calls in a greedy answer are read in whatever syntax the model writes (lowbit.harness.dialects) and checked by
BFCL's rules (_call_checker.py). For models too small for that there is a second figure by log-probability: of the tools
that are offered, is the right one the likeliest to be called; and is the right call likelier than one with a wrong
argument.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.errors import BadOption, NotFound
from lowbit.harness import dialects
from lowbit.harness.answer import Call as WrittenCall
from lowbit.measure.tasks import _call_checker, _source
from lowbit.measure.tasks._call_checker import Call
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, shortened, spread

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
_MAX_TOKENS = 192
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_NATURAL = "hermes"  # the syntax where a chat template says nothing about tools


@dataclass(kw_only=True)
class ToolCalls(Task):
    """max_tokens: of an answer."""

    kind = "tool_calls"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "calls": Metric(label="Right calls", note="greedy answer, by BFCL's rules; none where none is right"),
        "tool": Metric(label="Right tool", note="by log-probability, among the tools that are offered"),
        "argument": Metric(label="Right argument", note="by log-probability, against a call with a wrong one"),
        "margin": Metric(label="Margin", note="nats by which the right call is likelier than the best other one",
                         unit="nats"),
    }  # fmt: skip
    main = "calls"
    sets: ClassVar[Mapping[str, str]] = {
        "tool-calls": "BFCL's simple, multiple, parallel and irrelevance questions (bfcl:CATEGORY for one of them)"
    }

    max_tokens: int = _MAX_TOKENS

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        return source.startswith("bfcl:") or (head is not None and {"question", "function"} <= head.keys())

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        shipped = source in cls.sets or source.startswith("bfcl:")
        items = list(_shipped(source)) if shipped else _of_file(Path(source))
        others = _strings(items)
        for i, item in enumerate(items):
            item.fields["wrong"] = _wrong_calls(item, others, i)  # type: ignore[index]
        n = options.max_tokens or _MAX_TOKENS
        return cls(name=source if shipped else Path(source).stem, source="bfcl-eval" if shipped else source,
                   items=spread(items, options.limit), total=len(items), settings={"max_tokens": n},
                   max_tokens=n)  # fmt: skip

    def way(self, engine: Engine) -> str:
        scored = "; right and wrong calls by log-likelihood" if engine.scores else ""
        return f"greedy generation{scored}"

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        functions, wanted = item.fields["function"], item.fields["ground_truth"]
        tools = [tool_of(f) for f in functions]
        messages, shown, syntax = _asked(item.fields["question"], tools, engine)
        said = engine.chat(messages, max_tokens=self.max_tokens, tools=shown)
        calls = calls_in(said, [f["name"] for f in functions], syntax)
        right = calls is not None and _call_checker.right(calls, functions, wanted)
        scores: dict[str, float | None] = {"calls": float(right), "tool": None, "argument": None, "margin": None}
        if engine.scores and item.fields["wrong"]:
            kind, texts = _written(item, syntax)
            context = engine.rendered(messages, shown)
            assert context is not None
            found = [x.logprob for x in engine.loglikelihoods(context, texts)]
            margin = found[0] - max(found[1:])
            scores |= {"margin": margin, kind: float(margin > 0)}
        return {"scores": scores, "answer": shortened(said.strip())}


def calls_in(text: str, tools: Sequence[str], syntax: str = _NATURAL) -> list[Call] | None:
    """The calls in an answer, read in the model's own syntax, else in any that finds some; [] where there are none,
    None where a call's arguments are broken."""
    for name in dict.fromkeys((syntax, *dialects.names())):
        found = dialects.get(name).parse(text, tools)
        if found.calls:
            if found.notes:
                return None
            try:
                read = [Call(name=c.name, arguments=json.loads(c.arguments or "{}")) for c in found.calls]
            except (ValueError, RecursionError):
                return None
            return read if all(isinstance(c.arguments, dict) for c in read) else None
    return []


def tool_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function as BFCL describes it, in OpenAI's form."""
    return {"type": "function", "function": {**function, "parameters": _json_types(function["parameters"])}}


def _json_types(about: Any) -> Any:
    if isinstance(about, dict):
        kept = {k: _json_types(v) for k, v in about.items()}
        kind = kept.get("type")
        if kind == "any":
            del kept["type"]
        elif isinstance(kind, str):
            kept["type"] = _JSON_TYPES.get(kind, kind)
        return kept
    return [_json_types(v) for v in about] if isinstance(about, list) else about


def _asked(
    question: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]], engine: Engine
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]] | None, str]:
    """The conversation, the tools for the template, and the syntax of calls. A template that leaves tools out gets
    them as a system message."""
    rendered = engine.rendered(question, tools)
    if rendered is None:
        return list(question), tools, _NATURAL
    bare = engine.rendered(question) or ""
    name = tools[0]["function"]["name"]
    if rendered.count(name) > bare.count(name):
        return list(question), tools, _syntax_of(rendered)
    described = dialects.get(_NATURAL).describe(tools)
    system = [described, *(str(m["content"]) for m in question if m.get("role") == "system")]
    rest = [m for m in question if m.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *rest], None, _NATURAL


def _syntax_of(prompt: str) -> str:
    marks = ((name, dialects.get(name).marks) for name in dialects.names())
    return next((name for name, signs in marks if any(len(s) > 2 and s in prompt for s in signs)), _NATURAL)


def _written(item: Item, syntax: str) -> tuple[str, list[str]]:
    """("tool" or "argument", the right call's text and the wrong ones')."""
    dialect = dialects.get(syntax)
    calls = [_right_call(item), *item.fields["wrong"]]
    texts = [dialect.call_text([WrittenCall(name, json.dumps(arguments))]) for name, arguments in calls]
    if len(item.fields["function"]) == 1:
        return "argument", texts
    # Only as far as the tool is named: what follows are other tools' arguments.
    return "tool", [text[: text.index(name) + len(name) + 1] for text, (name, _) in zip(texts, calls, strict=True)]


def _right_call(item: Item) -> tuple[str, dict[str, Any]]:
    name, parameters = next(iter(item.fields["ground_truth"][0].items()))
    return name, {k: plainly(v[0]) for k, v in parameters.items() if v and v[0] != ""}


def plainly(value: Any) -> Any:
    """An acceptable value with the first choice of what is nested in it."""
    if isinstance(value, dict):
        return {k: plainly(v[0]) if isinstance(v, list) and v else v for k, v in value.items()}
    return [plainly(v) for v in value] if isinstance(value, list) else value


def _strings(items: Sequence[Item]) -> list[str]:
    calls = [_right_call(item) for item in items if item.fields["ground_truth"]]
    return [v for _, arguments in calls for v in arguments.values() if isinstance(v, str)] or ["nothing"]


def _wrong_calls(item: Item, others: Sequence[str], seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Calls that are wrong: of the other tools that are offered, or with another value for the first argument that can
    have one. None where no call is right."""
    if not item.fields["ground_truth"]:
        return []
    name, arguments = _right_call(item)
    if len(item.fields["function"]) > 1:
        wanted = {n for want in item.fields["ground_truth"] for n in want}
        return [(f["name"], {}) for f in item.fields["function"] if f["name"] not in wanted]
    for key, value in arguments.items():
        changed: Any = None
        if isinstance(value, bool):
            changed = not value
        elif isinstance(value, int | float):
            changed = value + (1 if isinstance(value, int) else 0.5)
        elif isinstance(value, str):
            changed = next((o for o in (*others[seed % len(others) :], *others) if o != value), None)
        acceptable = item.fields["ground_truth"][0][name][key]
        if changed is not None and changed not in acceptable:
            return [(name, {**arguments, key: changed})]
    return []


def data_folder(source: str) -> Path:
    """Where bfcl-eval's data is. Raises NotFound, naming ``source``."""
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        raise NotFound("bfcl-eval is not installed", where=source, expected="its data",
                       hint="pip install --no-deps bfcl-eval==2026.3.23")  # fmt: skip
    return Path(next(iter(found.submodule_search_locations))) / "data"


def _shipped(source: str) -> Iterator[Item]:
    """Items of bfcl-eval's data."""
    folder = data_folder(source)
    category = source.removeprefix("bfcl:")
    wanted = CATEGORIES if source in ToolCalls.sets else (category,)
    if category not in CATEGORIES and source not in ToolCalls.sets:
        raise BadOption("no such category", found=category, expected=", ".join(CATEGORIES))
    for name in wanted:
        file = f"BFCL_v4_{name}.json"
        answers = {}
        if (folder / "possible_answer" / file).exists():
            _, lines = _source.read(folder / "possible_answer" / file)
            answers = {line.text("id"): line.fields["ground_truth"] for line in lines}
        for line in _source.read(folder / file)[1]:
            yield _item(line, answers.get(line.text("id"), []), line.text("id"), name)


def _of_file(path: Path) -> list[Item]:
    """Items of a JSONL file in BFCL's form, "ground_truth" in the same line."""
    settings, lines = _source.read(path)
    _source.check_settings(path, settings, {})
    return [
        _item(line, line.fields.get("ground_truth", []), line.name(i), line.group()) for i, line in enumerate(lines, 1)
    ]


def _item(line: _source.Line, wanted: Any, name: str, group: str) -> Item:
    question, functions = line.fields.get("question"), line.fields.get("function")
    question = question[0] if isinstance(question, list) and question and isinstance(question[0], list) else question
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    if not _are(question, "role", "content"):
        raise line.wrong('bad "question"', line.fields.get("question"), "a text, or messages with role and content")
    if not _are(functions, "name") or not all(_is_function(f) for f in functions or ()):
        raise line.wrong('bad "function"', functions, "functions with name and parameters (properties with a type)")
    known = {f["name"] for f in functions or ()}
    if not isinstance(wanted, list) or not all(_is_wanted(w, known) for w in wanted):
        raise line.wrong('bad "ground_truth"', wanted, "[{FUNCTION: {PARAMETER: [VALUE, ...]}}], [] for no call")
    fields = {"question": question, "function": functions, "ground_truth": wanted}
    text = str((question or [{}])[-1].get("content", ""))
    return Item(id=name, group=group, question=text, expected=shortened(json.dumps(wanted, ensure_ascii=False)),
                fields=fields)  # fmt: skip


def _are(value: Any, *keys: str) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(v, dict) and all(isinstance(v.get(k), str) for k in keys) for v in value)


def _is_function(value: Mapping[str, Any]) -> bool:
    about = value.get("parameters")
    properties = about.get("properties") if isinstance(about, dict) else None
    if not isinstance(properties, dict) or not isinstance(about.get("required", []), list):  # type: ignore[union-attr]
        return False
    return all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in properties.values())


def _is_wanted(value: Any, known: set[str]) -> bool:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in known:
        return False
    parameters = next(iter(value.values()))
    return isinstance(parameters, dict) and all(isinstance(v, list) and v for v in parameters.values())


TASK = ToolCalls
