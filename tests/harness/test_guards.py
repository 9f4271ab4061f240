"""What counts as a loop, and what only looks like one."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lowbit.harness import HarnessOptions, guards, request
from lowbit.harness.answer import Answer, Call

PARAGRAPH = "The model goes on about the weather in Rome, which is fine and dry, and then it says all of it again. " * 7
ROWS = "\n".join(f"| {i} | {i * i} | {i**3} |" for i in range(200))

FINE = {
    "code": Path(guards.__file__).read_text(),
    "tests": Path(__file__).read_text(),
    "table of numbers": "| n | square | cube |\n|---|---|---|\n" + ROWS,
    "rule": "A heading\n" + "-" * 200,
    "matrix of zeros": "[\n" + "    [0, 0, 0, 0, 0, 0, 0, 0],\n" * 20,
    "csv": "\n".join(f"{i},{(i * 7919) % 1000},{i % 3}" for i in range(400)),
    "list": "\n".join(f"{i}. {word}" for i, word in enumerate(["apple", "pear", "plum", "fig", "lime", "kiwi"] * 3)),
    "statements": "\n".join(f"INSERT INTO t VALUES ({i}, {i * i});" for i in range(60)),
    "base64": base64.b64encode(random.Random(0).randbytes(3000)).decode(),
    "base64 of zeros": base64.b64encode(bytes(700)).decode(),
    "long number": "".join(random.Random(1).choices("0123456789", k=3000)),
    "a third": "1/3 = 0." + "3" * 500,
    "poem": "\n\n".join(f"Line one of verse {i},\nand line two, {w}\nRow, row, row your boat" for i, w in enumerate(
        ["so slow", "so far", "so deep", "so wide", "so old"])),
    "song": "\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer" for n in range(10, 0, -1)),
    "json": json.dumps([{"id": i, "name": f"user {i}", "ok": bool(i % 2)} for i in range(100)], indent=1),
    "refusal": "No. " * 5,
}  # fmt: skip
LOOPS = {
    "sentence": "Well. " + "I will do it now. " * 30,
    "word": "ha " * 400,
    "letters": "a" * 2000,
    "paragraph": "First.\n" + (PARAGRAPH[:1500] + "\n\n") * 5,
    "lines": "Let me check the file again.\nThe file is not there.\n" * 12,
    "counter": "".join(f"{i}. The user should be asked to confirm the order once more.\n" for i in range(1, 40)),
    "thinking": "".join(f"Wait, step {i}: let me reconsider the problem from the start.\n\n" for i in range(40)),
    "call": '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' * 20,
}


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_like_a_loop(name: str) -> None:
    text = FINE[name]
    for end in range(256, len(text) + 256, 256):  # as a stream is looked at
        assert guards.repetition(text[:end]) is None, text[:end][-200:]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found_wherever_it_stands(name: str) -> None:
    text = LOOPS[name]
    for cut in range(0, 40, 13):
        assert (found := guards.repetition(text[: len(text) - cut])) is not None and found.kind == "repetition"
    assert guards.repetition(text + "But then it went on with something else, and came to an end.") is None


def asked(*rounds: tuple[str, str, str], **options: Any) -> request.Request:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    for i, (name, arguments, result) in enumerate(rounds):
        call = {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": f"c{i}", "content": result}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "wait", "now")]
    return request.read({"messages": messages, "tools": tools}, HarnessOptions(**options))


LOOK, WAIT, NOW = ("look", '{"at": 1}', "nothing"), ("wait", "{}", "waited"), ("now", "{}", "12:00")


@pytest.mark.parametrize(
    "rounds, name, arguments, found",
    [
        ([LOOK, WAIT, LOOK, WAIT], "look", '{"at":1}', True),
        ([NOW, LOOK, WAIT, LOOK, WAIT], "look", '{"at": 1}', True),
        ([LOOK, WAIT, NOW, LOOK, WAIT, NOW], "look", '{"at": 1}', True),
        ([LOOK, WAIT, LOOK, WAIT], "now", "{}", False),
        ([LOOK, WAIT, LOOK, WAIT], "look", '{"at": 2}', False),
        ([LOOK, WAIT], "look", '{"at": 1}', False),
        ([LOOK, WAIT, (*LOOK[:2], "half of it"), WAIT], "look", '{"at": 1}', False),  # something moves
        ([LOOK, LOOK, LOOK, LOOK], "look", '{"at": 1}', False),  # that is identical_call's
    ],
)
def test_calls_that_go_round(rounds: list[tuple[str, str, str]], name: str, arguments: str, found: bool) -> None:
    answer = Answer(calls=[Call(name=name, arguments=arguments)])
    assert (guards.ping_pong(answer, asked(*rounds)) is not None) == found


def test_an_identical_call_counts_through_escapes_and_spelling() -> None:
    made = [("look", '{"b": 1, "a": "<\u200b|im_end|>"}', "x")] * 3
    answer = Answer(calls=[Call(name="look", arguments='{"a":"<|im_end|>","b":1}')])
    assert guards.identical_call(answer, asked(*made)) is not None
    assert guards.identical_call(answer, asked(*made[:2])) is None


@pytest.mark.parametrize(
    "text, found",
    [
        ("I will now call the look tool.", True),
        ("To find out, let me use look:", True),
        ("Let me call the function `now` to see.", True),
        ("I'll call you tomorrow.", False),
        ("I will use a knife.", False),
        ("I will now call the look tool. It was empty, so the answer is that there is nothing in the box.", False),
        ("The time is noon.", False),
    ],
)
def test_a_call_that_was_only_announced(text: str, found: bool) -> None:
    assert (guards.announced(Answer(content=text), asked()) is not None) == found
