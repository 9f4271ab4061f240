"""The reader of server-sent events against any bytes in any pieces."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.harness.failures import UpstreamFailed
from lowbit.harness.upstream import events

LINES = [
    b"data: {}\n", b"data:x\n", b"\n", b"\r\n", b"data: a\r\n", b": ping\n", b"event: x\n", b"data", b"data:", b"\r",
    b"id: 1\n", b"data: [DONE]\n\n", b"data: \xff\xfe\n\n", b"\x00",
]  # fmt: skip
RAW = st.lists(st.sampled_from(LINES) | st.binary(max_size=6), max_size=12).map(b"".join)


class Pieces:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def read(*pieces: bytes) -> list[bytes]:
    async def gather() -> list[bytes]:
        return [event async for event in events(Pieces(list(pieces)))]

    return asyncio.run(gather())


@given(RAW, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_events_are_the_same_however_they_are_cut(raw: bytes, cuts: list[int]) -> None:
    pieces, at, i = [], 0, 0
    while at < len(raw):
        pieces.append(raw[at : at + cuts[i % len(cuts)]])
        at, i = at + cuts[i % len(cuts)], i + 1
    assert read(*pieces) == read(raw)


def test_events_as_the_standard_has_them() -> None:
    assert read(b"data: a\n\ndata: b\r\n\r\n: comment\ndata:c\ndata: d\n\n") == [b"a", b"b", b"c\nd"]
    assert read(b"event: x\nid: 1\n\n\n\n") == []
    assert read(b"data: the end is missing") == [b"the end is missing"]


@pytest.mark.parametrize("unit", [b"x", b"data: x\n", b"data: x"])
def test_what_never_ends_is_given_up_in_bounded_memory_and_time(unit: bytes) -> None:
    async def endless() -> None:
        class Endless:
            async def iter_any(self) -> AsyncIterator[bytes]:
                for _ in range(5_000):
                    yield unit * (4096 // len(unit))

        async for _ in events(Endless()):
            pass

    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(UpstreamFailed):
            asyncio.run(endless())
        assert tracemalloc.get_traced_memory()[1] < 100 << 20 and time.process_time() - begin < 10
    finally:
        tracemalloc.stop()
