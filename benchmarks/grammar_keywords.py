"""Which keywords of JSON Schema llama.cpp's server really enforces: small schemas, a model told to break each of them.

``python benchmarks/grammar_keywords.py [--model smollm2-135m] [--seeds 20] [--only pattern]``

Each case is a schema of one rule and a request for exactly what the rule forbids. Sampled hot (temperature 1.5), a
rule that the grammar leaves out is broken within a few seeds. Whole answers alone are judged; a text that was cut at
the token limit says nothing. Prints a line for each case: how many answers were whole, how many broke the schema, what
the server refused, and what ``lowbit.harness.grammar`` believes of it. Ends with 1 where a rule that it holds for
enforced was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from jsonschema import Draft202012Validator

from lowbit.checkpoint import resolve
from lowbit.errors import LowbitError
from lowbit.harness.structured import Schema
from lowbit.run.llama_server import LlamaServer

_A = {"type": "object", "properties": {"a": {"type": "integer"}}}
_LEAF = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
_NODE = {
    "type": "object", "required": ["v"], "additionalProperties": False,
    "properties": {"v": {"enum": [1, 2]}, "next": {"$ref": "#/$defs/n"}},
}  # fmt: skip
# name: (schema, what forbids it)
CASES: dict[str, tuple[Any, str]] = {
    "type: integer": ({"type": "integer"}, '"hello"'),
    "type: boolean": ({"type": "boolean"}, "5"),
    "type: null": ({"type": "null"}, "5"),
    "type: a list": ({"type": ["integer", "null"]}, '"x"'),
    "type: list with minLength": ({"type": ["string", "null"], "minLength": 3}, '"x"'),
    "enum": ({"enum": ["red", 7, None]}, '"green"'),
    "enum beside type": ({"type": "string", "enum": ["red", 7]}, "7"),
    "const": ({"const": {"a": [1, "x"]}}, '{"a": 2}'),
    "const beside type": ({"type": "string", "const": 7}, "7"),
    "required": (_LEAF, "{}"),
    "required, not a property": ({**_A, "required": ["b"]}, '{"a": 1}'),
    "required alone": ({"type": "object", "required": ["b"]}, '{"a": 1}'),
    "properties without type": ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a": "x"}'),
    "properties, open": (_A, '{"a": "x", "b": 1}'),
    "additionalProperties: false": ({**_A, "additionalProperties": False}, '{"b": 1}'),
    "additionalProperties: schema": ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"b": "x"}'),
    "additionalProperties beside": ({**_A, "additionalProperties": {"type": "null"}}, '{"b": "x", "a": 1}'),
    "items": ({"type": "array", "items": {"type": "integer"}}, '["x", "y"]'),
    "items without type": ({"items": {"type": "integer"}}, '["x", "y"]'),
    "minItems": ({"type": "array", "items": {"enum": [1]}, "minItems": 3}, "[1]"),
    "maxItems": ({"type": "array", "items": {"enum": [1]}, "maxItems": 2}, "[1, 1, 1, 1, 1]"),
    "minItems without items": ({"type": "array", "minItems": 3}, "[1]"),
    "maxItems without items": ({"type": "array", "maxItems": 1}, "[1, 2, 3, 4]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}, {"enum": ["x"]}]}, '["x", 1]'),
    "prefixItems and minItems": ({"type": "array", "prefixItems": [{"enum": [1]}], "minItems": 3}, "[1]"),
    "prefixItems, items: false": ({"type": "array", "prefixItems": [{"enum": [1]}], "items": False}, "[1, 2, 3]"),
    "uniqueItems": ({"type": "array", "items": {"enum": [1]}, "minItems": 2, "uniqueItems": True}, "[1, 1]"),
    "contains": ({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "contains": {"const": 2}}, "[1, 1]"),
    "minLength": ({"type": "string", "minLength": 6}, '"ab"'),
    "maxLength": ({"type": "string", "maxLength": 3}, '"abcdefghij"'),
    "minLength without type": ({"minLength": 6}, '"ab"'),
    "pattern": ({"type": "string", "pattern": "^[0-9]{3}$"}, '"abcd"'),
    "pattern, not anchored": ({"type": "string", "pattern": "[0-9]{3}"}, '"abcd"'),
    "pattern and maxLength": ({"type": "string", "pattern": "^[0-9]+$", "maxLength": 3}, '"123456789"'),
    "format: date": ({"type": "string", "format": "date"}, '"hello"'),
    "minimum": ({"type": "integer", "minimum": 10}, "3"),
    "maximum": ({"type": "integer", "maximum": 10}, "99"),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3, "maximum": 5}, "3"),
    "minimum of a number": ({"type": "number", "minimum": 10}, "3.5"),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, "3"),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, '"y"'),
    "anyOf beside type": ({"type": "integer", "anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, '"x"'),
    "anyOf beside properties": ({**_LEAF, "anyOf": [{"type": "object"}, {"type": "null"}]}, '{"b": 1}'),
    "oneOf, apart": ({"oneOf": [{"type": "integer"}, {"enum": ["x"]}]}, '"y"'),
    "oneOf, both": ({"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, "2"),
    "allOf": ({"allOf": [_A, {"required": ["a"]}], "additionalProperties": False}, "{}"),
    "not": ({"type": "integer", "not": {"const": 3}}, "3"),
    "if, then": ({"type": "integer", "if": {"minimum": 0}, "then": {"minimum": 10}}, "3"),
    "$ref": ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, '"x"'),
    "$ref, recursive": ({"$ref": "#/$defs/n", "$defs": {"n": _NODE}}, '{"v": 3}'),
    "$ref beside a rule": ({"$ref": "#/$defs/n", "enum": [1], "$defs": {"n": {"type": "integer"}}}, "5"),
    "$ref into properties": (
        {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"$ref": "#/properties/a"}}, "required": ["a", "b"],
         "additionalProperties": False}, '{"a": 1, "b": 2}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, '{"ab": "x"}'),
    "propertyNames": ({"type": "object", "propertyNames": {"enum": ["a"]}}, '{"b": 1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, "{}"),
    "maxProperties": ({"type": "object", "maxProperties": 1}, '{"a": 1, "b": 2, "c": 3}'),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [1]}}, "additionalProperties": False,
         "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    "unevaluatedProperties": ({**_A, "unevaluatedProperties": False}, '{"b": 1}'),
    "nullable": ({"type": "integer", "nullable": True}, "null"),
    "true": ({"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False}, "{}"),
    "unicode": ({"type": "object", "properties": {"größe 価格": {"enum": ["é🙂\""]}}, "required": ["größe 価格"],
                 "additionalProperties": False}, '{"a": 1}'),
}  # fmt: skip


def outcome(server: LlamaServer, schema: Any, forbidden: str, seed: int) -> tuple[str, str]:
    """What came of it (whole, broken, cut, no JSON, refused), and what was said."""
    words = f"Answer with exactly this and nothing else: {forbidden}"
    form = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema, "strict": True}}
    try:
        found = server.ask(
            [{"role": "user", "content": words}], 48, temperature=1.5, seed=seed, response_format=form, top_k=0
        )
    except LowbitError as error:
        return "refused", str(error)
    choice = found["choices"][0]
    text = choice["message"]["content"] or ""
    if choice["finish_reason"] != "stop":
        return "cut", text
    try:
        value = json.loads(text)
    except ValueError:
        return "no JSON", text
    valid = Draft202012Validator(schema).is_valid(value)
    return ("whole" if valid else "broken"), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    mistaken = 0
    print(f"{given.model}, xllamacpp {metadata.version('xllamacpp')}, {given.seeds} seeds, temperature 1.5")
    print(f"{'rule':30} {'whole':>5} {'broken':>6} {'cut':>4}  believed")
    with LlamaServer(resolve(given.model), context=4096, slots=4, kv_unified=True, threads=1) as server:
        for name, (schema, forbidden) in CASES.items():
            if given.only not in name:
                continue

            def one(seed: int, schema: Any = schema, forbidden: str = forbidden) -> tuple[str, str]:
                return outcome(server, schema, forbidden, seed)

            with ThreadPoolExecutor(4) as pool:
                results = [one(0)]
                results += pool.map(one, range(1, given.seeds)) if results[0][0] != "refused" else []
            kinds = [kind for kind, _ in results]
            wrong = [text for kind, text in results if kind in ("broken", "no JSON", "refused")]
            believed = Schema(schema).whole_in_grammar
            broken = kinds.count("broken") + kinds.count("no JSON")
            mistaken += bool(believed and wrong)
            line = f"{name:30} {kinds.count('whole') + broken:5} {broken:6} {kinds.count('cut'):4}"
            print(
                f"{line}  {'held' if believed else '-':5} {' '.join(wrong[0].split())[:120] if wrong else ''}",
                flush=True,
            )
    sys.exit(bool(mistaken))


if __name__ == "__main__":
    main()
