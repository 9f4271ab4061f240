"""One answer that can be relied on: ask, judge, mend, ask again with what was wrong, and in the end say so honestly.

Nothing here knows HTTP: an Upstream gives answers, and the same loop serves the library, the endpoint and the batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from lowbit.harness import feedback, guards, judge, legacy, request
from lowbit.harness.answer import Answer
from lowbit.harness.escape import Escaper
from lowbit.harness.failures import BadRequest, HarnessError, InvalidOutput, Problem, UpstreamFailed
from lowbit.harness.fallback import REASON
from lowbit.harness.memory import Memory
from lowbit.harness.options import HarnessOptions
from lowbit.harness.request import Request
from lowbit.harness.stream import Stream
from lowbit.harness.trace import Trace
from lowbit.harness.upstream import Upstream

_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class Harness:
    """upstream:  the model. options: bounds and layers; a request's own "lowbit" object may change them for itself
    fallbacks:  models to ask when the tries are spent, in order; nothing is ever sent anywhere that is not named here
    special:    spellings of the model's control tokens, where they are known
    on_answer:  called with the trace and the kind of failure (None: it went well) of every answer, for metrics
    """

    def __init__(
        self,
        upstream: Upstream,
        options: HarnessOptions | None = None,
        *,
        fallbacks: Sequence[Upstream] = (),
        special: Sequence[str] = (),
        on_answer: Callable[[Trace, str | None], None] | None = None,
    ) -> None:
        self.upstream, self.options = upstream, options or HarnessOptions()
        self._fallbacks, self._escaper, self._on_answer = tuple(fallbacks), Escaper(special), on_answer
        self._memory = Memory()

    async def complete(
        self, body: dict[str, Any], *, check: Callable[[Any], str | None] | None = None
    ) -> dict[str, Any]:
        """A chat completion in OpenAI's form, with what was done under "lowbit".

        check: says what is wrong with a value that follows the response_format's schema, None where nothing is

        Raises BadRequest, InvalidOutput where no try gave a valid answer, UpstreamFailed where there is no model.
        """
        if legacy.spoken(body):
            return legacy.response(await self.complete(legacy.read(body), check=check))
        asked = replace(request.read(body, self.options), check=check)
        if asked.n == 1:
            return await self._one(asked)
        # One by one they are judged and mended; together they run in the server's slots.
        parts = await asyncio.gather(*(self._one(asked.changed(n=None)) for _ in range(asked.n)))
        choices = [part["choices"][0] | {"index": i} for i, part in enumerate(parts)]
        usage = {key: sum((part.get("usage") or {}).get(key) or 0 for part in parts) for key in _USAGE}
        return parts[0] | {"choices": choices, "usage": usage, "lowbit": {"choices": [p["lowbit"] for p in parts]}}

    def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The same as chunks, the last of which carries "lowbit". Raises BadRequest at once."""
        old = legacy.spoken(body)
        asked = request.read(legacy.read(body) if old else body, self.options)
        if asked.n != 1:
            raise BadRequest("n must be 1 in a stream", param="n")
        return self._in_old_form(asked) if old else Stream(self, asked).run()

    async def _in_old_form(self, asked: Request) -> AsyncIterator[dict[str, Any]]:
        async for chunk in Stream(self, asked).run():
            yield legacy.chunk(chunk)

    async def _one(self, asked: Request) -> dict[str, Any]:
        trace = Trace()
        try:
            deadline = time.monotonic() + asked.options.seconds
            answer = await self.until_valid(self.prepare(asked, trace), trace, deadline)
        except HarnessError as error:
            error.trace = trace
            self.done(trace, error.code)
            raise
        self.done(trace, None)
        self.keep(answer)
        return answer.response | {"choices": [answer.as_choice()], "lowbit": trace.as_json()}

    # What one answer takes, whole or streamed

    def prepare(self, asked: Request, trace: Trace) -> Request:
        """What is done to a request before it is sent: thoughts put back, text escaped, steps counted."""
        messages = self._memory.restored(asked.messages)
        if asked.options.on("escape"):
            pairs = [self._escaper.message(message) for message in messages]
            messages = [message for message, _ in pairs]
            if count := sum(changed for _, changed in pairs):
                trace.add("escape", "special_tokens_escaped", f"in {count} pieces of text")
        asked = asked.changed(messages=messages)
        if asked.options.on("guard") and asked.tools and (spent := guards.over_budget(asked)):
            trace.add("guard", spent.kind, spent.detail)
            asked = feedback.without_tools(asked, spent)
        return asked

    async def until_valid(
        self,
        asked: Request,
        trace: Trace,
        deadline: float,
        *,
        made: int = 0,
        failed: Problem | UpstreamFailed | None = None,
    ) -> Answer:
        """Asks the model, and the fallbacks after it, until an answer is valid. deadline: of time.monotonic(), for the
        model; a fallback has its own time. made: tries of the model that there were before, the last of which
        ``failed``. Raises InvalidOutput, UpstreamFailed."""
        found = await self._tries(self.upstream, asked, trace, deadline, made, failed)
        for other in self._fallbacks if asked.options.on("fallback") else ():
            if isinstance(found, Answer):
                break
            reason = found.detail if isinstance(found, Problem) else found.message
            trace.add("fallback", "fallback", f"{other.name}, because {reason}")
            trace.fallback = other.name
            REASON.set(reason)
            found = await self._tries(other, asked, trace, time.monotonic() + asked.options.seconds)
        if isinstance(found, Answer):
            return found
        raise InvalidOutput(found, trace) if isinstance(found, Problem) else found

    async def _tries(
        self,
        upstream: Upstream,
        asked: Request,
        trace: Trace,
        deadline: float,
        made: int = 0,
        failed: Problem | UpstreamFailed | None = None,
    ) -> Answer | Problem | UpstreamFailed:
        """An answer that is valid, or what the last try had wrong."""
        options = asked.options
        failed = failed or Problem(kind="budget", detail="the budget of time or tokens was spent")
        for left in range((options.tries if options.on("retry") else 1) - made, 0, -1):
            seconds = deadline - time.monotonic()
            if seconds <= 0 or self._spent(options, trace):
                break
            trace.tries += 1
            try:
                body = self.bounded(feedback.shaped(asked, upstream), trace).body
                answer = Answer.of_response(await upstream.chat(body, seconds))
            except UpstreamFailed as error:
                trace.add("upstream", error.code, error.message)
                again = feedback.after_refusal(asked, error, upstream, trace)
                if again is None:
                    return error
                asked, failed = again, error
                left_over = max(0.0, deadline - time.monotonic())
                if error.after > left_over:  # it could only be asked too early
                    return error
                if left > 1 and error.again:
                    await asyncio.sleep(min(max(0.2 * trace.tries, error.after), left_over))
                continue
            trace.used(answer.usage)
            problem = self.judge(answer, asked, trace)
            if problem is None:
                return answer
            trace.add("retry" if left > 1 else "guard", problem.kind, problem.detail)
            asked, failed = feedback.after_problem(asked, answer, problem, upstream), problem
        return failed

    def judge(self, answer: Answer, asked: Request, trace: Trace) -> Problem | None:
        """Mends an answer in place and says what is still wrong with it."""
        return judge.judge(answer, asked, trace, self._escaper.restore)

    def restorer(self) -> Callable[[str], str]:
        """Escaper.restore for text that comes in pieces."""
        return self._escaper.restorer()

    def bounded(self, asked: Request, trace: Trace) -> Request:
        """The request with max_tokens cut to what the budget still has."""
        budget = asked.options.token_budget
        if budget is None:
            return asked
        left = max(1, budget - trace.completion_tokens)
        key = "max_completion_tokens" if "max_completion_tokens" in asked.body else "max_tokens"
        return asked.changed(**{key: min(left, asked.body.get(key) or left)})

    def keep(self, answer: Answer) -> None:
        """Remembers what a client will not send back."""
        self._memory.keep(answer)

    def done(self, trace: Trace, failure: str | None) -> None:
        """An answer was given, or given up."""
        if self._on_answer is not None:
            self._on_answer(trace, failure)

    @staticmethod
    def _spent(options: HarnessOptions, trace: Trace) -> bool:
        return options.token_budget is not None and trace.completion_tokens >= options.token_budget
