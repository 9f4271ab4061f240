"""What a job cost on its machine, against what hosted models take for the same tokens.

The machine is paid for every second that the job took, whatever came of it: tries that failed, answers that were
thrown away and loading are in it. The hosted side is paid for each answered item once, as if it never failed there. So
where the two are near each other, the comparison leans towards the hosted model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowbit.errors import BadOption
from lowbit.harness.prices import Hosted, PriceFile
from lowbit.harness.spend import Price
from lowbit.measure.record import Figure, exact

_HOUR = 3600.0
_JOULES = 3.6e6  # of a kilowatt-hour


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine costs; None where it was not said.

    price:     US dollars for an hour, as a rented one has it
    bought:    US dollars that it cost, once
    watts:     that it draws while it works, at the wall
    kwh_price: US dollars for a kilowatt-hour
    """

    price: float | None = None
    bought: float | None = None
    watts: float | None = None
    kwh_price: float | None = None

    def __post_init__(self) -> None:
        for name in ("price", "bought", "watts", "kwh_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e9:
                raise BadOption(f"impossible {name} of the machine", found=value, expected="0 or more")
        if self.watts is not None and self.kwh_price is None:
            raise BadOption("watts without a price of energy", expected="--kwh-price, dollars for a kilowatt-hour")

    def __bool__(self) -> bool:
        """Whether anything was said."""
        return any(value is not None for value in (self.price, self.bought, self.kwh_price))

    def energy(self, seconds: float, joules: float | None) -> float:
        """Dollars for energy: of what was measured, else of the watts; 0 where neither is known."""
        if self.kwh_price is None:
            return 0.0
        if self.watts is not None:
            joules = self.watts * seconds
        return (joules or 0.0) / _JOULES * self.kwh_price

    def dollars(self, seconds: float, joules: float | None = None) -> float:
        """What so many seconds of work cost. What the machine cost to buy is not in it: see break_even."""
        return (self.price or 0.0) * seconds / _HOUR + self.energy(seconds, joules)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job took, measured or estimated.

    items:    answered, each once. failed: ended without an answer
    seconds:  of wall time while the job ran, all runs together; loading: of these, until the model answered
    prompt_tokens, completion_tokens: of the answers, as a hosted model would count them once
    spent_prompt_tokens, spent_completion_tokens: with the tries that failed
    joules:   by the processor's counters, None where there are none
    per_item: seconds an item, n the stretches of the run that its interval rests on; None where there were too few
    prompt_per_item, completion_per_item: tokens, n the items sampled, where they are estimated and not counted
    """

    items: int
    failed: int = 0
    seconds: float
    loading: float = 0.0
    prompt_tokens: int
    completion_tokens: int
    spent_prompt_tokens: int
    spent_completion_tokens: int
    joules: float | None = None
    per_item: Figure | None = None
    prompt_per_item: Figure | None = None
    completion_per_item: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class HostedCost:
    """Dollars of the whole job, and of a thousand items with an interval where the tokens are estimated."""

    price: Hosted
    online: float
    batch: float
    online_per_thousand: Figure
    batch_per_thousand: Figure

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.price.name,
            "provider": self.price.provider,
            "online": self.online,
            "batch": self.batch,
            "online_per_thousand": self.online_per_thousand.as_json(),
            "batch_per_thousand": self.batch_per_thousand.as_json(),
            "batch_price": "the file's" if self.price.said else "assumed: the usual discount",
        }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """dollars: of the work on its machine; None where the machine's price was not said. per_thousand: of its items,
    the loading apart; n == 1 where there is no interval. energy_from: "measured", "watts" or None."""

    machine: Machine
    work: Work
    dollars: float | None
    energy_dollars: float
    energy_from: str | None
    per_thousand: Figure | None
    hosted: tuple[HostedCost, ...]
    prices: PriceFile
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        work = self.work
        return {
            "items": work.items,
            "failed": work.failed,
            "seconds": work.seconds,
            "loading_seconds": work.loading,
            "seconds_per_item": work.per_item.as_json() if work.per_item else None,
            "tokens": {
                "prompt": work.prompt_tokens,
                "completion": work.completion_tokens,
                "prompt_with_failed_tries": work.spent_prompt_tokens,
                "completion_with_failed_tries": work.spent_completion_tokens,
            },
            "machine_price": asdict(self.machine),
            "dollars": self.dollars,
            "energy": {"joules": work.joules, "dollars": self.energy_dollars, "from": self.energy_from},
            "per_thousand": self.per_thousand.as_json() if self.per_thousand else None,
            "hosted": [found.as_json() for found in self.hosted],
            "prices": {"file": self.prices.path.name, "dated": self.prices.dated.isoformat()},
            "notes": list(self.notes),
        }


def cost(work: Work, machine: Machine, prices: PriceFile, names: Sequence[str] = ()) -> Cost:
    """What the work cost, and what it would have cost.

    names: of hosted models to compare with; all of the file where there are none

    Raises NotFound for a name that the file does not have.
    """
    for name in names:
        prices.of(name)
    chosen = [prices.hosted[name] for name in (names or prices.hosted)]
    hosted = sorted((_hosted(work, price) for price in chosen), key=lambda found: found.batch)
    source = _energy_from(machine, work)
    said = bool(machine) and (machine.price is not None or source is not None)
    return Cost(
        machine=machine,
        work=work,
        dollars=machine.dollars(work.seconds, work.joules) if said else None,
        energy_dollars=machine.energy(work.seconds, work.joules),
        energy_from=source,
        per_thousand=_per_thousand(work, machine) if said and work.items else None,
        hosted=tuple(hosted),
        prices=prices,
        notes=tuple(_notes(work, machine, source, hosted)),
    )


def _energy_from(machine: Machine, work: Work) -> str | None:
    if machine.kwh_price is None:
        return None
    return "watts" if machine.watts is not None else "measured" if work.joules is not None else None


def _hosted(work: Work, price: Hosted) -> HostedCost:
    tokens = (work.prompt_tokens, work.completion_tokens)
    return HostedCost(
        price=price,
        online=price.online.of(*tokens) / 1e6,
        batch=price.batch.of(*tokens) / 1e6,
        online_per_thousand=_hosted_thousand(work, price.online),
        batch_per_thousand=_hosted_thousand(work, price.batch),
    )


def _hosted_thousand(work: Work, price: Price) -> Figure:
    def of(prompt: float, completion: float) -> float:
        return (price.prompt * prompt + price.completion * completion) / 1000

    prompt, completion = work.prompt_per_item, work.completion_per_item
    if prompt is None or completion is None:
        items = max(work.items, 1)
        return exact(of(work.prompt_tokens / items, work.completion_tokens / items), "dollars", work.items)
    value, low, high = (of(*pair) for pair in (
        (prompt.value, completion.value), (prompt.low, completion.low), (prompt.high, completion.high)
    ))  # fmt: skip
    return Figure(value=value, low=low, high=high, unit="dollars", n=min(prompt.n, completion.n))


def _per_thousand(work: Work, machine: Machine) -> Figure:
    watts = None if work.joules is None else work.joules / max(work.seconds, 1e-9)

    def of(seconds: float) -> float:
        return 1000 * machine.dollars(seconds, None if watts is None else watts * seconds)

    found = work.per_item
    if found is None:
        return exact(of((work.seconds - work.loading) / work.items), "dollars")
    return Figure(value=of(found.value), low=of(found.low), high=of(found.high), unit="dollars", n=found.n)


def _notes(work: Work, machine: Machine, source: str | None, hosted: Sequence[HostedCost]) -> list[str]:
    found = []
    if machine.kwh_price is not None and source is None:
        found.append("The processor's energy counters cannot be read here: --watts says what the machine draws")
    if source == "measured":
        found.append("Energy is that of the processor packages alone; --watts counts the whole machine")
    if hosted and not all(entry.price.said for entry in hosted):
        found.append("* the price of a batch is assumed: the usual discount on the online price")
    if hosted:
        found.append(
            "Hosted: the tokens of each answer once, as this model counts them (others count up to a few tens of "
            "percent differently), without discounts for cached prompts"
        )
    if work.per_item is None and work.items:
        found.append("No interval: too few items were finished to tell how much their time varies")
    return found
