"""/v1/responses through OpenAI's own client, which checks every form that it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from endpoint import served
from pydantic import BaseModel
from scripted import Scripted, call

USER = "What is the weather in Rome?"
WEATHER = {
    "type": "function", "name": "get_weather", "description": "Weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
CALLS = {"content": None, "reasoning_content": "I must look", "tool_calls": [call("get_weather", '{"city": "Rome"}')]}


class Person(BaseModel):
    name: str
    age: int


def ask(upstream: Scripted, asking: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with served(upstream) as endpoint, openai.AsyncOpenAI(base_url=endpoint.url, api_key="-") as client:
            return await asking(client)

    return asyncio.run(go())


def test_a_response() -> None:
    upstream = Scripted("It is sunny.")
    found = ask(upstream, lambda c: c.responses.create(model="m", input=USER, instructions="Be brief."))
    assert found.output_text == "It is sunny." and found.status == "completed"
    assert found.usage.input_tokens == 10 and found.usage.output_tokens == 5
    assert [m["role"] for m in upstream.sent[0]["messages"]] == ["system", "user"]


def test_a_conversation_goes_on_from_its_id() -> None:
    upstream = Scripted("Sunny.", "Rainy.")

    async def asking(client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(model="m", input="Rome?")
        second = await client.responses.create(model="m", input="Oslo?", previous_response_id=first.id)
        assert [m["content"] for m in upstream.sent[1]["messages"]] == ["Rome?", "Sunny.", "Oslo?"]
        assert (await client.responses.retrieve(second.id)).output_text == "Rainy."
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="m", input="Oslo?", previous_response_id=first.id)
        third = await client.responses.create(model="m", input="Rome?", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(third.id)

    ask(upstream, asking)


def test_a_value_is_parsed() -> None:
    found = ask(
        Scripted("nonsense", '{"name": "Ann", "age": 3}'),
        lambda c: c.responses.parse(model="m", input="Who?", text_format=Person),
    )
    assert found.output_parsed == Person(name="Ann", age=3)


def test_a_tool_is_called_and_its_result_read() -> None:
    upstream = Scripted(CALLS, "It is sunny.")

    async def asking(client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(model="m", input=USER, tools=[WEATHER])
        kinds = [item.type for item in first.output]
        assert kinds == ["reasoning", "function_call"]
        made = first.output[1]
        items = [
            {"role": "user", "content": USER},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"},
        ]
        second = await client.responses.create(model="m", input=items, tools=[WEATHER])
        assert second.output_text == "It is sunny."
        said = upstream.sent[1]["messages"]
        assert [m["role"] for m in said] == ["user", "assistant", "tool"]
        assert said[1]["reasoning_content"] == "I must look" and said[1]["tool_calls"][0]["id"] == made.call_id
        assert said[2]["tool_call_id"] == made.call_id

    ask(upstream, asking)


@pytest.mark.parametrize("reply, kinds", [("Sunny today.", ["message"]), (CALLS, ["reasoning", "function_call"])])
def test_a_stream(reply: Any, kinds: list[str]) -> None:
    async def asking(client: openai.AsyncOpenAI) -> None:
        events, text = [], ""
        async with client.responses.stream(model="m", input=USER, tools=[WEATHER]) as stream:
            async for event in stream:
                events.append(event.type)
                text += event.delta if event.type == "response.output_text.delta" else ""
            final = await stream.get_final_response()
        assert events[:2] == ["response.created", "response.in_progress"] and events[-1] == "response.completed"
        assert [item.type for item in final.output] == kinds
        assert text == final.output_text
        assert final.usage is not None

    ask(Scripted(reply), asking)


def test_an_answer_that_was_cut_is_incomplete() -> None:
    found = ask(Scripted({"content": "It is", "finish": "length"}), lambda c: c.responses.create(model="m", input=USER))
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": USER, "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": USER, "background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/a.png"}]}]},
            "input[0]",
        ),
        ({"input": []}, "input"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(Scripted("hi"), lambda c: c.responses.create(model="m", **body))
    assert caught.value.param == param
