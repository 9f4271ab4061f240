"""What memory there is, as other programs count it."""

from __future__ import annotations

import psutil
import pytest

from lowbit import memory


def test_memory_is_what_psutil_says() -> None:
    found = psutil.virtual_memory()
    assert memory.total_bytes() == pytest.approx(found.total, rel=0.01)
    available = memory.available_bytes()
    assert available is not None and 0.5 < available / psutil.virtual_memory().available < 2
