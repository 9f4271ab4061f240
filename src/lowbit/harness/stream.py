"""One streamed answer. While nothing has been given to the caller, a failed try can be made again unseen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from lowbit.harness import feedback, guards
from lowbit.harness.answer import Answer, Gathered
from lowbit.harness.failures import HarnessError, InvalidOutput, Problem, UpstreamFailed
from lowbit.harness.request import Request
from lowbit.harness.splitter import Splitter
from lowbit.harness.thoughts import ThoughtSplitter
from lowbit.harness.trace import Trace

if TYPE_CHECKING:
    from lowbit.harness.harness import Harness

_LOOK_EVERY = 256  # characters between two looks for repetition


class Stream:
    """run() gives the chunks. What must be whole before it can be trusted (a call, JSON outside a grammar) comes when
    it is whole; other text comes as the model writes it."""

    def __init__(self, harness: Harness, asked: Request) -> None:
        self._harness, self._trace = harness, Trace()
        self._asked = harness.prepare(asked, self._trace)
        self._id, self._model, self._created = "", str(asked.body.get("model") or ""), int(time.time())
        self._given = False  # whether any text went out
        self._said: list[str] = []  # the text that went out
        self._restore = harness.restorer()
        self._space = ""  # with which the text begins: given with the first word, if there is one
        self._deadline = time.monotonic() + asked.options.seconds

    async def run(self) -> AsyncIterator[dict[str, Any]]:
        """Raises what Harness.complete raises; after the first chunk too, where nothing else is left."""
        try:
            if self._can_be_live():
                async for chunk in self._live():
                    yield chunk
            else:
                async for chunk in self._whole():
                    yield chunk
        except HarnessError as error:
            error.trace = self._trace
            self._harness.done(self._trace, error.code)
            raise

    def _can_be_live(self) -> bool:
        asked, upstream = self._asked, self._harness.upstream
        if asked.schema is not None:
            # Text that went out cannot be taken back: only of a server that is known to hold the schema.
            grammar = asked.options.on("grammar") and "grammar" in upstream.holds and "grammar" not in upstream.refused
            return grammar and asked.schema.whole_in_grammar and not asked.tools
        return asked.forced is None and not (asked.options.required and asked.tools)

    async def _live(self) -> AsyncIterator[dict[str, Any]]:
        gathered, asked = Gathered(), self._asked
        splitter = Splitter(asked.tools, asked.options.dialect if asked.options.on("rescue") else "")
        problem: Problem | None = None
        failed: UpstreamFailed | None = None
        self._trace.tries += 1
        try:
            async for chunk in self._flowing(gathered, splitter):
                yield chunk
        except UpstreamFailed as error:
            self._trace.add("upstream", error.code, error.message)
            if self._given:
                raise
            problem, failed = Problem(kind="upstream", detail=error.message), error
        answer = gathered.answer()
        self._trace.used(answer.usage)
        in_text = not answer.calls
        problem = problem or self._harness.judge(answer, asked, self._trace)
        # Text that went out cannot be taken back: a cut or repeating one ends as what it is.
        if problem is None or (self._given and not answer.calls and problem.kind in ("repetition", "truncated")):
            if in_text and answer.calls:  # found in the text: what else it holds is still to be said
                said = "".join(self._said)
                rest = answer.content[len(said) :] if answer.content.startswith(said) else ""
            else:
                rest = ("" if self._given else self._space) + self._restore(splitter.rest())
            for chunk in self._rest(answer, rest, problem):
                yield chunk
            return
        self._trace.add("retry", problem.kind, problem.detail)
        if self._given and (asked.schema is not None or not asked.options.on("retry")):
            raise InvalidOutput(problem, self._trace)
        if failed is None:
            self._asked = feedback.after_problem(asked, answer, problem, self._harness.upstream)
        # What is of no use to ask again goes to a fallback at once, where there is one.
        made = 1
        if failed is not None:
            again = feedback.after_refusal(asked, failed, self._harness.upstream, self._trace)
            useless = again is None or failed.after > self._left()  # or it could only be asked too early
            self._asked, made = (again or asked, asked.options.tries if useless else 1)
            await asyncio.sleep(0 if useless else failed.after)
        async for chunk in self._whole(made, failed or problem):
            yield chunk

    async def _flowing(self, gathered: Gathered, splitter: Splitter) -> AsyncIterator[dict[str, Any]]:
        """Chunks as they come, but for calls and what may be the beginning of one."""
        sent = feedback.shaped(self._asked, self._harness.upstream)
        looked = length = thoughts = 0
        thinking = ThoughtSplitter() if self._asked.options.on("rescue") else None
        stream = self._harness.upstream.stream(self._harness.bounded(sent, self._trace).body, self._left())
        async for chunk in stream:
            self._id = self._id or str(chunk.get("id") or "")
            self._model = str(chunk.get("model") or self._model)
            piece = gathered.add(chunk)
            told, thoughts = thoughts, len(gathered.reasoning)
            for thought in gathered.reasoning[told:]:
                yield self._chunk({"reasoning_content": thought})
            text, thought = thinking.feed(piece) if thinking else (piece, "")
            for chunk in self._split(splitter, text, thought):
                yield chunk
            length += len(piece) + sum(map(len, gathered.reasoning[told:]))
            if length - looked >= _LOOK_EVERY and self._asked.options.on("guard"):
                looked = length
                if guards.repetition("".join(gathered.content)) or guards.repetition("".join(gathered.reasoning)):
                    gathered.finish = "length"
                    await stream.aclose()  # type: ignore[attr-defined]
                    break
        if thinking:
            for chunk in self._split(splitter, *thinking.rest()):
                yield chunk

    def _split(self, splitter: Splitter, text: str, thought: str) -> list[dict[str, Any]]:
        """The chunks of a piece of thought, and of a piece of text so far as it can go out."""
        chunks = [self._chunk({"reasoning_content": thought})] if thought else []
        if text := self._restore(splitter.feed(text)):
            self._space += text if not self._given else ""
            if self._given or self._space.strip():
                chunks.append(self._text(text if self._given else self._space))
        return chunks

    async def _whole(
        self, made: int = 0, failed: Problem | UpstreamFailed | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """An answer asked for until it is valid, then given at once. made, failed: see Harness.until_valid."""
        answer = await self._harness.until_valid(self._asked, self._trace, self._deadline, made=made, failed=failed)
        response = answer.response
        self._id, self._model = self._id or str(response.get("id") or ""), str(response.get("model") or self._model)
        if answer.reasoning:
            yield self._chunk({"reasoning_content": answer.reasoning})
        for chunk in self._rest(answer, answer.content, None):
            yield chunk

    def _rest(self, answer: Answer, text: str, problem: Problem | None) -> list[dict[str, Any]]:
        """What is left to say: text, calls, the reason for the end, and what was done."""
        chunks = [self._text(text)] if text or not self._given else []
        chunks += [self._chunk({"tool_calls": [{"index": i} | c.as_json()]}) for i, c in enumerate(answer.calls)]
        finish = "tool_calls" if answer.calls else ("length" if problem else answer.finish)
        self._harness.keep(answer)
        self._harness.done(self._trace, problem.kind if problem else None)
        last = self._chunk({}) | {"choices": [], "lowbit": self._trace.as_json()}
        return [*chunks, self._chunk({}, finish), last | ({"usage": answer.usage} if answer.usage else {})]

    def _text(self, text: str) -> dict[str, Any]:
        # The role goes with the first text: a stream that says nothing can still be asked for again.
        delta = {"content": text} if self._given else {"role": "assistant", "content": text}
        self._given = True
        self._said.append(text)
        return self._chunk(delta)

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {
            "id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }  # fmt: skip

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())
