"""What the files of a folder define is found by their names, and one that misses its contract says so."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit import registry
from lowbit.errors import BadFile


class Animal(ABC):
    @abstractmethod
    def sound(self) -> str: ...


CAT = """
from test_registry import Animal
class Cat(Animal):
    name, legs = "house.cat", 4
    def sound(self): return "miaow"
"""
BAD = {
    "nothing": ("", "needs ANIMAL"),
    "another thing": ("ANIMAL = 3", "needs ANIMAL"),
    "without a method": (CAT.replace("def sound", "def noise") + "ANIMAL = {}", "sound"),
    "without an attribute": (CAT.replace(", legs = ", ", arms = ") + "ANIMAL = {}", "no legs"),
    "another name": (CAT.replace("house.cat", "lion") + "ANIMAL = {}", "is its file's; found lion; expected house_cat"),
    "no name": (CAT.replace("name, legs", "called, legs") + "ANIMAL = {}", "is its file's; expected house_cat"),
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    package = tmp_path / "animals"
    package.mkdir()
    for name in ("__init__", "base", "_shared", "also_shared"):
        (package / f"{name}.py").touch()
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def write(source: str) -> str:
        (package / "house_cat.py").write_text(source)
        (package / "also_shared.py").unlink()
        for name in [n for n in sys.modules if n.partition(".")[0] in ("animals", "test_registry")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
        importlib.invalidate_caches()
        return "animals"

    return write


def test_a_new_file_is_found_by_its_name(write: Callable[[str], str]) -> None:
    package = write(CAT + "ANIMAL = Cat()")
    found = registry.instances(package, "ANIMAL", Animal, has=("legs",))  # type: ignore[type-abstract]
    assert list(found) == ["house_cat"] and found["house_cat"].sound() == "miaow"


def test_classes_too(write: Callable[[str], str]) -> None:
    package = write(CAT + "ANIMAL = Cat")
    found = registry.classes(package, "ANIMAL", Animal, has=("legs",))  # type: ignore[type-abstract]
    assert found["house_cat"]().sound() == "miaow"


def test_files_that_others_share_define_none(write: Callable[[str], str], tmp_path: Path) -> None:
    package = write(CAT + "ANIMAL = Cat()")
    (tmp_path / "animals" / "also_shared.py").touch()
    importlib.invalidate_caches()
    with pytest.raises(BadFile, match=r"also_shared\.py needs ANIMAL"):
        registry.instances(package, "ANIMAL", Animal)  # type: ignore[type-abstract]
    found = registry.instances(package, "ANIMAL", Animal, shared=("also_shared",))  # type: ignore[type-abstract]
    assert list(found) == ["house_cat"]


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("how", [registry.instances, registry.classes])
def test_a_file_that_misses_its_contract_says_so(
    write: Callable[[str], str], fault: str, how: Callable[..., object]
) -> None:
    source, message = BAD[fault]
    package = write(source.format("Cat()" if how is registry.instances else "Cat") if "{}" in source else source)
    with pytest.raises(BadFile, match=message) as caught:
        how(package, "ANIMAL", Animal, has=("legs",))
    assert "house_cat" in str(caught.value)


def test_a_name_as_people_write_it_is_the_files() -> None:
    assert registry.file_name("llama.cpp") == registry.file_name("Llama-CPP") == "llama_cpp"
