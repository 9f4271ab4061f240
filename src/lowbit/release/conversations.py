"""Conversations that a chat template is rendered with, as OpenAI's API takes them and as transformers does."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather in a city, "now" or on a day.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city"],
            },
        },
    }
]
_SYSTEM = {"role": "system", "content": "You answer in one sentence."}
_USER = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
_AGAIN = {"role": "user", "content": '  And <b>3 & 3</b>?\n\nSay "six" – é 日本.  '}
_QUESTION = {"role": "user", "content": "What is the weather in Rome?"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "celsius"}'},
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"degrees": 21}'}
_THOUGHT = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two make four."}
_PICTURE = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """One conversation. kind: 'plain', or what a template must know to render it: 'system', 'tools', 'thinking',
    'images'. variables: what the template reads beside (enable_thinking)."""

    name: str
    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[bool, ...] = (True,)  # with and without the beginning of an answer

    @property
    def is_continued(self) -> bool:
        """Whether an answer stands at its end, which llama.cpp goes on with instead of ending it."""
        return self.messages[-1]["role"] == "assistant"

    def with_objects(self) -> list[dict[str, Any]]:
        """The messages with a call's arguments as an object, as Hugging Face's convention has them."""
        messages = copy.deepcopy(self.messages)
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return messages


CONVERSATIONS = (
    Conversation(name="one question", kind="plain", messages=[_USER], prompts=(True, False)),
    Conversation(name="a system message", kind="system", messages=[_SYSTEM, _USER], prompts=(True, False)),
    Conversation(name="several turns", kind="plain", messages=[_USER, _ANSWER, _AGAIN], prompts=(True, False)),
    Conversation(name="a system message and turns", kind="system", messages=[_SYSTEM, _USER, _ANSWER, _AGAIN]),
    Conversation(name="a whole exchange", kind="plain", messages=[_USER, _ANSWER], prompts=(False,)),
    Conversation(name="tools", kind="tools", messages=[_QUESTION], tools=TOOLS, prompts=(True, False)),
    Conversation(name="tools and a system message", kind="tools", messages=[_SYSTEM, _QUESTION], tools=TOOLS),
    Conversation(name="a tool's result", kind="tools", messages=[_QUESTION, _CALL, _RESULT], tools=TOOLS),
    Conversation(
        name="thinking on", kind="thinking", messages=[_USER], variables={"enable_thinking": True},
    ),
    Conversation(name="thinking off", kind="thinking", messages=[_USER], variables={"enable_thinking": False}),
    Conversation(name="a thought in the past", kind="thinking", messages=[_USER, _THOUGHT, _AGAIN]),
    Conversation(name="an image", kind="images", messages=[_PICTURE]),
)  # fmt: skip
