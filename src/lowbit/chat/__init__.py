"""Talk to one artifact, or to two side by side: the reference and what ships."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowbit.harness import HarnessOptions
from lowbit.verbs import make_callable

if TYPE_CHECKING:
    from lowbit.chat.speaker import Speaker, Turn
    from lowbit.model_server import ModelOptions

_HELP = "/reset begins anew, /exit ends; so does an empty line"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """system: a message to begin with. context: tokens of it. max_tokens: of one answer. temperature: 0 is greedy.
    harness: bounds and layers."""

    system: str | None = None
    context: int = 2048
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    threads: int | None = None
    harness: HarnessOptions = field(default_factory=HarnessOptions)


def chat(targets: Sequence[str], *, prompt: str | None = None, options: ChatOptions | None = None) -> bool:
    """Talks in the terminal, or through pipes: a question a line, until an empty one or the end of the input.

    targets: one or two artifacts, packaged names or URLs of servers
    prompt:  asked once, instead

    Whether every question was answered. Raises NotFound, BadFile, BadOption, RuntimeFailed, KeyboardInterrupt.
    """
    return asyncio.run(_talk(targets, prompt, options or ChatOptions()))


async def _talk(targets: Sequence[str], prompt: str | None, options: ChatOptions) -> bool:
    from lowbit.chat.screen import screen
    from lowbit.chat.speaker import speaker

    request: dict[str, Any] = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    request["seed"] = options.seed
    more = {"system": options.system, "request": request, "harness": options.harness}
    answered = True
    async with contextlib.AsyncExitStack() as stack:
        entered = [
            await stack.enter_async_context(speaker(target, options=_model_options(options), **more))  # type: ignore[arg-type]
            for target in targets
        ]
        names = [one.name for one in entered]
        shown = screen([f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)] if names[1:] else names)
        lines = _Lines()
        while (question := prompt if prompt is not None else await lines.next()) and question != "/exit":
            if question == "/reset":
                for one in entered:
                    one.reset()
            elif question.startswith("/"):
                print(_HELP, file=sys.stderr)
            else:
                turns: list[Turn] = []
                async for turns in _together(entered, question):
                    shown.show(turns, whole=False)
                shown.show(turns, whole=True)
                answered = answered and not any(turn.failed for turn in turns)
            if prompt is not None:
                break
    return answered


async def _together(speakers: Sequence[Speaker], question: str) -> AsyncIterator[list[Turn]]:
    """All turns as they grow, at most ten times a second."""
    from lowbit.chat.speaker import Turn

    turns = [Turn() for _ in speakers]

    async def follow(i: int) -> None:
        async for turn in speakers[i].ask(question):
            turns[i] = turn

    tasks = [asyncio.create_task(follow(i)) for i in range(len(speakers))]
    try:
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, timeout=0.1)
            for task in done:
                task.result()
            yield turns
    finally:
        for task in tasks:
            task.cancel()


class _Lines:
    """Lines of standard input. They are read by a thread that nothing waits for, so that an interrupt ends the talk at
    once, and past Python's own buffer, whose lock such a thread would still hold when the interpreter ends."""

    def __init__(self) -> None:
        self._read, self._ended = b"", False

    async def next(self) -> str:
        """One line; empty at the end of the input. The prompt sign appears on a terminal only."""
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        while b"\n" not in self._read and not self._ended:
            piece = await self._piece()
            self._read, self._ended = self._read + piece, not piece
        line, _, self._read = self._read.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    async def _piece(self) -> bytes:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[bytes] = loop.create_future()

        def give(piece: bytes) -> None:
            if not found.done():
                found.set_result(piece)

        def read() -> None:
            try:
                piece = os.read(0, 65536)
            except OSError:
                piece = b""
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(give, piece)

        threading.Thread(target=read, daemon=True).start()
        return await found


def _model_options(options: ChatOptions) -> ModelOptions:
    from lowbit.model_server import ModelOptions

    return ModelOptions(context=options.context, slots=1, threads=options.threads)


make_callable(__name__)
