from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

if TYPE_CHECKING:
    from served_model import Served

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "harness")]


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    from served_model import Served

    server = Served("smollm2-135m", "--ctx", "2048", "--slots", "2")
    yield server
    assert server.end() == 0
    assert server.process.stderr is not None
    server.process.stderr.close()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="-", max_retries=0, timeout=120) as found:
        yield found
