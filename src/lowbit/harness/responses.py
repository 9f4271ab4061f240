"""/v1/responses, the newer form of OpenAI's API, as chat completions: what clients use of it, in both directions.

Kept between requests, in memory and bounded: the conversation behind each response id. Refused by name: what a model on
this machine has not (web search, files, MCP servers, background work).
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from typing import Any

from lowbit.harness import BadRequest, Harness, HarnessError
from lowbit.harness.answer import text_of
from lowbit.harness.request import ROLES

Json = dict[str, Any]
_GIVEN_ON = ("model", "temperature", "top_p", "parallel_tool_calls", "seed", "user", "lowbit")
_ECHOED = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "reasoning",
    "temperature", "text", "tool_choice", "tools", "top_p", "truncation", "user",
)  # fmt: skip
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_MOST, _LARGEST = 1000, 64 << 20  # conversations kept, and characters of all of them


class Responses:
    """create() and stream() answer one request each; get() and forget() are about those that were kept."""

    def __init__(self, harness: Harness) -> None:
        self._harness, self._kept = harness, _Kept()

    async def create(self, body: Json) -> Json:
        """A response. Raises BadRequest, and what Harness.complete raises."""
        messages, chat = self._chat(body)
        found = await self._harness.complete(chat)
        message = found["choices"][0]["message"]
        return self._finished(body, messages, message, found["choices"][0]["finish_reason"], found)

    def get(self, id: str) -> Json:
        """A response that was kept. Raises HarnessError (404)."""
        return self._kept.get(id)[0]

    def forget(self, id: str) -> Json:
        self._kept.get(id)
        self._kept.drop(id)
        return {"id": id, "object": "response", "deleted": True}

    async def stream(self, body: Json) -> AsyncIterator[Json]:
        """The events of a response, numbered."""
        messages, chat = self._chat(body)
        writer = _Writer(_head(body, id := _id("resp")))
        async for chunk in self._harness.stream(chat):
            for event in writer.chunk(chunk):
                yield event
        message, finish, last = writer.message(), writer.finish, writer.last
        for event in writer.closing():
            yield event
        done = self._finished(body, messages, message, finish, last, id=id, output=writer.output)
        kind = "response.completed" if done["status"] == "completed" else "response.incomplete"
        yield writer.event(kind, response=done)

    def _finished(
        self, body: Json, messages: list[Json], message: Json, finish: str, found: Json, *, id: str = "",
        output: list[Json] | None = None,
    ) -> Json:  # fmt: skip
        cut = finish == "length"
        response = _head(body, id or _id("resp")) | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": found.get("model") or body.get("model") or "",
            "output": _output(message) if output is None else output,
            "usage": _usage(found.get("usage")),
            "lowbit": found.get("lowbit"),
        }
        if body.get("store") is not False:
            self._kept.keep(response, [*messages, message])
        return response

    def _chat(self, body: Json) -> tuple[list[Json], Json]:
        """The conversation without instructions, and the chat request."""
        for key in ("background", "conversation", "prompt"):
            if body.get(key) is not None and body[key] is not False:
                raise BadRequest(f"{key} is not supported here", param=key)
        previous = body.get("previous_response_id")
        before = self._kept.get(str(previous))[1] if previous else []
        messages = [*before, *_messages(body.get("input"))]
        instructions = body.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            raise BadRequest("instructions must be a text", param="instructions")
        system = [{"role": "system", "content": instructions}] if instructions else []
        chat: Json = {key: body[key] for key in _GIVEN_ON if body.get(key) is not None}
        chat["messages"] = [*system, *messages]
        if (limit := body.get("max_output_tokens")) is not None:
            if type(limit) is not int or limit < 1:
                raise BadRequest("max_output_tokens must be a positive whole number", param="max_output_tokens")
            chat["max_tokens"] = limit
        if tools := _tools(body.get("tools")):
            chat["tools"] = tools
            if body.get("tool_choice") is not None:
                chat["tool_choice"] = _tool_choice(body["tool_choice"])
        if form := _format(body.get("text")):
            chat["response_format"] = form
        return messages, chat


class _Kept:
    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Json, list[Json], int]] = OrderedDict()
        self._size = 0

    def keep(self, response: Json, messages: list[Json]) -> None:
        size = sum(len(str(message)) for message in messages)
        self._kept[response["id"]] = (response, messages, size)
        self._size += size
        while self._kept and (len(self._kept) > _MOST or self._size > _LARGEST):
            self.drop(next(iter(self._kept)))

    def get(self, id: str) -> tuple[Json, list[Json]]:
        try:
            response, messages, _ = self._kept[id]
        except KeyError:
            message = f"there is no response {id[:60]}; responses are kept in memory, the last {_MOST}"
            raise HarnessError(message, status=404, code="response_not_found", param="previous_response_id") from None
        return response, messages

    def drop(self, id: str) -> None:
        self._size -= self._kept.pop(id)[2]


class _Writer:
    """Chat chunks in, events out: one item at a time is open, its end comes with the next one's beginning."""

    def __init__(self, head: Json) -> None:
        self._head, self._number, self._begun = head, 0, False
        self.output: list[Json] = []
        self._open = ""  # "reasoning" or "message"
        self._text = {"reasoning": "", "message": ""}
        self._calls: list[Json] = []
        self.finish, self.last = "stop", {"model": "", "usage": None, "lowbit": None}

    def event(self, kind: str, **more: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def chunk(self, chunk: Json) -> Iterator[Json]:
        if not self._begun:
            self._begun = True
            yield self.event("response.created", response=self._head)
            yield self.event("response.in_progress", response=self._head)
        self.last |= {key: chunk[key] for key in ("model", "usage", "lowbit") if chunk.get(key)}
        choice = chunk["choices"][0] if chunk.get("choices") else {}
        delta = choice.get("delta") or {}
        if thought := text_of(delta.get("reasoning_content")):
            yield from self._grow("reasoning", thought)
        if text := text_of(delta.get("content")):
            yield from self._grow("message", text)
        for call in delta.get("tool_calls") or []:
            yield from self._call(call)
        self.finish = choice.get("finish_reason") or self.finish

    def closing(self) -> Iterator[Json]:
        """The end of what is still open."""
        if self._open:
            kind, at, item = self._open, len(self.output) - 1, self.output[-1]
            self._open, text = "", self._text[self._open]
            place = {"item_id": item["id"], "output_index": at, "content_index": 0}
            part = _text_part(kind, text)
            item |= {"status": "completed", "content": [part]}
            yield self.event(f"response.{_word(kind)}.done", **place, text=text)
            yield self.event("response.content_part.done", **place, part=part)
            yield self.event("response.output_item.done", output_index=at, item=item)

    def message(self) -> Json:
        """What was said, as a chat message."""
        found: Json = {"role": "assistant", "content": self._text["message"] or None}
        if self._text["reasoning"]:
            found["reasoning_content"] = self._text["reasoning"]
        return found | ({"tool_calls": self._calls} if self._calls else {})

    def _grow(self, kind: str, text: str) -> Iterator[Json]:
        if self._open != kind:
            yield from self.closing()
            self._open = kind
            item = _text_item(kind) | {"status": "in_progress"}
            self.output.append(item)
            at = len(self.output) - 1
            yield self.event("response.output_item.added", output_index=at, item=dict(item))
            place = {"item_id": item["id"], "output_index": at, "content_index": 0}
            yield self.event("response.content_part.added", **place, part=_text_part(kind, ""))
        self._text[kind] += text
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, "content_index": 0}
        yield self.event(f"response.{_word(kind)}.delta", **place, delta=text)

    def _call(self, call: Json) -> Iterator[Json]:
        yield from self.closing()
        self._calls.append({key: call[key] for key in ("id", "type", "function")})
        item, at = _call_item(call), len(self.output)
        self.output.append(item)
        yield self.event(
            "response.output_item.added", output_index=at, item=item | {"arguments": "", "status": "in_progress"}
        )
        place = {"item_id": item["id"], "output_index": at}
        yield self.event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        yield self.event(
            "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
        )
        yield self.event("response.output_item.done", output_index=at, item=item)


def _messages(given: Any) -> list[Json]:
    """The input's items as chat messages; calls of one turn become one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRequest("input must be a text or a list of items", param="input")
    found: list[Json] = []
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise BadRequest(f"{where} must be an object", param=where)
        kind = item.get("type") or "message"
        if kind == "message":
            if item.get("role") not in ROLES:
                raise BadRequest(f"{where} must have a role of {', '.join(ROLES)}", param=f"{where}.role")
            found.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
        elif kind == "function_call":
            _add_call(found, item, where)
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else text_of(output)
            found.append({"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": text})
        elif kind == "reasoning":
            thoughts = text_of(item.get("content")) or text_of(item.get("summary"))
            found.append({"role": "assistant", "content": None, "reasoning_content": thoughts})
        else:
            raise BadRequest(f"{where} is of a type that is not supported here: {str(kind)[:60]}", param=where)
    if not (joined := _joined(found)):
        raise BadRequest("input says nothing", param="input")
    return joined


def _add_call(found: list[Json], item: Json, where: str) -> None:
    name = item.get("name")
    if not isinstance(name, str):
        raise BadRequest(f"{where} has no name", param=where)
    function = {"name": name, "arguments": str(item.get("arguments") or "{}")}
    call = {"id": str(item.get("call_id") or item.get("id") or ""), "type": "function", "function": function}
    if found and found[-1]["role"] == "assistant" and found[-1].get("tool_calls"):
        found[-1]["tool_calls"].append(call)
    else:
        found.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _joined(messages: list[Json]) -> list[Json]:
    """Thoughts, words and calls of one turn come as items of their own; a chat has one message for them."""
    found: list[Json] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == "assistant" == last.get("role") and not last.get("tool_calls"):
            merged = last | {key: value for key, value in message.items() if value is not None}
            if last.get("content") and message.get("content"):
                merged["content"] = f"{text_of(last['content'])}{text_of(message['content'])}"
            found[-1] = merged
        else:
            found.append(message)
    return [m for m in found if m.keys() - {"role", "reasoning_content"} and (m["content"] or m.get("tool_calls"))]


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[Json] = []
    for raw in content if isinstance(content, list) else [None]:
        part = raw if isinstance(raw, dict) else {}
        kind = part.get("type")
        if kind in _PARTS:
            parts.append({"type": "text", "text": text_of(part.get(_PARTS[kind]))})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            raise BadRequest(f"{where}.content has a part that is not supported here: {str(kind)[:60]}", param=where)
    return "".join(p["text"] for p in parts) if all(p["type"] == "text" for p in parts) else parts


def _tools(given: Any) -> list[Json]:
    found = []
    for i, tool in enumerate(given if isinstance(given, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = str(tool.get("type") if isinstance(tool, dict) else tool)[:60]
            raise BadRequest(f"tools[{i}] is not a function; {kind} is not supported here", param=f"tools[{i}]")
        keys = ("name", "description", "parameters", "strict")
        found.append({"type": "function", "function": {k: tool[k] for k in keys if tool.get(k) is not None}})
    return found


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: Any) -> Json | None:
    form = text.get("format") if isinstance(text, dict) else None
    if not isinstance(form, dict) or form.get("type") in (None, "text"):
        return None
    if form["type"] == "json_schema":
        return {"type": "json_schema", "json_schema": {k: form[k] for k in ("name", "schema", "strict") if k in form}}
    return form


def _output(message: Json) -> list[Json]:
    found = []
    for kind, text in (("reasoning", message.get("reasoning_content")), ("message", message.get("content"))):
        if text:
            found.append(_text_item(kind) | {"status": "completed", "content": [_text_part(kind, text)]})
    return found + [_call_item(call) for call in message.get("tool_calls") or []]


def _text_item(kind: str) -> Json:
    if kind == "reasoning":
        return {"id": _id("rs"), "type": "reasoning", "summary": [], "content": []}
    return {"id": _id("msg"), "type": "message", "role": "assistant", "content": []}


def _text_part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Json) -> Json:
    function = call["function"]
    return {
        "id": _id("fc"), "type": "function_call", "call_id": call["id"], "name": function["name"],
        "arguments": function["arguments"], "status": "completed",
    }  # fmt: skip


def _word(kind: str) -> str:
    return "reasoning_text" if kind == "reasoning" else "output_text"


def _head(body: Json, id: str) -> Json:
    defaults = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "text": {"format": {"type": "text"}}}
    return {
        "id": id, "object": "response", "created_at": int(time.time()), "status": "in_progress", "error": None,
        "incomplete_details": None, "model": body.get("model") or "", "output": [], "usage": None,
        "store": body.get("store") is not False, "background": False,
        **{key: body.get(key, defaults.get(key)) for key in _ECHOED},
    }  # fmt: skip


def _usage(usage: Any) -> Json | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion, "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": prompt + completion,
    }  # fmt: skip


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
