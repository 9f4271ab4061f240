"""JSON that must follow a schema: reading it out of what a model wrote, mending it, and saying what is wrong."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lowbit.harness import grammar
from lowbit.harness.failures import BadRequest, Problem
from lowbit.harness.repair import TwoKeys, loads, mended
from lowbit.harness.trace import Trace

_DEEPEST = 64  # nesting of a schema or a value; Python's own limit is near 1,000 frames
_LARGEST = 1 << 20  # characters of a schema
_KEPT = 1 << 16  # characters of one that is remembered: a batch has the same for every item


@dataclass(frozen=True)
class Schema:
    """A JSON Schema that has been checked. raw: as it was given."""

    raw: Any

    @classmethod
    def read(cls, raw: Any, where: str) -> Schema:
        """Raises BadRequest where it is no schema, or one that reaches outside itself."""
        if not isinstance(raw, dict | bool):
            raise BadRequest(f"{where} must be a JSON Schema, an object", param=where)
        try:
            text = json.dumps(raw)
            if len(text) > _LARGEST or depth(raw) > _DEEPEST:
                raise BadRequest(f"{where} is too large or too deep", param=where)
        except (RecursionError, TypeError, ValueError) as error:
            raise BadRequest(f"{where} is no JSON Schema: {str(error)[:200]}", param=where) from None
        return _read(text, where) if len(text) <= _KEPT else _read.__wrapped__(text, where)

    @functools.cached_property
    def whole_in_grammar(self) -> bool:
        """Whether llama.cpp's grammar enforces all that this schema says."""
        return grammar.holds(self.raw)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, for a person and a model to read; None where nothing is."""
        from jsonschema import exceptions

        try:
            if depth(value) > _DEEPEST:
                return f"the value is nested more than {_DEEPEST} deep"
            error = exceptions.best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "the value is nested too deep"
        except Exception as error:  # a $ref to nowhere, a pattern that is no regular expression
            return f"the schema cannot be applied: {type(error).__name__} {str(error)[:200]}"
        if error is None:
            return None
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
        return f"at {path}: {error.message[:300]}" if path else error.message[:300]

    @functools.cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import extend, validator_for
        from referencing import Registry

        kind = validator_for(self.raw, default=_default())
        # Its own registry, empty: nothing is ever fetched for a $ref.
        return extend(kind, {"pattern": _pattern})(self.raw, registry=Registry())


def read_value(text: str, schema: Schema, trace: Trace, *, repair: bool) -> tuple[Any, Problem | None]:
    """The value in what a model wrote, and what is wrong with it.

    With ``repair``, fences and words around the JSON are cut off, and broken JSON is mended where it leaves no doubt
    (repair.py); what was done is in the trace. A mended value still has to follow the schema.
    """
    advice = "Answer with the JSON alone, and make it follow the schema."
    try:
        value = loads(text)
    except TwoKeys as error:
        return None, Problem(kind="schema", detail=str(error), advice=advice)
    except (ValueError, RecursionError) as error:
        if not repair:
            return None, Problem(kind="not_json", detail=f"the answer is not JSON: {error}", advice=advice)
        value, how = mended(text, schema.raw)
        if how is None:
            holds = "{" in text or "[" in text
            detail = f"the answer is not JSON: {error}" if holds else "the answer holds no JSON"
            return None, Problem(kind="not_json", detail=detail, advice=advice)
        trace.add("repair", how)
    if wrong := schema.problem(value):
        return value, Problem(kind="schema", detail=f"the JSON does not follow the schema: {wrong}", advice=advice)
    return value, None


def depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        deepest, level = deepest + bool(inner), inner
        if deepest > 10_000:
            break
    return deepest


@functools.lru_cache(maxsize=64)
def _read(text: str, where: str) -> Schema:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    raw = json.loads(text)
    try:
        validator_for(raw, default=_default()).check_schema(raw)
    except SchemaError as error:
        raise BadRequest(f"{where} is no JSON Schema: {error.message[:200]}", param=where) from None
    except (RecursionError, TypeError, ValueError) as error:
        raise BadRequest(f"{where} is no JSON Schema: {str(error)[:200]}", param=where) from None
    for reference in _references(raw):
        if not reference.startswith("#"):
            raise BadRequest(f"{where} refers to something outside it: {reference[:100]}", param=where)
    return Schema(raw)


def _default() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """As jsonschema's own, with a bound on the time that a hostile pattern can take."""
    from jsonschema.exceptions import ValidationError

    if validator.is_type(instance, "string"):
        import regex

        try:
            if not regex.search(pattern, instance, timeout=1):
                yield ValidationError(f"{instance[:100]!r} does not match {pattern[:100]!r}")
        except TimeoutError:
            yield ValidationError(f"the pattern {pattern[:100]!r} takes too long")


def _walk(schema: Any, visit: Callable[[dict[str, Any]], None]) -> None:
    """Every subschema, by the places where JSON Schema has them; names of properties are no keywords."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if not isinstance(node, dict):
            continue
        visit(node)
        for key, value in node.items():
            if key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
                todo.extend(value.values() if isinstance(value, dict) else ())
            elif key in ("enum", "const", "default", "examples"):
                continue
            elif isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, list):
                todo.extend(item for item in value if isinstance(item, dict))


def _references(schema: Any) -> list[str]:
    found: list[str] = []

    def visit(node: dict[str, Any]) -> None:
        found.extend(str(node[key]) for key in ("$ref", "$dynamicRef", "$recursiveRef") if key in node)

    _walk(schema, visit)
    return found
