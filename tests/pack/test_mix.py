"""The knapsack against every choice tried, and mixes of a real file."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.pack.mix import solve

OPTIONS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(5, 200))
def test_no_choice_is_better(items: list[list[tuple[int, float]]], room: int) -> None:
    every = list(itertools.product(*(range(len(item)) for item in items)))
    size = {pick: sum(items[i][k][0] for i, k in enumerate(pick)) for pick in every}
    cost = {pick: sum(items[i][k][1] for i, k in enumerate(pick)) for pick in every}
    fitting = [pick for pick in every if size[pick] <= room]
    if not fitting:
        with pytest.raises(ValueError, match="fits"):
            solve(items, room)
        return
    picked = tuple(solve(items, room))
    assert size[picked] <= room
    assert cost[picked] == pytest.approx(min(cost[pick] for pick in fitting), abs=1e-9)


def test_many_tensors_of_odd_sizes_stay_within_the_room() -> None:
    """More units than fit: sizes are rounded up, so the room is kept, and little of it is wasted."""
    items = [[(10**7 + 7919 * i, 3.0), (2 * 10**7 + 104729 * i + 1, 1.0), (3 * 10**7 + i, 0.2)] for i in range(300)]
    room = 55 * 10**8
    picked = solve(items, room)
    used = sum(items[i][k][0] for i, k in enumerate(picked))
    assert room - 2 * 10**7 < used <= room
