"""Every dialect against one table: whole calls, several, words around, broken off anywhere, and what is no call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.harness import dialects
from lowbit.harness.answer import Call
from lowbit.harness.dialects.base import Parsed

NAMES = dialects.names()
TOOLS = ("get_weather", "write_file", "now")
ARGUMENTS: list[dict[str, Any]] = [
    {"city": "Rome"},
    {"city": "São Paulo, 東京 🙂", "days": 3, "metric": True, "note": None, "factor": -1.5e-3},
    {"path": "a.py", "text": 'def f(x):\n    """Doc, with "quotes"."""\n    return {"a": [x, \'y\']}\n'},
    {"where": {"lat": 1.5, "tags": ["a", "b, c", "{d}"], "inner": {"deep": [{"k": "v"}]}}, "list": [1, [2, 3]]},
    {"text": "it says <tool and [TOOL and call: and }} and ]]"},
    {},
]
# Values of qwen_coder are text: what is no string comes back as JSON text, which healing reads by the schema.
TEXT_ALONE = ("qwen_coder",)


def parse(name: str, text: str) -> Parsed:
    return dialects.get(name).parse(text, TOOLS)


def values(name: str, call: Call) -> Any:
    found = json.loads(call.arguments)
    if name in TEXT_ALONE:
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
    return found


def expected(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if name in TEXT_ALONE:
        return {k: v.removesuffix("\n") if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    return arguments


def written(name: str, *arguments: dict[str, Any]) -> str:
    calls = [Call(name=TOOLS[i], arguments=json.dumps(a)) for i, a in enumerate(arguments)]
    text = dialects.get(name).call_text(calls)
    return f"<|python_tag|>{text}" if name == "llama3" else text


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: ",".join(a) or "none")
@pytest.mark.parametrize("name", NAMES)
def test_a_call_comes_back(name: str, arguments: dict[str, Any]) -> None:
    parsed = parse(name, written(name, arguments))
    assert [call.name for call in parsed.calls] == ["get_weather"] and not parsed.content.strip()
    found = {k: v.removesuffix("\n") if name in TEXT_ALONE else v for k, v in values(name, parsed.calls[0]).items()}
    assert found == expected(name, arguments) and not parsed.notes


@pytest.mark.parametrize("name", NAMES)
def test_several_calls_with_words_before(name: str) -> None:
    parsed = parse(name, "Let me look.\n" + written(name, {"city": "Rome"}, {"path": "x", "text": "y"}))
    assert [call.name for call in parsed.calls] == ["get_weather", "write_file"]
    assert json.loads(parsed.calls[1].arguments) == {"path": "x", "text": "y"}
    assert parsed.content.strip() == "Let me look."


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("bare_json", "llama3")])
def test_words_after_a_call_stay(name: str) -> None:
    parsed = parse(name, written(name, {"city": "Rome"}) + "\nThat is all.")
    assert parsed.calls and parsed.content.strip() == "That is all."


@pytest.mark.parametrize("name", NAMES)
def test_a_call_broken_off_anywhere(name: str) -> None:
    """No crash, no other name, and never a string that ends early without a word about it."""
    text = written(name, {"city": "Rome and Oslo", "days": 12})
    for end in range(len(text)):
        parsed = parse(name, text[:end])
        for call in parsed.calls:
            assert call.name == "get_weather"
            try:
                found = json.loads(call.arguments)
            except ValueError:
                continue
            if found.get("city", "Rome and Oslo") != "Rome and Oslo":
                assert parsed.notes, text[:end]


PROSE = [
    "In Gemma 4 a call begins with <|tool_call> and ends with <tool_call|>.",
    "Mistral's mark is [TOOL_CALLS], and Hermes has <tool_call> and </tool_call>.",
    'The file holds {"name": "get_weather"} and nothing else.',
    '{"name": "Rome", "population": 3}',
    '[{"name": "a"}, {"name": "b"}]',
    '```json\n{"name": "get_weather", "title": "Weather", "version": 2}\n```',
    'You would write\n{"name": "get_weather", "arguments": {"city": "Rome"}}\nto call it.',
    "call:get_weather{city:Rome} is the form",
    "<|python_tag|>print('hello')",
    "<start_function_call> is a token",
    "{}", "[]", "", "```", "{" * 50,
]  # fmt: skip


@pytest.mark.parametrize("text", PROSE, ids=lambda t: t[:24])
@pytest.mark.parametrize("name", NAMES)
def test_prose_is_no_call(name: str, text: str) -> None:
    parsed = parse(name, text)
    assert parsed.calls == [] and parsed.content == text


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_any_text_is_read(name: str, data: st.DataObject) -> None:
    dialect = dialects.get(name)
    pieces = [*dialect.marks, "call:now", *'{}[]":,<>\n1a\\', "name", "[ARGS]", "null",
              "</tool_call>", "<tool_call|>", "<parameter=x>", "</parameter>", '<|"|>', "<escape>"]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=40)))
    parsed = dialect.parse(text, TOOLS)
    assert isinstance(parsed.content, str) and all(call.name for call in parsed.calls)


@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_is_read_at_once(name: str) -> None:
    dialect = dialects.get(name)
    for piece in (*dialect.marks, "{", "[", '"', "\\", "<", '{"name": "now"}\n', " "):
        dialect.parse(piece * ((1 << 18) // len(piece)), TOOLS)


def test_results_and_descriptions_are_text() -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "Time.", "parameters": {"type": "object"}}}
    for name in NAMES:
        dialect = dialects.get(name)
        assert "now" in dialect.describe([tool])
        assert "20 degrees" in dialect.result_text("now", "20 degrees")


@pytest.mark.parametrize(
    "template, name",
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}", None),
        ("{% if tools %}... <tool_call>\\n{...}\\n</tool_call> {% endif %}", "hermes"),
        ("{% if tools %}<tool_call>\n<function={{ name }}>\n<parameter={{ k }}>{% endif %}", "qwen_coder"),
        ("{% if tools %}{{ '<|tool_call>call:' }}{% endif %}", "gemma4"),
        ("{% if tools %}<start_function_call>call:{% endif %}", "function_gemma"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}Answer with JSON.{% endif %}", "bare_json"),
    ],
)
def test_the_dialect_of_a_template(template: str, name: str | None) -> None:
    assert dialects.of_template(template) == name
