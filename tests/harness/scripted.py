"""A model's server whose answers a test writes down; what it was sent is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from lowbit.harness import UpstreamFailed

Reply = dict[str, Any] | str | UpstreamFailed


def completion(reply: Reply) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply} if isinstance(reply, str) else dict(reply)  # type: ignore[arg-type]
    finish = message.pop("finish", "stop")
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }  # fmt: skip


class Scripted:
    """Gives its replies one after the other; the last one again and again."""

    name = "scripted"
    dialect: str | None = None

    def __init__(self, *replies: Reply, piece: int = 3) -> None:
        self.replies, self.sent, self.holds, self.refused, self._piece = list(replies), [], set(), set(), piece
        self.sent: list[dict[str, Any]]
        self.holds: set[str]
        self.refused: set[str]

    def _next(self, body: dict[str, Any]) -> Reply:
        self.sent.append(body)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, UpstreamFailed):
            raise reply
        return reply

    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        return completion(self._next(body))

    async def close(self) -> None:
        pass

    async def stream(self, body: dict[str, Any], seconds: float) -> AsyncIterator[dict[str, Any]]:
        whole = completion(self._next(body))
        choice = whole["choices"][0]
        for delta in self._deltas(choice["message"]):
            yield whole | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}
        yield whole | {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}

    def _deltas(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": None}
        for key in ("reasoning_content", "content"):
            text = message.get(key) or ""
            for at in range(0, len(text), self._piece):
                yield {key: text[at : at + self._piece]}
        for i, call in enumerate(message.get("tool_calls") or []):
            arguments = call["function"]["arguments"]
            yield {"tool_calls": [call | {"index": i, "function": call["function"] | {"arguments": ""}}]}
            for at in range(0, len(arguments), self._piece):
                yield {"tool_calls": [{"index": i, "function": {"arguments": arguments[at : at + self._piece]}}]}


def call(name: str, arguments: str, id: str = "call_1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
