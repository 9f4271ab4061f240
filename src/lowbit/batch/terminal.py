"""What a batch's status looks like in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowbit.batch.probe import words
from lowbit.batch.progress import Status
from lowbit.units import format_duration

if TYPE_CHECKING:
    from lowbit.batch import Ran

_EVERY = 2.0  # seconds


def lines(status: Status) -> list[str]:
    """A line a fact; none longer than 80 columns but for long paths."""
    done = status.completed + status.failed + status.cancelled
    share = f"{100 * done / status.total:.1f}%" if status.total else "0%"
    found = [f"{status.source}: {status.state}, {done:,} of {status.total:,} items ({share})"]
    rows = [("completed", f"{status.completed:,}"), ("failed", f"{status.failed:,}{_kinds(status)}")]
    if status.cancelled:
        rows.append(("cancelled", f"{status.cancelled:,}"))
    if status.waiting or status.in_flight:
        rows.append(("waiting", f"{status.waiting:,}, and {status.in_flight:,} under way"))
    if status.per_second is not None and status.seconds_left:
        left = f"{format_duration(status.seconds_left)} left"
        rows.append(("rate", f"{status.per_second:.3g} items a second lately, {left}"))
    tokens = status.usage
    rows.append(("tokens", f"{tokens['prompt_tokens']:,} in, {tokens['completion_tokens']:,} out, all tries included"))
    if status.slots:
        rows.append(("at a time", words(status.slots)))
    rows += [("server", _server(told)) for told in status.servers]
    if status.runners:
        rows.append(("at work", ", ".join(f"pid {runner.pid}" for runner in status.runners)))
    return found + [f"  {name:<10} {text}" for name, text in rows]


def _server(told: dict[str, Any]) -> str:
    why = "" if told["state"] == "answers" else f", {told['state']}: {told['why']}"
    return f"{told['url']}: {told['answered']:,} answered, {told['slots']} at a time{why}"


def ended(ran: Ran) -> list[str]:
    """What is said when a run ends."""
    status = ran.status
    done = f"{status.completed + status.failed:,} of {status.total:,} items"
    if ran.stop in ("completed", "cancelled"):
        said = f"{status.completed:,} completed, {status.failed:,} failed{_kinds(status)}"
        said += f", {status.cancelled:,} cancelled" if status.cancelled else ""
        wrote = f"; wrote {ran.out}" if ran.out else "; no -o: `lowbit batch results` writes them"
        return [f"Batch {ran.stop}: {said}{wrote}", *([f"Errors: {ran.errors}"] if ran.errors else [])]
    why = "Time is up" if ran.stop == "budget" else "Stopped"
    return [f"{why}: {done} are done; the same command goes on from here"]


def watch(found: Callable[[], Status]) -> Status:
    """Prints the status again and again, over itself on a terminal, until the batch is done."""
    above = 0
    while True:
        status = found()
        text = lines(status)
        if sys.stdout.isatty():
            print((f"\x1b[{above}A\x1b[J" if above else "") + "\n".join(text), flush=True)
        else:
            print("\n".join(text), flush=True)
        if status.state in ("completed", "cancelled"):
            return status
        above = len(text)
        time.sleep(_EVERY)


def _kinds(status: Status) -> str:
    named = ", ".join(f"{count:,} {kind}" for kind, count in status.errors.items())
    return f" ({named})" if named else ""
