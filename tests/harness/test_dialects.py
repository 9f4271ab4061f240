"""Every dialect against one table: whole calls, several, words around, broken off anywhere, and what is no call."""

from __future__ import annotations

import json
import time
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


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bare_json"])
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
    'In Llama <|python_tag|> comes first. An example: {"name": "get_weather", "parameters": {"city": "Rome"}} does it.',
    '[TOOL_CALLS] is the mark, as in "name": "get_weather", "arguments": {}.',
    '`<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>` is how Hermes writes it.',
    "`<|tool_call>call:get_weather{}<tool_call|>` is how Gemma writes it, `[TOOL_CALLS]now[ARGS]{}` Mistral.",
    "In Qwen <function=get_weather> begins a call and <parameter=city> an argument.",
    "<tool_call> and <function=now> are marks.",
    "```python\nget_weather(city='Rome')\n```",
    "```tool_code\nimport os\nos.remove('x')\n```",
    "```tool_code\nx = get_weather(city='Rome')\nfor i in x: print(i)\n```",
    "[get_weather](http://example.org) is a link, [now()] is none.",
    "Call get_weather(city='Rome') for that.",
    '{"tools": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}',
    '{"name": "get_weather", "arguments": {"city": "Rome"}} would be the call.',
    '{"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {}}} is it.',
    '[{"name": "get_weather", "arguments": {}}, {"city": "Rome"}]',
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


HARD = [
    "{", "[", '"', "\\", "<", " ", "\n", "`", '{"name": "now"}\n', '{"name": "now", "arguments": {', "[[", '[{"',
    "<tool_call>", "<tool_call> ", '<tool_call>{"name": "now', '<tool_call>{"name": "now", "arguments": {}}', 
    "<tool_call>[",
    '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>', "<function=now>", "<function=now>{",
    "<function=now><parameter=a>", "<parameter=a>", "<parameter=a>x</parameter>y", "\n<parameter=a>x</parameter>y",
    "<|tool_call>call:now{}", "<|tool_call>call:now{a:", "<|tool_call>call:now{a:<|\"|>", '<|tool_call>call:now{a:"\\',
    "<start_function_call>call:now{a:[", "[TOOL_CALLS]", "[TOOL_CALLS]now[ARGS]", "[TOOL_CALLS]now[ARGS]{}",
    '[TOOL_CALLS][{"name": "now"', "<|python_tag|>", "<|python_tag|>{",
    '<|python_tag|>{"name": "now", "parameters": {}}',
    "```tool_code\nnow()\n", "```tool_code\nnow(", "[now(", "now(a=[",
]  # fmt: skip


@pytest.mark.parametrize("unit", HARD, ids=lambda u: repr(u)[1:24])
def test_a_megabyte_is_read_in_linear_time(unit: str) -> None:
    """All dialects together; what takes quadratic time takes minutes here."""
    for before in ("", "<tool_call>", "<function=now>", "[TOOL_CALLS]"):
        text = before + unit * ((1 << 20) // len(unit))
        for name in NAMES:
            begin = time.process_time()
            parse(name, text)
            assert time.process_time() - begin < 4, name
        if before == "" and "<" in unit:
            break


LITERAL = [
    "<tool_call>", "</tool_call>", "<|tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "</parameter> x", "}",
    '{"name": "now", "arguments": {}}', "<start_function_call>call:now{}", "<function=now>x", "\\", "\\\"", "'",
]  # fmt: skip


@pytest.mark.parametrize("literal", LITERAL)
@pytest.mark.parametrize("name", NAMES)
def test_a_mark_inside_a_string_ends_nothing(name: str, literal: str) -> None:
    arguments = {"path": "a.txt", "text": f"before {literal} after"}
    parsed = parse(name, written(name, arguments, arguments))
    assert [json.loads(call.arguments) for call in parsed.calls] == [arguments, arguments]
    assert not parsed.content.strip()


@pytest.mark.parametrize(
    "name, text, arguments",
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}}</tool_call>', {"a": 1}),  # a brace too many
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}<tool_call>', {"a": 1}),
        ("hermes", '<tool_call>\n```json\n{"name": "now", "arguments": {"a": 1}}\n```\n</tool_call>', {"a": 1}),
        ("hermes", '<tool_call>[{"name": "now", "arguments": {"a": 1}}]</tool_call>', {"a": 1}),
        ("gemma4", "<|tool_call>call:now{a:1}}<tool_call|>", {"a": 1}),
        ("gemma4", "<|tool_call>call:now{a:[1,2}<tool_call|>", {"a": [1, 2]}),
        ("gemma4", '<|tool_call>call:now{"a":"x"}<tool_call|>', {"a": "x"}),
        ("gemma4", '<|tool_call>now{<|"|>a<|"|>:1}<tool_call|>', {"a": 1}),
        (
            "function_gemma",
            "<start_function_call>call:now{a:<escape>x, {y}<escape>}<end_function_call>",
            {"a": "x, {y}"},
        ),
        ("qwen_coder", "<function=now>\n<parameter=a>\nx\n</parameter>\n</function>", {"a": "x"}),
        ("qwen_coder", "<tool_call>\n<function=now>\n<parameter=a>\nx\n</function>\n</tool_call>", {"a": "x"}),
        (
            "qwen_coder",
            "<function=now><parameter=a>\nx\n<parameter=b>\ny\n</parameter></function>",
            {"a": "x", "b": "y"},
        ),
        ("qwen_coder", '<function=now>{"a": 1}</function>', {"a": 1}),  # as Llama 3.1 calls functions of a prompt
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}, "id": "abcdefghi"}]', {"a": 1}),
        ("mistral", '[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": 1}', {"a": 1}),
        ("mistral", '[TOOL_CALLS]now[ARGS]{"a": 1}', {"a": 1}),
        ("llama3", '<|python_tag|>{"type": "function", "name": "now", "parameters": {"a": 1}}', {"a": 1}),
        ("llama3", '<|python_tag|>{"name": "now", "parameters": {"a": 1}}<|python_tag|>', {"a": 1}),
        ("bare_json", '```json\n{"function": {"name": "now", "arguments": "{\\"a\\": 1}"}}\n```', {"a": 1}),
        ("bare_json", 'Sure.\n{"name": "now", "parameters": {"a": 1}}', {"a": 1}),
        ("gemma3", "```tool_code\nprint(now(a=1))\n```", {"a": 1}),
        ("gemma3", "[now(a=1)]", {"a": 1}),
        ("gemma3", "```tool_code\nnow(a={'b': [True, null, -1.5]})", {"a": {"b": [True, None, -1.5]}}),
    ],
)
def test_other_spellings_are_read(name: str, text: str, arguments: dict[str, Any]) -> None:
    calls = parse(name, text).calls
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("now", arguments)]


def test_two_of_the_same_are_two() -> None:
    """What to do with a call made twice is the guard's to say."""
    for name in NAMES:
        assert len(parse(name, written(name, {"city": "Rome"}).replace("now", "get_weather") * 2).calls) in (1, 2)
    assert len(parse("hermes", written("hermes", {"city": "Rome"}) * 2).calls) == 2


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_what_may_be_a_call_is_never_denied(name: str, data: st.DataObject) -> None:
    """may_be() of every beginning of a call is True: a stream would let a part of it through."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        max_leaves=4,
    )
    text = written(name, data.draw(st.dictionaries(st.sampled_from(["a", "b"]), values, max_size=2)))
    dialect = dialects.get(name)
    marks = (*dialect.marks, *dialect.opens)
    for end in range(min(len(m) for m in marks), len(text) + 1):
        if text[:end].startswith(marks):
            assert dialect.may_be(text[:end], TOOLS), text[:end]


@pytest.mark.parametrize("name", NAMES)
def test_the_history_of_a_client_is_written_whatever_it_holds(name: str) -> None:
    for arguments in ("", "{}", "not json", "[1]", '"x"', "null", '{"a b": {"c": [1, null]}}', "[" * 5000):
        assert "now" in dialects.get(name).call_text([Call(name="now", arguments=arguments)])


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
        (
            "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>{% endfor %}",
            "gemma3",
        ),
    ],
)
def test_the_dialect_of_a_template(template: str, name: str | None) -> None:
    assert dialects.of_template(template) == name
