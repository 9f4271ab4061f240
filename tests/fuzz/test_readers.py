"""Every reader of strangers' files against changed files: a few hundred each here, a million with ``make fuzz``."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from fuzzing.readers import READERS, SHARES, Place, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit import console

EXAMPLES = int(os.environ.get("LOWBIT_FUZZ_EXAMPLES", "15"))  # for each share of a reader

# Hypothesis' own bytes shrink but are full of zeros; a seed's are spread over every decision.
CASES = st.binary(min_size=8, max_size=80) | st.integers(0, 2**32).map(lambda seed: random.Random(seed).randbytes(80))
ENOUGH = 500  # cases in which every reader has read one and refused one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    console.set_quiet(True)
    yield Place(tmp_path_factory.mktemp("fuzz"))
    console.set_quiet(False)


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_file_is_read_or_refused(place: Place, reader: str) -> None:
    ends: set[str] = set()

    @settings(
        max_examples=max(30, EXAMPLES * SHARES[reader]),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def check(data: bytes) -> None:
        ends.add(run_case(reader, data, place, memory=True))

    check()
    # Some readers refuse nineteen changes in twenty: thirty cases may well hold no other end.
    for seed in range(ENOUGH):
        if "read" in ends and len(ends) > 1:
            break
        ends.add(run_case(reader, random.Random(seed).randbytes(80), place, memory=False))
    assert "read" in ends and len(ends) > 1, f"the cases reach nothing but {sorted(ends)}"
