"""Broken JSON: what is mended is what was meant, and what could be something else is refused.

Many kinds of damage are done to valid JSON. Whatever repair makes of it must equal the original, or be refused.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from damage import DAMAGE, closed_schema, is_json, same
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowbit.harness import repair
from lowbit.harness.structured import Schema, read_value
from lowbit.harness.trace import Trace

TEXT = st.text(st.sampled_from("ab é価🙂 '\"\\\n\t,:{}[]/#0123.-–’“"), max_size=8)
SCALAR = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.recursive(
    SCALAR | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
DOCUMENT = st.lists(VALUE, min_size=1, max_size=4) | st.dictionaries(TEXT, VALUE, min_size=1, max_size=4)


@pytest.mark.parametrize("kind", DAMAGE)
@settings(max_examples=60, deadline=None)
@given(value=DOCUMENT, indent=st.sampled_from((None, 2)), ascii_only=st.booleans(), seed=st.integers(0, 999))
@example(value=[[], 1, 2], indent=None, ascii_only=True, seed=3)
@example(value=["ab", "cd"], indent=None, ascii_only=True, seed=1)
@example(value={"a": {"x": 1}, "b": [[1, 2], [3]]}, indent=None, ascii_only=False, seed=2)
def test_mended_is_what_it_was_or_refused(
    kind: str, value: Any, indent: int | None, ascii_only: bool, seed: int
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    damaged = DAMAGE[kind](text, random.Random(seed))
    if is_json(damaged):  # then there is nothing to mend, and nothing that tells it from what was meant
        return
    for schema in (None, closed_schema(value)):
        found, how = repair.mended(damaged, schema)
        assert how is None or same(found, value), (damaged, found)


@pytest.mark.parametrize(
    "kind",
    ["fenced", "in words", "single quotes", "typographic quotes", "trailing comma", "python's literals", "a comment",
     "raw line ends", "closers missing"],
)  # fmt: skip
def test_plain_slips_are_mended(kind: str) -> None:
    value = {"name": "Ann\nBo", "on": True, "list": ["x", "y"], "n": None, "last": "end"}
    damaged = DAMAGE[kind](json.dumps(value), random.Random(0))
    assert not is_json(damaged)
    found, how = repair.mended(damaged, closed_schema(value))
    assert how is not None and same(found, value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2,}', '{"a": 1} {"b": 2}', '{"a": 1, "b": }', '{"a": 1, "b": ', '{"a": [1, 2, ...]}',
        '{"a": "he said "no" to it"}', '{"a": 1 "b": 2, c}', '{"a": "x, "b": "y"}', '{"a": {"x": 1, "b": 2}',
        "{'a': 'it's'}", '{"a": NaN,}', '{"a": 1e999,}', '{"a": 1x2}', '{"a" 1}', '{"a": yes}', '{"a": 0x10}',
        "[1, 2, 3", '["a", "b"', '{"a": "b', "{" * 500, "[" * 100_000, '"a": {"x": 1}', 'see [1] and {"a": 1}',
        '```json\n{"a": 1}\n```\nor\n```json\n{"a": 2}\n```', "", "no JSON", '{"path": "C:\\data"}',
        '{"a": 1}}', '{"a": {"b": 1]}', "[1 2]", "[,1]", '["ab,""cd"]', '{"a": 12',
    ],
)  # fmt: skip
def test_what_is_in_doubt_is_refused(text: str) -> None:
    assert repair.mended(text) == (None, None)


def test_missing_brackets_are_put_where_the_schema_says_that_nothing_is_missing() -> None:
    node = {"type": "object", "properties": {"v": {"type": "string"}}, "required": ["v"]}
    schema = {
        "type": "object", "$defs": {"n": node},
        "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/n"}},
    }  # fmt: skip
    assert repair.mended('{"name": "a", "next": {"v": "x"', schema)[0] == {"name": "a", "next": {"v": "x"}}
    for text in ('{"name": "a"', '{"name": "a", "next": {"v": "x', '{"name": "a", "next": {'):
        assert repair.mended(text, schema) == (None, None)
    pair = {"type": "array", "items": {"type": "string"}, "maxItems": 2}
    assert repair.mended('["a", "b"', pair)[0] == ["a", "b"]
    assert repair.mended('["a"', pair) == (None, None)


def read(text: str, schema: Any) -> tuple[Any, str | None]:
    value, problem = read_value(text, Schema.read(schema, "schema"), Trace(), repair=True)
    return value, problem and problem.detail


def test_what_json_leaves_open_is_an_error() -> None:
    assert "twice" in str(read('{"a": 1, "a": 2}', {"type": "object"})[1])
    assert "too large a number" in str(read('{"a": 1e400}', {"type": "object"})[1])
    assert read("12345678901234567890123", {"type": "integer"}) == (12345678901234567890123, None)
    assert "not JSON" in str(read('{"a": ' + "9" * 5000 + "}", {"type": "object"})[1])
    assert "deep" in str(read("[" * 200 + "]" * 200, {"type": "array"})[1])
    assert read("[" * 200_000, {"type": "array"})[1]


def test_long_texts_take_no_long_time() -> None:
    begun = time.process_time()
    comments, words = "[" + "/**/" * 10_000 + "1", "w " * 99_999 + "{"
    for text in ('{"a": "' + "x y " * 10_000 + '",}', "[" * 50_000, '["' * 50_000, comments, words):
        repair.mended(text)
    assert time.process_time() - begun < 5


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("{}[],:\"'`\\ab01.e-/*# \n“”…"), max_size=40) | st.text(max_size=60))
def test_any_text_at_all(text: str) -> None:
    found, how = repair.mended(text, {"properties": {"a": {}}})
    assert (how is None) or json.dumps(found, allow_nan=False)
