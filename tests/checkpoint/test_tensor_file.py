"""Reading at offsets: what the kernel is asked to fetch ahead, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.tensor_file import n_rows, pick_rows
from lowbit.units import MIB


@pytest.fixture
def file(tmp_path: Path) -> SafetensorsFile:
    """64 MiB of zeros, of which the disk holds nothing."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [64, MIB], "data_offsets": [0, 64 * MIB]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, path.stat().st_size + 64 * MIB)
    return SafetensorsFile(path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the kernel cannot be asked")
def test_every_byte_ahead_is_asked_for_once(file: SafetensorsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, at, n, advice: asked.append((at, at + n)))
    start = file.entries["x"].start
    for i in range(0, 20, 2):
        file.read("x", i * MIB, (i + 2) * MIB)
    assert asked[0] == (start + 2 * MIB, start + 18 * MIB)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(asked))
    assert asked[-1][1] == start + 36 * MIB
    file.read("x", 60 * MIB, 62 * MIB)  # a jump
    assert asked[-1] == (start + 62 * MIB, start + 78 * MIB)
    before = len(asked)
    file.read("x", 0, 1000)  # a sample
    assert len(asked) == before


def test_rows(file: SafetensorsFile) -> None:
    assert file.read_rows("x", 3, 5).shape == (2, MIB)
    assert (n_rows((4, 5, 6)), n_rows((7,))) == (20, 1)
    with pytest.raises(ValueError, match="x: bytes"):
        file.read_rows("x", 63, 65)


def test_picked_rows_are_read_as_one_range() -> None:
    whole, ranges = np.arange(24).reshape(12, 2), []

    def read(start: int, stop: int) -> np.ndarray:
        ranges.append((start, stop))
        return whole[start:stop]

    order = np.array([0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11])
    for start, stop in ((0, 12), (4, 8), (5, 6), (3, 3)):
        np.testing.assert_array_equal(pick_rows(order, start, stop, read), whole[order[start:stop]])
        np.testing.assert_array_equal(pick_rows(None, start, stop, read), whole[start:stop])
    assert ranges == [(0, 12), (0, 12), (4, 8), (4, 8), (6, 7), (5, 6), (3, 3), (3, 3)]
