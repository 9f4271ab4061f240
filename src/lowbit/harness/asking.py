"""A value instead of a text: ``ask(url, messages, output=MyModel).value`` is a MyModel, or an error is raised."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lowbit.harness.failures import BadRequest
from lowbit.harness.harness import Harness
from lowbit.harness.upstream import HttpUpstream

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Asked(Generic[T]):
    """value: of the type that was asked for. trace: what the harness did ("lowbit" of the response). response: the
    chat completion."""

    value: T
    trace: dict[str, Any]
    response: dict[str, Any]


async def ask_async(
    model: Harness | str, messages: str | Sequence[dict[str, Any]], *, output: type[T] | dict[str, Any], **body: Any
) -> Asked[Any]:
    """As ask(), a coroutine."""
    read, schema, name = reader(output)
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    request = {"messages": said, "response_format": form, **body}
    if isinstance(model, Harness):
        return _asked(await model.complete(request, check=checker(read)), read)
    async with HttpUpstream(model) as upstream:
        return _asked(await Harness(upstream).complete(request, check=checker(read)), read)


def ask(
    model: Harness | str, messages: str | Sequence[dict[str, Any]], *, output: type[T] | dict[str, Any], **body: Any
) -> Asked[Any]:
    """Asks for a value of a type.

    model:    a Harness, or the URL of an OpenAI-compatible server, up to and with /v1
    messages: a question, or a conversation in OpenAI's form
    output:   a Pydantic model, whose own validators count too: what they say is shown to the model; or a JSON Schema
    body:     more of the request: max_tokens, temperature, lowbit={"tries": 2}, ...

    Raises InvalidOutput where no try gave such a value, BadRequest, UpstreamFailed.
    """
    return asyncio.run(ask_async(model, messages, output=output, **body))


def reader(output: Any) -> tuple[Callable[[Any], Any], dict[str, Any], str]:
    """How a value is made of JSON, the schema, and its name. Raises BadRequest."""
    if isinstance(output, dict):
        return (lambda value: value), output, "answer"
    validate, schema = getattr(output, "model_validate", None), getattr(output, "model_json_schema", None)
    if validate is None or schema is None:
        raise BadRequest("output must be a Pydantic model or a JSON Schema", param="output")
    return validate, schema(), output.__name__


def checker(read: Callable[[Any], Any]) -> Callable[[Any], str | None]:
    """What says why a value cannot be read, None where it can: for Harness.complete."""

    def check(value: Any) -> str | None:
        try:
            read(value)
        except ValueError as error:  # pydantic's ValidationError is one
            return "; ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        return None

    return check


def _asked(response: dict[str, Any], read: Callable[[Any], Any]) -> Asked[Any]:
    value = json.loads(response["choices"][0]["message"]["content"])
    return Asked(value=read(value), trace=response["lowbit"], response=response)
