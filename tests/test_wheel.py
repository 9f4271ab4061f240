"""What `pip install lowbit` brings: every module and every data file, no tests, and no torch."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lowbit"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the build leaves nothing in the project and finds nothing of an earlier one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    done = subprocess.run([*command, source], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_every_file_of_the_package_is_in_it_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT / "src").as_posix() for path in files}
    found = {name for name in wheel.namelist() if not re.match(r"lowbit-[^/]+\.dist-info/", name)}
    assert found == expected
    for name in ("report/page.html", "report/page.css", "data/held-out.txt", "data/SOURCES.md", "py.typed"):
        assert f"lowbit/{name}" in found
    assert sum(name.endswith(".xz") for name in found) == 2


def test_the_files_are_the_projects(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        if name.startswith("lowbit/"):
            assert wheel.read(name) == (ROOT / "src" / name).read_bytes(), name


def test_what_it_needs(metadata: Message) -> None:
    needs = metadata.get_all("Requires-Dist") or []
    base = {re.split(r"[^\w.-]", need)[0].lower() for need in needs if "extra ==" not in need}
    train = {re.split(r"[^\w.-]", need)[0].lower() for need in needs if re.search(r"extra == ['\"]train['\"]", need)}
    assert {"numpy", "gguf", "safetensors", "huggingface_hub"} <= {name.replace("-", "_") for name in base}
    assert not {"torch", "transformers", "accelerate", "datasets"} & base
    assert {"torch", "transformers"} <= train


def test_the_command_and_the_licence(wheel: zipfile.ZipFile, metadata: Message) -> None:
    names = wheel.namelist()
    [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert "lowbit = lowbit.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert metadata["Name"] == "lowbit" and metadata["License-Expression"] == "Apache-2.0"
