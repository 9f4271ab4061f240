from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from batch_server import BatchServer


@pytest.fixture
def server() -> Iterator[BatchServer]:
    """A server in this process, in a thread of its own."""
    with BatchServer() as found:
        yield found
