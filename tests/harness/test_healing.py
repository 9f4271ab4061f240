"""Every rule of healing with what it mends, and what it leaves alone: what is valid, and what could only be meant."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.harness import healing
from lowbit.harness.answer import Call
from lowbit.harness.request import Tool
from lowbit.harness.structured import Schema
from lowbit.harness.trace import Trace

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "share": {"type": "number"},
        "dry": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}}, "unit": {"type": "string", "enum": ["C", "F"]},
        "maxPrice": {"type": ["number", "null"]},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
    },
    "additionalProperties": False,
}  # fmt: skip
NAMES = ("get_weather", "get_news", "write_file", "calendar.list")
TOOLS = {name: Tool(name=name, description="", parameters=Schema.read(SCHEMA, "x")) for name in NAMES}


def heal(arguments: str, name: str = "get_weather", *, mend: bool = True, cut: bool = False) -> tuple[Any, list[str]]:
    """What comes out, (name, arguments) or the kind of problem, and what was done."""
    call, trace = Call(name=name, arguments=arguments), Trace()
    problem = healing.heal(call, TOOLS, trace, mend=mend, cut=cut)
    return problem.kind if problem else (call.name, json.loads(call.arguments)), [e["what"] for e in trace.events]


@pytest.mark.parametrize(
    "name, known",
    [
        ("Get_Weather", "get_weather"), ("getWeather", "get_weather"), ("get-weather", "get_weather"),
        ("functions.get_weather", "get_weather"), ("get_weather()", "get_weather"), ("`write_file`", "write_file"),
        ("get_wether", "get_weather"), ("calendar_list", "calendar.list"), ("get_", None), ("get", None),
        ("delete_file", None),
        ("weather", None), ("", None), ("read_file", None), ("get_weather_and_news", None),
    ],
)  # fmt: skip
def test_names(name: str, known: str | None) -> None:
    found, did = heal("{}", name)
    assert (found, did) == ("unknown_tool", []) if known is None else (found[0], did) == (known, ["name_healed"])
    assert heal("{}", name, mend=False)[0] == "unknown_tool"


@pytest.mark.parametrize(
    "arguments, value",
    [
        ("{'city': 'Rome'}", {"city": "Rome"}),  # quotes
        ("{city: 'Rome', days: 3}", {"city": "Rome", "days": 3}),
        ('{"city": "Rome",}', {"city": "Rome"}),
        ('```json\n{"city": "Rome"}\n```', {"city": "Rome"}),
        ('"{\\"city\\": \\"Rome\\"}"', {"city": "Rome"}),
        ('[{"city": "Rome"}]', {"city": "Rome"}),
        ('{"arguments": {"city": "Rome"}}', {"city": "Rome"}),
        ('{"days": "3"}', {"days": 3}),  # types
        ('{"days": 3.0}', {"days": 3.0}),  # an integer for JSON Schema as it is
        ('{"share": "0.5"}', {"share": 0.5}),
        ('{"dry": "True"}', {"dry": True}),
        ('{"city": 5}', {"city": "5"}),
        ('{"tags": "wet"}', {"tags": ["wet"]}),
        ('{"tags": "[\\"a\\", \\"b\\"]"}', {"tags": ["a", "b"]}),
        ('{"where": "{\\"lat\\": 1}"}', {"where": {"lat": 1}}),
        ('{"unit": "c"}', {"unit": "C"}),
        ('{"max_price": 3}', {"maxPrice": 3}),  # names of properties
        ('{"maxPrice": "none"}', {"maxPrice": None}),
        ('{"city": null}', {}),
        ("", {}),
    ],
)  # fmt: skip
def test_arguments(arguments: str, value: Any) -> None:
    found, did = heal(arguments)
    assert found == ("get_weather", value)
    assert did == ["arguments_healed"] or arguments in ("", '{"days": 3.0}')


@pytest.mark.parametrize(
    "arguments",
    [
        '{"days": "three"}', '{"days": 3.5}', '{"days": "3.5"}', '{"dry": "maybe"}', '{"dry": 1}', '{"unit": "K"}',
        '{"town": "Rome"}', '{"where": "north"}', '{"share": true}', '{"city": {"name": "Rome"}}', '{"days": [3]}',
        "Rome", "[]", "3", "null", '["Rome"]', '[{"city": "a"}, {"city": "b"}]', "{", "[", '{"', '{"city', '{"city":',
        '{"city": "Rome"', '{"tags": ["a", "b"', '{"city": "Rome", "da', '{"city": "Rome", "days":',
        '{"city": "Rome", ', '{"dry": tr', '{"city": "a\\',
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_not_made_up(arguments: str) -> None:
    found, did = heal(arguments)
    assert found == "bad_arguments" and did == []


@pytest.mark.parametrize(
    "arguments", ['{"city": "Ro', '{"city": "Rome"', '{"days": 1', '{"tags": ["a"', "{'city': 'Rome'}"]
)
def test_what_the_limit_cut_off_is_never_closed(arguments: str) -> None:
    assert heal(arguments, cut=True) == ("truncated", [])


def test_brackets_alone_are_put_there_where_nothing_else_can_be_missing() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = {"now": Tool(name="now", description="", parameters=Schema.read(schema, "x"))}
    for arguments, whole in (('{"city": "Rome"', True), ('{"city": "Rome', False), ('{"ci', False)):
        call = Call(name="now", arguments=arguments)
        problem = healing.heal(call, tools, Trace(), mend=True, cut=False)
        assert (problem is None) == whole
        assert not whole or json.loads(call.arguments) == {"city": "Rome"}


VALID = st.fixed_dictionaries({}, optional={
    "city": st.text(), "days": st.integers(), "share": st.floats(allow_nan=False, allow_infinity=False),
    "dry": st.booleans(), "tags": st.lists(st.text(), max_size=3), "unit": st.sampled_from(["C", "F"]),
    "maxPrice": st.none() | st.integers(), "where": st.fixed_dictionaries({}, optional={"lat": st.integers()}),
})  # fmt: skip


@given(VALID, st.booleans(), st.sampled_from([None, 2]))
def test_what_is_valid_stays_as_it_is_to_the_byte(value: dict[str, Any], ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    call, trace = Call(name="get_weather", arguments=text), Trace()
    assert healing.heal(call, TOOLS, trace, mend=True, cut=False) is None
    assert call.arguments == text and call.name == "get_weather" and not trace.events


@given(VALID, st.data())
def test_arguments_broken_off_lose_nothing_unsaid(value: dict[str, Any], data: st.DataObject) -> None:
    """What is closed is a beginning of what was meant, string by string; what is not, is a problem."""
    text = json.dumps(value)
    found, _ = heal(text[: data.draw(st.integers(1, len(text)))])
    if isinstance(found, str):
        return
    *whole, last = list(found[1].items()) or [("", None)]
    assert all(value[key] == item for key, item in whole)
    if isinstance(last[1], str):
        assert value[last[0]].startswith(last[1].rstrip("\\")) or last[0] == "unit"


@given(st.text() | st.text(alphabet="{}[]\":,\\ abc1'", max_size=40))
def test_any_arguments_are_read(text: str) -> None:
    heal(text)
