"""A grid file is found by its name, and one that misses part of its contract says so."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lowbit import grid
from lowbit.errors import BadFile, BadOption, Unsupported

METHODS = """
    def quantize(self, x): return None
    def dequantize(self, blocks): return None
    def pack(self, blocks): return None
    def unpack(self, raw): return None
"""
GOOD = f"""
from lowbit.grid.base import Grid
class Mine(Grid):
    name, ggml_type, block_size, block_bytes = "mine", 99, 16, 8
{METHODS}
GRID = Mine()
"""
BAD = {
    "without GRID": (GOOD.replace("GRID = Mine()", ""), "needs GRID"),
    "GRID is a class": (GOOD.replace("Mine()", "Mine"), "needs GRID"),
    "without a method": (GOOD.replace("    def pack(self, blocks): return None\n", ""), "pack"),
    "without a variable": (GOOD.replace("name, ggml_type", "name, other"), "ggml_type"),
    "a type in words": (GOOD.replace("99", "'q4'"), "ggml_type; expected int or NoneType"),
    "another name": (GOOD.replace('"mine"', '"yours"'), "its file's; found yours; expected mine"),
    "codes on one side": (GOOD + "\nMine.max_code = 7\n", "run from below to above zero; found 0..7"),
    "codes beyond int8": (GOOD + "\nMine.min_code, Mine.max_code = -8, 255\n", "int8"),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    folder = tmp_path / f"grids_{abs(hash(request.node.name))}"
    folder.mkdir()
    for name in ("__init__", "base", "_helper"):
        (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(folder.name)


def test_a_new_file_is_a_new_grid(package: ModuleType) -> None:
    (Path(package.__path__[0]) / "mine.py").write_text(GOOD)
    found = grid.discover(package.__name__)
    assert list(found) == ["mine"]
    assert found["mine"].bits_per_weight == 4


def test_a_format_that_gguf_does_not_have(package: ModuleType) -> None:
    (Path(package.__path__[0]) / "mine.py").write_text(GOOD.replace("99", "None"))
    assert grid.discover(package.__name__)["mine"].ggml_type is None


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_misses_its_contract_says_so(package: ModuleType, fault: str) -> None:
    source, message = BAD[fault]
    (Path(package.__path__[0]) / "mine.py").write_text(source)
    with pytest.raises(BadFile, match=message) as caught:
        grid.discover(package.__name__)
    assert "mine" in str(caught.value.where)


def test_an_unknown_grid_is_refused_with_the_names() -> None:
    with pytest.raises(BadOption, match=r"'q3_x'; expected one of bf16, .*f16, f32, .*q4_0, .*q8_0"):
        grid.get("q3_x")
    with pytest.raises(Unsupported, match="no grid for this ggml type; found 11"):
        grid.by_ggml_type(11)
