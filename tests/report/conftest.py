"""The sample run's folder, and a browser to open its page in."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def sample() -> dict[str, Any]:
    """An invented record (see make_fixture.py), fresh for each test."""
    return json.loads((HERE / "sample-run.json").read_text(encoding="utf-8"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(HERE / "sample-run.json", folder / "lowbit.json")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("lowbit_tests_browser", HERE / "browser.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    executable = module.find()
    if executable is None:
        if os.environ.get("LOWBIT_REQUIRE_CHROMIUM") == "1":
            pytest.fail("LOWBIT_REQUIRE_CHROMIUM=1 and there is no Chromium")
        pytest.skip("no Chromium is installed")
    with module.Browser(executable) as opened:
        yield opened
