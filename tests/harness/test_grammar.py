"""Which schemas count as held whole by llama.cpp's grammar; benchmarks/grammar_keywords.py asks a real server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from lowbit.harness import grammar

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "grammar_keywords.py"
# The rules that the real server was seen to break, or to refuse: it must never be relied on for them.
BROKEN = {
    "enum beside type", "const beside type", "required, not a property", "required alone", "prefixItems and minItems",
    "prefixItems, items: false", "uniqueItems", "contains", "pattern, not anchored", "pattern and maxLength",
    "minimum of a number", "multipleOf", "anyOf beside type", "anyOf beside properties", "oneOf, both", "allOf", "not",
    "$ref beside a rule", "patternProperties", "minProperties", "maxProperties", "dependentRequired", "true",
}  # fmt: skip
HELD = {
    "type: integer", "type: boolean", "type: null", "type: a list", "enum", "const", "required", "properties, open",
    "additionalProperties: false", "items", "minItems", "maxItems", "prefixItems", "minLength", "maxLength", "minimum",
    "maximum", "exclusiveMinimum", "anyOf", "$ref", "$ref, recursive", "unicode",
}  # fmt: skip


def cases() -> dict[str, tuple[Any, str]]:
    spec = importlib.util.spec_from_file_location("grammar_keywords", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, tuple[Any, str]] = module.CASES
    return found


def test_the_rules() -> None:
    held = {name for name, (schema, _) in cases().items() if grammar.holds(schema)}
    assert not held & BROKEN and held >= HELD
    assert cases().keys() >= BROKEN | HELD


class Child(BaseModel):
    name: str = Field(min_length=1, max_length=20)
    age: int = Field(ge=0, le=120)


class Family(BaseModel):
    children: list[Child]
    mother: Child | None
    tags: list[str]


class Score(BaseModel):
    value: float = Field(ge=0, le=1)


def test_what_pydantic_makes() -> None:
    assert grammar.holds(Family.model_json_schema())
    assert not grammar.holds(Score.model_json_schema())


@pytest.mark.parametrize(
    "schema",
    [
        True, False, {}, {"type": "object"}, {"type": "array"}, {"type": "string", "format": "email"},
        {"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "array", "items": {"type": "array"}}, {"type": "integer", "minimum": 0.5},
        {"type": ["integer", "number"], "minimum": 3}, {"$ref": "#"}, {"$ref": "#/properties/a"},
        {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
        {"$defs": {"n": {"pattern": "x"}}, "$ref": "#/$defs/n"}, {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"enum": [True], "type": "integer"}, {"type": "widget"},
    ],
)  # fmt: skip
def test_not_held(schema: Any) -> None:
    assert not grammar.holds(schema)
