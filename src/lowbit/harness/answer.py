"""One choice of a chat completion as the harness works on it, whether it came whole or in chunks."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from lowbit.harness.failures import UpstreamFailed

_WRITTEN_ANEW = ("tool_calls", "function_call", "content", "reasoning_content")  # of a message


def new_id() -> str:
    """An id of a tool call."""
    return f"call_{secrets.token_hex(12)}"


@dataclass
class Call:
    """A tool call. arguments: JSON text, as OpenAI's form has it; may be broken until it was healed."""

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        self.id = self.id or new_id()

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Answer:
    """content, reasoning: text, "" where there is none. finish: OpenAI's finish_reason. message: the upstream's whole
    message, choice and response: what else they hold (logprobs, timings, ...), to be given on."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish: str = "stop"
    message: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    response: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_response(cls, response: Any) -> Answer:
        """Raises UpstreamFailed where it is no chat completion."""
        choices = response.get("choices") if isinstance(response, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise UpstreamFailed("the model's server sent no chat completion", code="upstream_malformed")
        return cls(
            content=text_of(message.get("content")),
            reasoning=text_of(message.get("reasoning_content") or message.get("reasoning")),
            calls=[_call(raw) for raw in _raw_calls(message)],
            finish=str(choice.get("finish_reason") or "stop"),
            message=message,
            choice=choice,
            response=response,
        )

    @property
    def usage(self) -> dict[str, Any] | None:
        usage = self.response.get("usage")
        return usage if isinstance(usage, dict) else None

    def as_message(self) -> dict[str, Any]:
        """The assistant's message as OpenAI's form has it."""
        found = {k: v for k, v in self.message.items() if k not in _WRITTEN_ANEW}
        found |= {"role": "assistant", "content": self.content if self.content or not self.calls else None}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = [call.as_json() for call in self.calls]
        return found

    def as_choice(self, index: int = 0) -> dict[str, Any]:
        finish = "tool_calls" if self.calls else self.finish
        return self.choice | {"index": index, "message": self.as_message(), "finish_reason": finish}


class Gathered:
    """A stream on its way in: what its chunks have said so far."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.finish: str | None = None
        self.last: dict[str, Any] = {}
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, chunk: dict[str, Any]) -> str:
        """Takes a chunk in; the content that it brought."""
        self.last = self.last | chunk
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return ""
        delta = choice.get("delta")
        if choice.get("finish_reason"):
            self.finish = str(choice["finish_reason"])
        if not isinstance(delta, dict):
            return ""
        piece = text_of(delta.get("content"))
        if piece:
            self.content.append(piece)
        if thought := text_of(delta.get("reasoning_content") or delta.get("reasoning")):
            self.reasoning.append(thought)
        for position, raw in enumerate(_raw_calls(delta)):
            self._add_call(raw, position)
        return piece

    def _add_call(self, raw: dict[str, Any], position: int) -> None:
        index = raw.get("index")
        call = self._calls.setdefault(
            index if type(index) is int else position, {"id": "", "name": "", "arguments": ""}
        )
        function = raw.get("function")
        call["id"] = call["id"] or text_of(raw.get("id"))
        if isinstance(function, dict):
            # Servers send a name once; one that repeats it in every chunk does not mean it to grow.
            call["name"] = call["name"] or text_of(function.get("name"))
            call["arguments"] += arguments_text(function.get("arguments"))

    @property
    def ended(self) -> bool:
        return self.finish is not None

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def answer(self) -> Answer:
        calls = [Call(name=c["name"], arguments=c["arguments"], id=c["id"]) for _, c in sorted(self._calls.items())]
        rest = {key: value for key, value in self.last.items() if key != "choices"}
        return Answer(
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            calls=calls,
            finish=self.finish or "stop",
            response=rest | {"object": "chat.completion"},
        )


def text_of(value: Any) -> str:
    """Text of a field that may be text, a list of text parts, or anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def arguments_text(value: Any) -> str:
    """Arguments as text: some servers send them as an object (Ollama), or not at all."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _raw_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message or a delta; a function_call, which came before tool_calls, is one."""
    listed = message.get("tool_calls")
    found = [raw for raw in listed if isinstance(raw, dict)] if isinstance(listed, list) else []
    old = message.get("function_call")
    return found if found or not isinstance(old, dict) else [{"function": old}]


def _call(raw: dict[str, Any]) -> Call:
    function = raw.get("function")
    function = function if isinstance(function, dict) else {}
    return Call(
        name=text_of(function.get("name")),
        arguments=arguments_text(function.get("arguments")),
        id=text_of(raw.get("id")),
    )
