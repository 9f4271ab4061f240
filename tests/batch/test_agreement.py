"""The draw and what is said of two models' answers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.batch.agreement import Pair, agreement, draw, normal

FIELDS = ("sentiment", "topic")
ITEMS = [(number, f"row-{number}") for number in range(400)]


def pair(ours: Any, reference: Any, fields: tuple[str, ...] | None = FIELDS) -> Pair:
    ours, reference = (x if isinstance(x, str) else json.dumps(x) for x in (ours, reference))
    return Pair(custom_id="a", question="?", ours=ours, reference=reference, fields=fields)


def judged(*pairs: Pair) -> Any:
    return agreement(pairs, reference="big", seed=0, population=1000)


def test_the_draw_is_the_seed_s_and_grows() -> None:
    few, more = draw(ITEMS, 20, 7), draw(reversed(ITEMS), 50, 7)
    assert len(set(few)) == 20 and few == more[:20]  # a larger draw keeps what was asked already, in any order
    assert draw(ITEMS, 20, 8) != few
    assert sorted(draw(ITEMS, 1000, 7)) == [number for number, _ in ITEMS]


def test_the_draw_is_even() -> None:
    """Each of 400 items is drawn 50 times of 1,000 on average; a standard deviation is 6.9."""
    counts = Counter(number for seed in range(1000) for number in draw(ITEMS, 20, seed))
    assert len(counts) == 400 and max(abs(count - 50) for count in counts.values()) < 6 * 6.9
    halves = sum(count for number, count in counts.items() if number < 200)
    assert abs(halves - 10_000) < 5 * 70


def test_fields_are_judged_apart() -> None:
    found = judged(
        pair({"sentiment": "good", "topic": "Price"}, {"topic": "Price", "sentiment": "good"}),
        pair({"sentiment": "good", "topic": "price."}, {"sentiment": "good", "topic": " PRICE"}),
        pair({"sentiment": "bad", "topic": "price"}, {"sentiment": "good", "topic": "price"}),
        pair({"sentiment": "bad"}, {"sentiment": "bad", "topic": "price"}),
    )
    assert found.exact.value == 0.25 and found.normalised.value == 0.5  # order does not count
    assert found.fields["sentiment"].value == 0.75 and found.fields["topic"].value == 0.75
    assert [sample.fields for sample in found.samples] == [("sentiment",), ("topic",)]
    assert found.normalised.low < 0.5 < found.normalised.high and found.normalised.n == 4


def test_free_text_and_what_is_no_json() -> None:
    found = judged(pair("Yes.", "yes", None), pair("No", "yes", None), pair("no json", {"sentiment": "good"}))
    assert found.exact.value == 0 and found.normalised.value == pytest.approx(1 / 3)
    assert found.fields["sentiment"].value == 0


def test_wilson_s_interval() -> None:
    """80 of 100: 0.7111 to 0.8666."""
    found = judged(*[pair("a", "a" if i < 80 else "b", None) for i in range(100)])
    assert (found.exact.low, found.exact.high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert len(found.samples) == 20
    assert agreement([], reference="big", seed=0, population=0) is None


def test_samples_are_short_and_few() -> None:
    found = agreement([pair("x" * 9999, "y", None)] * 300, reference="big", seed=0, population=300)
    assert found is not None and len(found.samples) == 100 and len(found.samples[0].ours) == 2000
    json.dumps(found.as_json())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(json_values, json_values, st.booleans())
def test_whatever_two_models_say(ours: Any, reference: Any, is_text: bool) -> None:
    found = judged(pair(ours, reference, None if is_text else FIELDS))
    assert 0 <= found.exact.low <= found.exact.value <= found.exact.high <= 1
    assert found.normalised.value >= found.exact.value or not is_text
    assert normal(normal(ours)) == normal(ours)
    same = judged(pair(ours, ours, None if is_text else FIELDS))
    assert same.exact.value == same.normalised.value == 1 and not same.samples
