"""JSON that must follow a schema: free generation, and generation that is kept within the schema, apart.

An answer is JSON if it is as a whole, or is the content of one code fence. It is then valid if it follows the schema
(jsonschema, Draft 2020-12), and right if every value that the set expects is there: numbers by value, strings without
regard to case and spaces, arrays in order, objects by the keys that are expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit import console
from lowbit.errors import BadOption, Unsupported
from lowbit.measure.tasks import _source
from lowbit.measure.tasks._engine import Engine
from lowbit.measure.tasks.base import Item, Metric, Outcome, Task, TaskOptions, data_file, shortened, spread

SYSTEM = (
    "Take the facts from the user's message. Answer with one JSON object that follows this JSON Schema, and nothing "
    "else:\n"
)
_MAX_TOKENS = 160
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)


@dataclass(kw_only=True)
class JsonSchema(Task):
    """max_tokens: of an answer."""

    kind = "json_schema"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "json": Metric(label="JSON", note="free generation: the answer parses"),
        "schema": Metric(label="Follows the schema", note="free generation"),
        "values": Metric(label="Right values", note="free generation: it follows the schema and the facts are right"),
        "schema_kept": Metric(label="Follows, kept in", note="each token kept within the schema"),
        "values_kept": Metric(label="Right values, kept in", note="each token kept within the schema"),
    }
    main = "values"
    sets: ClassVar[Mapping[str, str]] = {"json-schema": "facts to be put into JSON of a schema, flat to nested"}

    max_tokens: int = _MAX_TOKENS

    @classmethod
    def suits(cls, source: str, head: Mapping[str, Any] | None) -> bool:
        return head is not None and {"prompt", "schema"} <= head.keys()

    @classmethod
    def open(cls, source: str, options: TaskOptions) -> Self:
        own = source in cls.sets
        path = data_file("json-schema.jsonl") if own else Path(source)
        settings, lines = _source.read(path)
        _source.check_settings(path, settings, {"max_tokens": int})
        items = [_item(line, i) for i, line in enumerate(lines, start=1)]
        n = options.max_tokens or max(1, settings.get("max_tokens", _MAX_TOKENS))
        return cls(name=path.stem, source="comes with lowbit" if own else source, total=len(items),
                   items=spread(items, options.limit), settings={"max_tokens": n, "system": SYSTEM},
                   max_tokens=n)  # fmt: skip

    def way(self, engine: Engine) -> str:
        kept = "and kept within the schema" if engine.constrains else "; this runtime cannot be kept within a schema"
        return f"greedy generation, free {kept}".replace(" ;", ";")

    def outcome(self, item: Item, engine: Engine) -> Outcome:
        schema, expected = item.fields["schema"], item.fields["expected"]
        messages = [
            {"role": "system", "content": SYSTEM + json.dumps(schema, ensure_ascii=False)},
            {"role": "user", "content": item.fields["prompt"]},
        ]
        free = engine.chat(messages, max_tokens=self.max_tokens)
        scores: dict[str, float | None] = graded(free, schema, expected)
        outcome: Outcome = {"scores": scores, "answer": shortened(free.strip())}
        scores["schema_kept"] = scores["values_kept"] = None
        kept = _kept(engine, messages, self.max_tokens, schema) if engine.constrains else None
        if kept is not None:
            found = graded(kept, schema, expected)
            scores["schema_kept"], scores["values_kept"] = found["schema"], found["values"]
            outcome["answer_kept"] = shortened(kept.strip())
        return outcome


def _kept(
    engine: Engine, messages: Sequence[Mapping[str, Any]], max_tokens: int, schema: Mapping[str, Any]
) -> str | None:
    """The answer that is kept within the schema; None where no grammar can be made of it."""
    try:
        return engine.chat(messages, max_tokens=max_tokens, schema=schema)
    except (BadOption, Unsupported) as error:
        console.log(f"A schema is left out: {error}")
        return None


def graded(answer: str, schema: Mapping[str, Any], expected: Any) -> dict[str, float | None]:
    """Whether an answer is JSON, follows the schema, and has the values that are expected."""
    value = parsed(answer)
    valid = value is not _NOTHING and follows(value, schema)
    right = valid and agrees(value, expected)
    return {"json": float(value is not _NOTHING), "schema": float(valid), "values": float(right)}


_NOTHING = object()


def parsed(answer: str) -> Any:
    """The JSON that an answer is, alone or in one code fence; _NOTHING where it is none."""
    text = answer.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def follows(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value follows a schema. Nothing is fetched for a ``$ref``."""
    import jsonschema
    import referencing.exceptions

    validator = jsonschema.Draft202012Validator(schema, registry=_registry())
    try:
        return bool(validator.is_valid(value))
    except (referencing.exceptions.Unresolvable, RecursionError, re.error, OverflowError):
        return False


def _registry() -> Any:
    import referencing

    return referencing.Registry()  # without a way to retrieve anything


def agrees(found: Any, expected: Any) -> bool:
    """Whether everything expected is found."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(k in found and agrees(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return False
        return all(agrees(f, e) for f, e in zip(found, expected, strict=True))
    if isinstance(expected, bool) or expected is None or isinstance(found, bool):
        return found is expected
    if isinstance(expected, str):
        return isinstance(found, str) and _loosely(found) == _loosely(expected)
    return isinstance(found, int | float) and found == expected


def _loosely(text: str) -> str:
    return " ".join(text.casefold().split())


def _item(line: _source.Line, at: int) -> Item:
    import jsonschema

    schema, prompt = line.mapping("schema"), line.text("prompt")
    if "expected" not in line.fields:
        raise line.wrong('no "expected"', sorted(line.fields), "the values that a right answer has, {} for none")
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError) as error:
        raise line.wrong("no JSON Schema", getattr(error, "message", "too deep")) from None
    expected = line.fields["expected"]
    return Item(id=line.name(at), group=line.group(), question=prompt, expected=shortened(json.dumps(expected)),
                fields={"prompt": prompt, "schema": schema, "expected": expected})  # fmt: skip


TASK = JsonSchema
