"""/v1/completions: text after text, without a template or tools. Silence and repetition are failures here too."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from lowbit.harness import guards
from lowbit.harness.answer import text_of
from lowbit.harness.failures import BadRequest, InvalidOutput, Problem, UpstreamFailed
from lowbit.harness.harness import Harness
from lowbit.harness.options import HarnessOptions
from lowbit.harness.request import read_options
from lowbit.harness.trace import Trace
from lowbit.harness.upstream import HttpUpstream

_PATH = "/completions"
_LOOK_EVERY = 256  # characters between two looks for repetition


async def complete(harness: Harness, upstream: HttpUpstream, body: dict[str, Any]) -> dict[str, Any]:
    """A text completion in OpenAI's form. Raises BadRequest, InvalidOutput, UpstreamFailed."""
    options, body = _read(body, harness.options)
    trace, deadline = Trace(), time.monotonic() + options.seconds
    failed: Problem | UpstreamFailed = Problem(kind="budget", detail="the budget of time was spent")
    for left in range(options.tries if options.on("retry") else 1, 0, -1):
        if (seconds := deadline - time.monotonic()) <= 0:
            break
        trace.tries += 1
        try:
            found = await upstream.ask(_PATH, body, seconds)
        except UpstreamFailed as error:
            trace.add("upstream", error.code, error.message)
            failed = error
            if not error.again:
                break
            continue
        trace.used(found.get("usage"))
        problem = _problem(found) if options.on("guard") else None
        if problem is None:
            harness.done(trace, None)
            return found | {"lowbit": trace.as_json()}
        trace.add("retry" if left > 1 else "guard", problem.kind, problem.detail)
        failed, body = problem, _warmer(body)
    given_up = InvalidOutput(failed, trace) if isinstance(failed, Problem) else failed
    given_up.trace = trace
    harness.done(trace, given_up.code)
    raise given_up


async def stream(harness: Harness, upstream: HttpUpstream, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The same in chunks, as they come; one that repeats itself is cut and ends with finish_reason "length"."""
    options, body = _read(body, harness.options)
    trace, written, looked = Trace(tries=1), "", 0
    async for chunk in upstream.chunks(_PATH, body, options.seconds):
        trace.used(chunk.get("usage"))
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        written += text_of(choice.get("text"))
        if options.on("guard") and len(written) - looked >= _LOOK_EVERY:
            looked = len(written)
            if problem := guards.repetition(written):
                trace.add("guard", problem.kind, problem.detail)
                ending = choice | {"finish_reason": "length"}
                yield chunk | {"choices": [ending], "lowbit": trace.as_json()}
                harness.done(trace, problem.kind)
                return
        yield chunk | ({"lowbit": trace.as_json()} if choice.get("finish_reason") else {})
    harness.done(trace, None)


def _read(body: dict[str, Any], base: HarnessOptions) -> tuple[HarnessOptions, dict[str, Any]]:
    if not isinstance(body.get("prompt"), str | list) or not body["prompt"]:
        raise BadRequest("prompt must be a text or a list", param="prompt")
    options = read_options(body.get("lowbit"), base)
    return options, {key: value for key, value in body.items() if key != "lowbit"}


def _problem(found: dict[str, Any]) -> Problem | None:
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices:
        return Problem(kind="empty", detail="the model's server sent no choices")
    texts = [text_of(choice.get("text")) for choice in choices if isinstance(choice, dict)]
    if not all(text.strip() for text in texts):
        return Problem(kind="empty", detail="the answer is empty")
    return next((problem for text in texts if (problem := guards.repetition(text))), None)


def _warmer(body: dict[str, Any]) -> dict[str, Any]:
    temperature = body.get("temperature")
    return body | {"temperature": min(1.5, (temperature if isinstance(temperature, int | float) else 0.7) + 0.3)}
