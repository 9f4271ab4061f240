from __future__ import annotations

import random

from lowbit.batch.items import Item
from lowbit.batch.order import arranged
from lowbit.batch.prefixes import WORTH


def item(rules: str, said: str) -> tuple[int, Item]:
    body = {"messages": [{"role": "system", "content": rules}, {"role": "user", "content": said}]}
    return 0, Item(custom_id=said, url="/v1/chat/completions", body=body)


def names(found: list[tuple[int, Item]]) -> list[str]:
    return [one.custom_id for _, one in found]


def test_like_beginnings_come_together_and_long_ones_first() -> None:
    a, b = "A" * 2 * WORTH, "B" * 2 * WORTH
    found = [item(b, "b1"), item(a, "a1"), item(b, "b22"), item(a, "a4444"), item("", "alone"), item(a, "a333")]
    assert [one.shared for _, one in arranged(found)] == [True] * 5 + [False]
    assert names(arranged(found)) == ["b22", "b1", "a4444", "a333", "a1", "alone"]


def test_nothing_is_lost_or_doubled() -> None:
    rng = random.Random(0)
    found = [item(rng.choice("xyz") * rng.randint(0, 3 * WORTH), f"{i} {'w' * rng.randint(0, 9)}") for i in range(200)]
    assert sorted(names(arranged(found))) == sorted(names(found))
    assert arranged([]) == []


def test_what_is_alike_keeps_its_order() -> None:
    found = [item("", f"{i}") for i in range(9)]
    assert names(arranged(found)) == names(found)
