"""From how many items on a machine of one's own is cheaper than a hosted model's batch.

Three ways to have the machine, each a fixed sum and a sum for each item:

    rented by the hour   loading the model           + seconds an item x the price
    rented all month     the price of all its hours  + nothing, up to what it can do in a month
    bought               what it cost                + energy an item

The volume n where ``fixed + each * n == hosted * n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.batch.costs import Cost

MONTH = 730.5  # hours: a twelfth of 365.25 days


@dataclass(frozen=True, kw_only=True)
class Way:
    """fixed: dollars; each: dollars an item; capacity: items at most, None where more time does more."""

    name: str
    fixed: float
    each: float
    capacity: float | None = None

    def per_thousand(self, items: float) -> float:
        return 1000 * (self.fixed / items + self.each)


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """items: from which on the way is cheaper; None where it never is. reason: why, in a few words."""

    way: Way
    model: str
    items: float | None
    seconds: float | None = None  # of the machine's work until then
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "way": self.way.name,
            "model": self.model,
            "items": self.items,
            "seconds": self.seconds,
            "reason": self.reason,
        }


def ways(cost: Cost) -> tuple[Way, ...]:
    """The ways to have this machine that its prices speak of."""
    work, machine = cost.work, cost.machine
    seconds = seconds_per_item(cost)
    if seconds is None:
        return ()
    power = None if work.joules is None else work.joules / max(work.seconds, 1e-9)

    def energy(time: float) -> float:
        return machine.energy(time, None if power is None else power * time)

    found = []
    if machine.price is not None:
        hour = machine.price / 3600
        loading = work.loading * hour + energy(work.loading)
        found.append(Way(name="rented by the hour", fixed=loading, each=seconds * hour + energy(seconds)))
        month = Way(
            name="rented all month", fixed=machine.price * MONTH, each=energy(seconds), capacity=MONTH * 3600 / seconds
        )
        found.append(month)
    if machine.bought is not None:
        found.append(Way(name="bought", fixed=machine.bought, each=energy(seconds)))
    elif machine.price is None and cost.energy_from is not None:
        found.append(Way(name="energy alone", fixed=energy(work.loading), each=energy(seconds)))
    return tuple(found)


def seconds_per_item(cost: Cost) -> float | None:
    """Seconds that an item takes, the loading apart; None where nothing was answered."""
    work = cost.work
    if work.per_item is not None:
        return work.per_item.value
    return (work.seconds - work.loading) / work.items if work.items and work.seconds > 0 else None


def break_even(cost: Cost) -> tuple[BreakEven, ...]:
    """Each way against each hosted model's batch."""
    seconds = seconds_per_item(cost) or 0.0
    hosted = [(found.price.name, found.batch_per_thousand.value / 1000) for found in cost.hosted]
    return tuple(_against(way, name, each, seconds) for way in ways(cost) for name, each in hosted)


def _against(way: Way, model: str, hosted: float, seconds: float) -> BreakEven:
    if hosted <= way.each:
        reason = "each item costs as much or more here"
        return BreakEven(way=way, model=model, items=None, reason=reason)
    items = way.fixed / (hosted - way.each)
    if way.capacity is not None and items > way.capacity:
        reason = f"it does {way.capacity:,.0f} items in a month at most, and {items:,.0f} would be needed"
        return BreakEven(way=way, model=model, items=None, reason=reason)
    return BreakEven(way=way, model=model, items=items, seconds=items * seconds)


def by_model(cost: Cost) -> tuple[tuple[Way, ...], list[tuple[str, tuple[BreakEven, ...]]]]:
    """The same as a table: the ways, and of each hosted model one entry for each of them."""
    rows: dict[str, list[BreakEven]] = {}
    for entry in break_even(cost):
        rows.setdefault(entry.model, []).append(entry)
    return ways(cost), [(model, tuple(entries)) for model, entries in rows.items()]


def volumes(cost: Cost, count: int = 49) -> Sequence[float]:
    """Volumes for a plot, evenly apart on a logarithmic axis: from a hundred items past all that breaks even."""
    far = [found.items for found in break_even(cost) if found.items]
    low, high = 2.0, min(10.0, max(5.0, *(len(str(int(items))) + 0.5 for items in far), 0.0))
    return [10 ** (low + (high - low) * i / (count - 1)) for i in range(count)]
