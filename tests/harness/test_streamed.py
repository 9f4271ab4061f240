"""What is streamed is what a whole answer would have been, however it is cut, and nothing is held for long."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted

from lowbit.harness import Harness, HarnessError, HarnessOptions, dialects
from lowbit.harness.answer import Answer, Call, Gathered
from lowbit.harness.splitter import Splitter
from lowbit.harness.thoughts import ThoughtSplitter, separate

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("now", "get_weather")
]
NAMES = [tool["function"]["name"] for tool in TOOLS]
WRITTEN = [
    dialects.get(name).call_text(
        [Call(name="now", arguments='{"city": "Rome"}'), Call(name="get_weather", arguments="{}")]
    )
    for name in dialects.names()
]
MARKS = [mark for name in dialects.names() for mark in (*dialects.get(name).marks, *dialects.get(name).opens)]
PIECES = [
    *WRITTEN, *MARKS, "</tool_call>", "<tool_call|>", "call:now", "{", "}", '{"a": 1}',
    '{"name": "now", "arguments": {}}', "[ARGS]", "```", "```json\n", "```python\n", "\n", "  ", "\n\n", "Hello. ",
    "It says ", "`", "<", "<\u200b|im_end|>", "<think>", "</think>", "<|channel>thought\n", "<|channel>thought",
    "<channel|>", "[THINK]", "[/THINK]", "now(x=1)",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=10).map("".join)
ONCE = HarnessOptions(tries=1, layers=frozenset({"rescue", "escape"}))


def seen(text: str, calls: list[dict[str, Any]], thoughts: str) -> tuple[str, list[tuple[str, str]], str]:
    return text, [(c["function"]["name"], c["function"]["arguments"]) for c in calls], thoughts


def whole(text: str) -> Any:
    try:
        found = asyncio.run(Harness(Scripted(text), ONCE).complete({"messages": [USER], "tools": TOOLS}))
    except HarnessError as error:
        return error.code
    message = found["choices"][0]["message"]
    return seen(message.get("content") or "", message.get("tool_calls") or [], message.get("reasoning_content") or "")


def streamed(text: str, piece: int) -> Any:
    async def gather() -> list[dict[str, Any]]:
        return [
            c async for c in Harness(Scripted(text, piece=piece), ONCE).stream({"messages": [USER], "tools": TOOLS})
        ]

    try:
        chunks = asyncio.run(gather())
    except HarnessError as error:
        return error.code
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    return seen(
        "".join(d.get("content") or "" for d in deltas),
        [call for d in deltas for call in d.get("tool_calls") or []],
        "".join(d.get("reasoning_content") or "" for d in deltas),
    )


USER = {"role": "user", "content": "Hello"}


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from([1, 2, 3, 7, 50, 10_000]))
def test_a_stream_says_what_a_whole_answer_says(text: str, piece: int) -> None:
    assert streamed(text, piece) == whole(text)


@pytest.mark.parametrize(
    "text, at",
    [  # the text, and from which length on all of it must be out
        ("In Gemma a call begins with <|tool_call> and goes on, and on.", 45),
        ("A <tool_call> is a mark.", 17),
        ("The mark [TOOL_CALLS] is Mistral's.", 27),
        ("```python\nprint()\n```\nDone, all of it.", 26),
        ('{"population": 3, "city": "Rome"}\nis the answer.', 40),
        ("[1, 2, 3] is a list.", 4),
        ("[a link](http://x) is a link.", 10),
        ("<function> is no call. Nor is <|python_tag|>print(1) to us.", 55),
        ("a < b and [c] and `x` ``", 22),
    ],
)
def test_what_is_no_call_is_let_through_as_soon_as_that_is_certain(text: str, at: int) -> None:
    splitter, out = Splitter(NAMES), ""
    for i, char in enumerate(text):
        out += splitter.feed(char)
        if i >= at and text[i].strip() and text[i] not in "`<[":
            assert out.rstrip() == text[: i + 1].rstrip()
    assert out + splitter.rest() == text


def test_a_call_comes_out_of_no_splitter_before_it_is_told() -> None:
    for text in WRITTEN:
        for before in ("", "Look:\n"):
            splitter = Splitter(NAMES)
            assert "".join(splitter.feed(c) for c in before + text).strip() == before.strip()


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_thoughts_are_the_same_however_they_are_cut(text: str, cuts: list[int]) -> None:
    answer = Answer(content=text)
    separate(answer)
    splitter, said, at, i = ThoughtSplitter(), [], 0, 0
    while at < len(text):
        said.append(splitter.feed(text[at : at + cuts[i % len(cuts)]]))
        at, i = at + cuts[i % len(cuts)], i + 1
    said.append(splitter.rest())
    assert ("".join(c for c, _ in said), "".join(t for _, t in said)) == (answer.content, answer.reasoning)


@pytest.mark.parametrize(
    "text, content, thoughts",
    [
        ("<think>\nHm.\n</think>\n\nHello.", "Hello.", "Hm."),
        ("<|channel>thought\nHm.<channel|>Hello.", "Hello.", "Hm."),
        ("<|channel>thought\n<channel|>Hello.", "Hello.", ""),
        ("[THINK]Hm.[/THINK]Hello.", "Hello.", "Hm."),
        ("<think>Hm, and cut", "", "Hm, and cut"),
        ("The mark <think> opens thoughts, </think> ends them.", None, ""),
        ("`<|channel>thought` is Gemma's.", None, ""),
        ("No marks, <but others.", None, ""),
        ("<think>a</think><think>b</think>c", "c", "ab"),
    ],
)
def test_thoughts_are_told_from_text(text: str, content: str | None, thoughts: str) -> None:
    answer = Answer(content=text)
    separate(answer)
    assert (answer.content, answer.reasoning) == (text if content is None else content, thoughts)


def test_thoughts_left_in_the_text_are_kept_for_the_template() -> None:
    """They come back where the client sends the call without them (llama.cpp issue 25072)."""
    said = "<|channel>thought\nI need the time.<channel|><|tool_call>call:now{}<tool_call|>"
    upstream = Scripted(said, "It is noon.")
    harness = Harness(upstream)

    async def talk() -> None:
        body: dict[str, Any] = {"messages": [USER], "tools": TOOLS}
        message = (await harness.complete(body))["choices"][0]["message"]
        assert message["reasoning_content"] == "I need the time." and not message["content"]
        call = message["tool_calls"][0]
        history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}]  # fmt: skip
        await harness.complete(body | {"messages": history})

    asyncio.run(talk())
    assert upstream.sent[1]["messages"][1]["reasoning_content"] == "I need the time."


def test_a_page_that_the_model_quotes_becomes_no_call() -> None:
    """Escaped in the request, copied by the model: it is turned back only after calls were looked for."""
    upstream = Scripted('The page says:\n<\u200btool_call>{"name": "now", "arguments": {}}</\u200btool_call>')
    found = asyncio.run(Harness(upstream).complete({"messages": [USER], "tools": TOOLS}))
    message = found["choices"][0]["message"]
    assert "tool_calls" not in message and '<tool_call>{"name": "now"' in message["content"]


def test_text_around_and_between_calls_is_streamed() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for piece in (1, 5, 1000):
        text, calls, _ = streamed(f"First. {call} Then {call.replace('now', 'get_weather')} Done.", piece)
        assert text.split() == ["First.", "Then", "Done."] and [name for name, _ in calls] == ["now", "get_weather"]


KEYS = [
    "delta",
    "content",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "index",
    "finish_reason",
    "reasoning",
    "text",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
CHUNKS = st.dictionaries(st.sampled_from(["choices", "usage", "id", "model", "error"]), VALUES)


@given(st.lists(CHUNKS, max_size=6))
def test_any_chunks_are_gathered(chunks: list[dict[str, Any]]) -> None:
    gathered = Gathered()
    assert all(isinstance(gathered.add(chunk), str) for chunk in chunks)
    answer = gathered.answer()
    assert isinstance(answer.content, str) and all(isinstance(call.arguments, str) for call in answer.calls)


UNITS = [
    "a ", " ", "\n", "`", "<", "\n{", "\n[", '\n{"a": 1}', "<tool_call>", "<tool_call>\n{", "[TOOL_CALLS]",
    "<|tool_call>call:a{", "<think>", "\n```json\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_half_a_megabyte_is_split_in_little_time(unit: str) -> None:
    text = unit * ((1 << 19) // len(unit))
    splitter, thinking, begin = Splitter(NAMES), ThoughtSplitter(), time.process_time()
    out = [splitter.feed(thinking.feed(text[at : at + 64])[0]) for at in range(0, len(text), 64)]
    out += [splitter.feed(thinking.rest()[0]), splitter.rest()]
    assert "".join(out) in (text, "") and time.process_time() - begin < 3
