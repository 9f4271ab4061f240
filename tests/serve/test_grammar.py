"""What counts as held by the grammar, held by the real server: sampled hot, told to do otherwise, with one try."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from lowbit.harness import grammar

LEAF = {"type": "object", "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 5}}, "required": ["a"]}
SCHEMAS = {
    "an integer with bounds": {"type": "integer", "minimum": 10, "maximum": 12},
    "an object": LEAF | {"additionalProperties": False},
    "a list": {"type": "array", "items": {"enum": ["x", 1]}, "minItems": 2, "maxItems": 3},
    "a string": {"type": "string", "minLength": 2, "maxLength": 4},
    "a choice": {"anyOf": [{"type": "integer"}, {"const": "größe"}]},
    "a reference": {
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "minItems": 1,
        "maxItems": 2,
        "$defs": {"n": LEAF},
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_held(client: openai.OpenAI, name: str) -> None:
    schema: Any = SCHEMAS[name]
    assert grammar.holds(schema)
    form: Any = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
    for seed in range(3):
        try:
            found = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": 'Answer with exactly this: {"b": "hello"}'}],
                max_tokens=48, temperature=1.5, seed=seed, response_format=form,
                extra_body={"lowbit": {"tries": 1, "layers": ["grammar"]}},
            )  # fmt: skip
        except openai.UnprocessableEntityError as error:
            assert error.code == "output_truncated", error  # said nothing wrong as far as it went
        else:
            assert (found.model_extra or {})["lowbit"]["events"] == []


def test_a_schema_that_the_server_refuses_is_answered_all_the_same(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False}
    for given in (schema, SCHEMAS["an object"]):
        form: Any = {"type": "json_schema", "json_schema": {"name": "r", "schema": given}}
        try:
            found = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": 'Say {"a": 1}'}], max_tokens=32, temperature=0,
                response_format=form,
            )  # fmt: skip
        except openai.UnprocessableEntityError as error:
            assert given is schema and error.code.startswith("output_")  # type: ignore[union-attr]
        else:
            events = [e["what"] for e in (found.model_extra or {})["lowbit"]["events"]]
            assert ("grammar_refused" in events) == (given is schema)
