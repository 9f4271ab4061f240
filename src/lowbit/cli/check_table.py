"""The result of ``lowbit check`` as a table: what was looked at, and of each check whether it passed and what to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"pass": "green", "fail": "bold red", "n/a": "dim"}
_WIDTH = 160  # where there is no terminal to ask


def show(result: Mapping[str, Any], stream: IO[str]) -> None:
    """Prints a result of ``lowbit.check``, or of ``watch``."""
    console = Console(
        file=stream, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else _WIDTH
    )
    if "error" in result:
        console.print(_plain(f"{_clock()}cannot be checked: {result['error']}"))
        return
    members: dict[str, list[str]] = {}
    for member in result["members"]:
        members.setdefault(member["role"].replace("_", " "), []).append(member["path"])
    for role, paths in members.items():
        console.print(_plain(f"{role:14}{', '.join(paths)}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for found in result["checks"]:
        said = _plain(found["detail"])
        if found["advice"]:
            said.append(f"\n→ {_plain(found['advice']).plain}", style="bold")
        style = _STYLES[found["status"]]
        table.add_row(found["name"], Text(found["status"], style=style), said, style="dim" if style == "dim" else "")
    console.print(table)
    console.print(_plain(_summary(result)))


def _summary(result: Mapping[str, Any]) -> str:
    counts = {status: sum(found["status"] == status for found in result["checks"]) for status in _STYLES}
    line = f"{counts['pass']} passed, {counts['fail']} failed, {counts['n/a']} not applicable"
    if result.get("written"):
        line += f"; wrote {result['written']}"
    elif result["lock"] is None and result["passed"]:
        line += "; no lowbit.lock here: --write-lock makes one"
    if "ran" in result:
        line = f"{_clock()}{line}; ran {', '.join(result['ran']) or 'nothing'}"
    return line


def _clock() -> str:
    return time.strftime("%H:%M:%S  ")


def _plain(value: str) -> Text:
    """Text from a file: no markup, and no control characters to steer the terminal with."""
    return Text("".join(c if c.isprintable() else " " for c in value))
