from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what these tests share beside this file


@pytest.fixture
def of_family(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A tiny model of a family, or of a layout of Gemma 4, with heads that llama.cpp turns in a quantized cache."""

    def make(family: str) -> Path:
        if family in ("llama", "qwen3"):
            folder = request.getfixturevalue(f"tiny_{family}")(head_dim=64)
        elif family == "gemma3":
            folder = request.getfixturevalue("tiny_gemma3")(head_dim=64, query_pre_attn_scalar=64)
        else:
            folder = request.getfixturevalue("tiny_gemma4")(family, head_dim=64, global_head_dim=128)
        return Path(folder)

    return make
