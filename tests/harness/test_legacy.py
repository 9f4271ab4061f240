"""functions and function_call, OpenAI's first form, both ways; and results that belong to no call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted import Scripted, call

from lowbit.harness import BadRequest, Harness

USER = {"role": "user", "content": "Hello"}


def body(weather: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [USER], "functions": [weather["function"]], **more}


def test_a_call_comes_back_in_the_old_form(weather: dict[str, Any]) -> None:
    upstream = Scripted({"content": None, "tool_calls": [call("Get_Weather", "{'city': 'Rome'}")]})
    found = asyncio.run(Harness(upstream).complete(body(weather, function_call="auto")))
    message = found["choices"][0]["message"]
    assert message["function_call"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert "tool_calls" not in message and found["choices"][0]["finish_reason"] == "function_call"
    sent = upstream.sent[0]
    assert sent["tools"] == [weather] and sent["tool_choice"] == "auto" and not sent["parallel_tool_calls"]
    assert not {"functions", "function_call"} & sent.keys()


def test_a_stream_of_the_old_form(weather: dict[str, Any]) -> None:
    upstream = Scripted({"content": None, "tool_calls": [call("get_weather", '{"city": "Rome"}')]})

    async def gather() -> list[dict[str, Any]]:
        asked = body(weather, function_call={"name": "get_weather"})
        return [chunk async for chunk in Harness(upstream).stream(asked)]

    chunks = asyncio.run(gather())
    deltas = [c["choices"][0] for c in chunks if c["choices"]]
    assert [d["delta"]["function_call"]["name"] for d in deltas if "function_call" in d["delta"]] == ["get_weather"]
    assert deltas[-1]["finish_reason"] == "function_call"
    assert upstream.sent[0]["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}


def test_the_history_of_the_old_form(weather: dict[str, Any]) -> None:
    upstream = Scripted("Sunny.")
    history = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "20"},
    ]
    asyncio.run(Harness(upstream).complete(body(weather) | {"messages": history}))
    sent = upstream.sent[0]["messages"]
    assert sent[1]["tool_calls"][0]["function"]["name"] == "get_weather" and "function_call" not in sent[1]
    assert sent[2] == {"role": "tool", "tool_call_id": sent[1]["tool_calls"][0]["id"], "content": "20"}


@pytest.mark.parametrize("functions", [[{}], ["x"], [{"name": 3}]])
def test_what_is_no_function_is_refused(functions: Any) -> None:
    with pytest.raises(BadRequest):
        asyncio.run(Harness(Scripted("x")).complete({"messages": [USER], "functions": functions}))


def test_a_result_of_a_call_that_there_is_not_is_refused(weather: dict[str, Any]) -> None:
    made = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", "{}", "call_a")]}
    result = {"role": "tool", "tool_call_id": "call_b", "content": "20"}
    with pytest.raises(BadRequest) as caught:
        asyncio.run(Harness(Scripted("x")).complete({"messages": [USER, made, result], "tools": [weather]}))
    assert caught.value.param == "messages[2]"
    right = result | {"tool_call_id": "call_a"}
    asyncio.run(Harness(Scripted("x")).complete({"messages": [USER, made, right], "tools": [weather]}))


def test_an_id_of_the_history_is_not_given_again(weather: dict[str, Any]) -> None:
    made = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", '{"city": "Oslo"}', "call_1")]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "20"}
    two = [call("get_weather", '{"city": "Rome"}'), call("get_weather", '{"city": "A"}')]
    again = {"content": None, "tool_calls": two}
    found = asyncio.run(Harness(Scripted(again)).complete({"messages": [USER, made, result], "tools": [weather]}))
    ids = {c["id"] for c in found["choices"][0]["message"]["tool_calls"]}
    assert len(ids) == 2 and "call_1" not in ids


def test_a_call_that_was_cut_off_is_asked_for_with_more_room(weather: dict[str, Any]) -> None:
    cut = {"content": None, "tool_calls": [call("get_weather", '{"city": "Ro')], "finish": "length"}
    whole = {"content": None, "tool_calls": [call("get_weather", '{"city": "Rome"}')]}
    upstream = Scripted(cut, whole)
    asked = {"messages": [USER], "tools": [weather], "max_tokens": 50, "lowbit": {"token_budget": 90}}
    found = asyncio.run(Harness(upstream).complete(asked))
    assert found["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
    assert [sent["max_tokens"] for sent in upstream.sent] == [50, 85]  # twice as many, so far as the budget goes
