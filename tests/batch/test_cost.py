"""What a job cost, by sums that can be done by hand."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from lowbit.batch.break_even import MONTH, break_even, by_model, volumes, ways
from lowbit.batch.costs import Cost, Machine, Work, cost
from lowbit.errors import BadOption, NotFound
from lowbit.harness import Price
from lowbit.harness.prices import Hosted, PriceFile, bundled
from lowbit.measure.record import Figure

ONLINE, HALF = Price(prompt=1.0, completion=4.0), Price(prompt=0.5, completion=2.0)
CHEAP = Price(prompt=0.001, completion=0.001)
PRICES = PriceFile(
    path=Path("prices.toml"),
    dated=date(2026, 11, 1),
    models={"big": ONLINE, "tiny": CHEAP},
    hosted={
        "big": Hosted(name="big", provider="P", online=ONLINE, batch=HALF, said=True),
        "tiny": Hosted(name="tiny", provider="", online=CHEAP, batch=CHEAP, said=False),
    },
)


def work(**changes: object) -> Work:
    """1,000 items in an hour and 100 seconds of loading: 3.6 s an item, 300 + 10 tokens each."""
    values: dict[str, object] = {
        "items": 1000, "failed": 2, "seconds": 3700.0, "loading": 100.0, "prompt_tokens": 300_000,
        "completion_tokens": 10_000, "spent_prompt_tokens": 330_000, "spent_completion_tokens": 12_000,
    }  # fmt: skip
    return Work(**(values | changes))  # type: ignore[arg-type]


def of(machine: Machine, **changes: object) -> Cost:
    return cost(work(**changes), machine, PRICES)


def test_a_rented_machine_is_paid_for_all_of_its_time() -> None:
    found = of(Machine(price=0.36))
    assert found.dollars == pytest.approx(0.37)  # the loading and the tries that failed are in it
    assert found.per_thousand is not None and found.per_thousand.value == pytest.approx(0.36)  # a thousand without it


def test_energy_is_of_the_watts_or_measured() -> None:
    said = of(Machine(watts=100, kwh_price=0.30))
    assert said.dollars == pytest.approx(0.1 * 3700 / 3600 * 0.30) and said.energy_from == "watts"
    measured = of(Machine(kwh_price=0.30), joules=3.6e6)
    assert measured.dollars == pytest.approx(0.30) and measured.energy_from == "measured"
    assert any("processor packages" in note for note in measured.notes)
    unknown = of(Machine(kwh_price=0.30))
    assert unknown.dollars is None and unknown.per_thousand is None
    assert any("--watts" in note for note in unknown.notes)
    both = of(Machine(price=0.36, watts=100, kwh_price=0.30))
    assert both.dollars == pytest.approx(0.37 + 0.1 * 3700 / 3600 * 0.30)


def test_hosted_prices_count_each_answer_once() -> None:
    found = {entry.price.name: entry for entry in of(Machine()).hosted}
    assert found["big"].online == pytest.approx(0.34) and found["big"].batch == pytest.approx(0.17)
    assert found["big"].batch_per_thousand.value == pytest.approx(0.17)
    assert [entry.price.name for entry in of(Machine()).hosted] == ["tiny", "big"]  # the cheapest first
    assert any(note.startswith("*") for note in of(Machine()).notes)  # tiny's batch price is assumed
    assert cost(work(), Machine(), PRICES, ["big"]).hosted[0].price.name == "big"
    with pytest.raises(NotFound, match="huge"):
        cost(work(), Machine(), PRICES, ["huge"])


def test_intervals_of_what_was_measured_and_of_what_was_sampled() -> None:
    found = of(Machine(price=0.36), per_item=Figure(value=3.6, low=3.0, high=4.0, unit="s", n=20)).per_thousand
    assert found is not None and (found.low, found.high, found.n) == (pytest.approx(0.30), pytest.approx(0.40), 20)
    sampled = of(
        Machine(),
        prompt_per_item=Figure(value=300, low=290, high=310, unit="tokens", n=50),
        completion_per_item=Figure(value=10, low=5, high=20, unit="tokens", n=40),
    )
    big = sampled.hosted[1].batch_per_thousand
    assert (big.value, big.low, big.high) == pytest.approx((0.17, 0.155, 0.195)) and big.n == 40


def test_nothing_answered_has_no_cost_per_thousand() -> None:
    found = of(Machine(price=1.0), items=0, prompt_tokens=0, completion_tokens=0)
    assert found.dollars == pytest.approx(3700 / 3600) and found.per_thousand is None
    assert ways(found) == () and break_even(found) == ()


@pytest.mark.parametrize("values", [{"price": -1}, {"watts": 5}, {"price": float("nan")}, {"bought": 1e12}])
def test_impossible_machines(values: dict[str, float]) -> None:
    with pytest.raises(BadOption):
        Machine(**values)


def test_break_even_is_where_both_cost_the_same() -> None:
    found = of(Machine(price=0.036, bought=500, watts=100, kwh_price=0.30))
    entries = {(entry.way.name, entry.model): entry for entry in break_even(found)}
    each = {way.name: way for way in ways(found)}
    for entry in entries.values():
        if entry.items is not None and entry.items > 1:
            hosted = {"big": 0.17, "tiny": 0.00031}[entry.model]
            assert entry.way.per_thousand(entry.items) == pytest.approx(hosted)
            assert entry.seconds == pytest.approx(3.6 * entry.items)
    assert each["bought"].each == pytest.approx(0.1 * 0.001 * 0.30)  # 3.6 s of 100 W are 0.0001 kWh
    assert each["rented all month"].fixed == pytest.approx(0.036 * MONTH)
    assert entries["bought", "big"].items == pytest.approx(500 / (0.00017 - 0.00003))
    assert entries["bought", "tiny"].items is None and "as much or more" in entries["bought", "tiny"].reason


def test_a_month_ends() -> None:
    found = of(Machine(price=1.0))
    entry = next(e for e in break_even(found) if e.way.name == "rented all month" and e.model == "big")
    assert entry.items is None and "in a month at most" in entry.reason  # 730,500 items are needed and cost more
    assert entry.way.capacity == pytest.approx(MONTH * 1000)


def test_as_a_table_and_as_json() -> None:
    found = of(Machine(price=0.036, watts=100, kwh_price=0.30))
    columns, rows = by_model(found)
    assert [way.name for way in columns] == ["rented by the hour", "rented all month"]
    assert [(model, len(entries)) for model, entries in rows] == [("tiny", 2), ("big", 2)]
    said = found.as_json()
    assert said["prices"] == {"file": "prices.toml", "dated": "2026-11-01"}
    assert said["tokens"]["prompt_with_failed_tries"] == 330_000
    assert said["hosted"][1]["batch_price"] == "the file's"


def test_volumes_reach_past_what_breaks_even() -> None:
    found = of(Machine(price=0.036, bought=500, watts=100, kwh_price=0.30))
    at = volumes(found)
    assert at[0] == pytest.approx(100) and at[-1] > max(entry.items or 0 for entry in break_even(found))


def test_the_prices_that_come_with_lowbit() -> None:
    found = PriceFile.read(bundled())
    assert found.dated >= date(2026, 6, 1) and len(found.hosted) > 5
    assert found.hosted["gpt-5-nano"].batch == Price(prompt=0.025, completion=0.20)
    assert found.hosted["gpt-5-nano"].said and not found.hosted["google/gemma-3-12b-it"].said
