"""The page of a batch: whole, escaped, and without a script."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lowbit.batch.agreement import Agreement, Pair, agreement
from lowbit.batch.costs import Machine, Work, cost
from lowbit.cli import cost_table
from lowbit.harness.prices import PriceFile, bundled
from lowbit.measure.record import Figure
from lowbit.report import batch_page

WORK = Work(
    items=1000, failed=3, seconds=412.0, loading=2.5, prompt_tokens=352_000, completion_tokens=9000,
    spent_prompt_tokens=360_000, spent_completion_tokens=9800,
    per_item=Figure(value=0.41, low=0.39, high=0.43, unit="s", n=20),
)  # fmt: skip
EVIL = '<script>alert("x")</script>'


def compared() -> Agreement:
    found = agreement(
        [Pair(custom_id=EVIL, question=EVIL, ours="no", reference=EVIL)] * 3, reference=EVIL, seed=1, population=9
    )
    assert found is not None
    return found


def made(machine: Machine, work: Work = WORK) -> str:
    return batch_page.render(EVIL, cost(work, machine, PriceFile.read(bundled())), compared())


@pytest.mark.parametrize(
    "machine", [Machine(), Machine(price=0.05), Machine(price=0.05, bought=600, watts=20, kwh_price=0.3),
                Machine(watts=20, kwh_price=0.3), Machine(price=0.0), Machine(price=1e6)],
)  # fmt: skip
def test_a_page_for_every_machine(machine: Machine) -> None:
    page = made(machine)
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert ("dollars for a thousand items" in page) == bool(machine)
    assert "gpt-5-nano" in page and "2026-11-09" in page


def test_nothing_answered() -> None:
    none = Work(items=0, seconds=1.0, prompt_tokens=0, completion_tokens=0, spent_prompt_tokens=0,
                spent_completion_tokens=0)  # fmt: skip
    assert "0 items answered" in made(Machine(price=1.0), none)


def test_it_is_written_whole(tmp_path: Path) -> None:
    found = cost(WORK, Machine(price=0.05), PriceFile.read(bundled()))
    batch_page.write(tmp_path / "page.html", "job", found, None, {"cpu": "a", "cores": 2, "os": "b"})
    text = (tmp_path / "page.html").read_text()
    assert text.rstrip().endswith("</html>") and "Measured on a, 2 cores" in text


def test_the_table_says_the_same() -> None:
    out = io.StringIO()
    cost_table.show(cost(WORK, Machine(price=0.05), PriceFile.read(bundled())), out, "a machine")
    said = out.getvalue()
    assert "$0.0057 [$0.0054, $0.0060]" in said and "0.41 s [0.39, 0.43] (95%, n = 20) an item on a machine" in said
    assert "rented all month" in said and "prices of 2026-11-09" in said
    cost_table.show(cost(WORK, Machine(), PriceFile.read(bundled())), out)
    assert "--machine-price" in out.getvalue()
