"""Another model: when it is asked, what it may cost, what is written down; and values of a type."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator
from scripted import Scripted

from lowbit.errors import BadFile, BadOption
from lowbit.harness import Fallback, Harness, HttpUpstream, InvalidOutput, Ledger, Price, UpstreamFailed, ask_async

BODY = {
    "messages": [{"role": "user", "content": "Hello"}],
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["a"]}}},
    "max_tokens": 100,
}
PRICE = Price(prompt=1.0, completion=2.0)


def complete(local: Scripted, fallback: Fallback) -> dict[str, Any]:
    return asyncio.run(Harness(local, fallbacks=[fallback]).complete(BODY))


def test_what_it_cost_is_booked_and_why_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "spend", 1.0)
    hosted = Fallback(Scripted('{"a": 1}'), price=PRICE, ledger=ledger, log=tmp_path / "log")  # type: ignore[arg-type]
    found = complete(Scripted("words"), hosted)
    assert found["lowbit"]["fallback"] == "scripted"
    assert ledger.spent == pytest.approx((10 * 1 + 5 * 2) / 1e6)
    line = json.loads((tmp_path / "log").read_text())
    assert line["reason"] == "the answer holds no JSON" and line["dollars"] == ledger.spent
    assert (line["prompt_tokens"], line["completion_tokens"], line["outcome"]) == (10, 5, "answered")
    assert "Hello" not in (tmp_path / "log").read_text()


def test_it_is_not_asked_while_the_tries_last(tmp_path: Path) -> None:
    other = Scripted('{"a": 1}')
    complete(Scripted("words", '{"a": 1}'), Fallback(other))  # type: ignore[arg-type]
    assert not other.sent


def test_the_cap_holds_over_restarts(tmp_path: Path) -> None:
    price = Price(prompt=0.0, completion=10_000.0)  # a dollar for the 100 tokens that a request may bring
    other = Scripted('{"a": 1}')
    costs = []
    for _ in range(3):
        ledger = Ledger(tmp_path / "spend", 1.04)
        try:
            complete(Scripted("words"), Fallback(other, price=price, ledger=ledger))  # type: ignore[arg-type]
        except UpstreamFailed as error:
            assert error.code == "spend_cap" and error.status == 402 and "$1.04" in error.message
        costs.append(ledger.spent)
    assert costs == [0.05, 0.05, 0.05] and len(other.sent) == 1  # 0.05 spent, and 0.99 is less than a request's dollar


def test_a_request_that_failed_stays_booked_at_its_worst(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "spend", 1.0)
    broken = Fallback(Scripted(UpstreamFailed("gone")), price=PRICE, ledger=ledger)  # type: ignore[arg-type]
    with pytest.raises(UpstreamFailed):
        complete(Scripted("words"), broken)
    assert ledger.spent >= 3 * 200 / 1e6
    ledger = Ledger(tmp_path / "other", 1.0)
    refused = UpstreamFailed("no such model", status=404, again=False)
    with pytest.raises(UpstreamFailed):
        complete(Scripted("words"), Fallback(Scripted(refused), price=PRICE, ledger=ledger))  # type: ignore[arg-type]
    assert ledger.spent == 0


def spend(path: Path, n: int) -> None:
    ledger = Ledger(path, 0.001)
    for _ in range(n):
        try:
            ledger.book(ledger.set_aside("m", 10), 7)
        except UpstreamFailed:
            return


def test_processes_share_the_cap(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=spend, args=(tmp_path / "spend", 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert 0.00099 <= Ledger(tmp_path / "spend", 0.001).spent <= 0.001


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1e4), st.floats(0, 1e4))
def test_prices_are_rounded_up(prompt: int, completion: int, p: float, c: float) -> None:
    cost, exact = Price(prompt=p, completion=c).of(prompt, completion), p * prompt + c * completion
    assert exact <= cost <= exact + 1 + exact * 1e-12


def test_bad_ledgers_and_prices(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is not a database at all" * 50)
    with pytest.raises(BadFile):
        Ledger(tmp_path / "text", 1.0)
    with pytest.raises(BadOption):
        Ledger(tmp_path / "new", -1.0)
    with pytest.raises(BadOption):
        Price(prompt=-1, completion=0)
    for url in ("localhost:99", "ftp://host/v1", ""):
        with pytest.raises(BadOption):
            HttpUpstream(url)


FREE = {key: value for key, value in BODY.items() if key != "response_format"}


def streamed(local: Scripted, fallback: Fallback, **more: Any) -> list[dict[str, Any]]:
    async def go() -> list[dict[str, Any]]:
        return [chunk async for chunk in Harness(local, fallbacks=[fallback]).stream({**FREE, **more})]

    return asyncio.run(go())


@pytest.mark.parametrize(
    "local, tries",
    [
        (Scripted("", "", ""), 3),
        (Scripted(UpstreamFailed("gone")), 3),
        (Scripted(UpstreamFailed("the context is full", status=400, again=False)), 1),
    ],
    ids=["empty", "gone", "refused"],
)
def test_a_stream_ends_at_the_fallback(local: Scripted, tries: int) -> None:
    other = Scripted("Hello, Ann.")
    chunks = streamed(local, Fallback(other))  # type: ignore[arg-type]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert said == "Hello, Ann." and chunks[-1]["lowbit"]["fallback"] == "scripted"
    assert len(local.sent) == tries and len(other.sent) == 1 and chunks[-1]["lowbit"]["tries"] == tries + 1


def test_a_stream_without_retries_goes_to_the_fallback_at_once() -> None:
    local, other = Scripted(""), Scripted("Hello.")
    layers = {"lowbit": {"layers": ["guard", "fallback"]}}
    assert streamed(local, Fallback(other), **layers)[-1]["lowbit"]["fallback"] == "scripted"  # type: ignore[arg-type]
    assert len(local.sent) == 1


class Person(BaseModel):
    name: str
    age: int

    @field_validator("name")
    @classmethod
    def capital(cls, name: str) -> str:
        if not name[:1].isupper():
            raise ValueError("a name begins with a capital letter")
        return name


def test_a_pydantic_model_comes_back() -> None:
    upstream = Scripted('{"name": "ann", "age": 3}', '{"name": "Ann", "age": 3}')
    found = asyncio.run(ask_async(Harness(upstream), "Who?", output=Person))
    assert found.value == Person(name="Ann", age=3) and found.trace["tries"] == 2
    assert "a name begins with a capital letter" in upstream.sent[1]["messages"][-1]["content"]
    with pytest.raises(InvalidOutput, match="capital letter"):
        asyncio.run(ask_async(Harness(Scripted('{"name": "ann", "age": 3}')), "Who?", output=Person))
