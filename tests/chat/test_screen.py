"""How a talk looks: columns where there is room, one below the other where there is not, plain text in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowbit.chat.screen import PipedScreen, TerminalScreen, plain
from lowbit.chat.speaker import Turn

NAMES = ["A: one.gguf", "B: two.gguf"]


def drawn(turns: list[Turn], width: int, names: list[str] = NAMES) -> str:
    shown = TerminalScreen(names)
    shown._console = Console(file=io.StringIO(), width=width, force_terminal=False)
    shown._console.print(shown._drawn(turns))
    return shown._console.file.getvalue()  # type: ignore[attr-defined]


def test_two_stand_side_by_side_where_there_is_room() -> None:
    turns = [Turn(text="Rome."), Turn(text="Paris.", notes=["repair: json repaired"])]
    wide = drawn(turns, 120).splitlines()
    assert any("Rome." in line and "Paris." in line for line in wide)
    assert any("json repaired" in line for line in wide)
    narrow = drawn(turns, 80).splitlines()
    assert not any("Rome." in line and "Paris." in line for line in narrow)
    order = [next(i for i, line in enumerate(narrow) if word in line) for word in ("A:", "Rome.", "B:", "Paris.")]
    assert order == sorted(order)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_is_too_long(width: int) -> None:
    turns = [Turn(text="word " * 90, thoughts="hm " * 30, notes=["retry: " + "long " * 30]) for _ in NAMES]
    assert max(len(line) for line in drawn(turns, width).splitlines()) <= width
    assert max(len(line) for line in drawn(turns[:1], width, NAMES[:1]).splitlines()) <= width


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    assert plain("a\x1b[2Jb\rc\u202ed\n\te") == "a [2Jb c d\n\te"
    assert "\x1b" not in drawn([Turn(text="\x1b[31mred"), Turn(notes=["\x1b]0;title\x07"])], 120)


def test_a_pipe_gets_text_alone() -> None:
    out, notes = io.StringIO(), io.StringIO()
    shown = PipedScreen(NAMES[:1], out, notes)
    turn = Turn(text="Ro")
    shown.show([turn], whole=False)
    assert out.getvalue() == "Ro"
    turn.text, turn.notes = "Rome.", ["guard: empty"]
    shown.show([turn], whole=True)
    assert out.getvalue() == "Rome.\n" and notes.getvalue() == "lowbit: A: one.gguf: guard: empty\n"


def test_a_pipe_gets_two_under_their_names() -> None:
    out = io.StringIO()
    shown = PipedScreen(NAMES, out, io.StringIO())
    turns = [Turn(text="Rome."), Turn(text="Paris.")]
    shown.show(turns, whole=False)
    shown.show(turns, whole=True)
    assert out.getvalue() == "[A: one.gguf]\nRome.\n[B: two.gguf]\nParis.\n\n"
