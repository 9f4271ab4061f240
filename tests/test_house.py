"""The order of the house: data walks down the list, imports point up it, and what is heavy stays out of sight."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.cli import VERBS

SOURCE = Path(lowbit.__file__).parent
# Each line may import itself and the lines above it.
ORDER = (
    ("errors", "units", "files", "partial", "console", "threads", "texts", "verbs", "registry", "memory", "launch"),
    ("compact", "record_file", "ray_cluster"),
    ("grid",),
    ("ggml",),
    ("compensate",),
    ("checkpoint",),
    ("recipe",),
    ("run",),
    ("harness",),
    ("train",),
    ("calibrate", "pack", "reference"),
    ("plan",),
    ("measure",),
    ("release",),
    ("model_server",),
    ("batch",),
    ("check",),
    ("imatrix",),
    ("inspect",),
    ("serve",),
    ("chat",),
    ("report",),
    ("ship",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line}
# train and pack meet in a checkpoint on disk.
APART = {("pack", "train")}
# Beside train, what runs models in torch.
TORCH = (SOURCE / "run" / "transformers.py", SOURCE / "run" / "_hf_model.py")
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "gguf",
    "xllamacpp",
    "jinja2",
    "rich",
    "huggingface_hub",
    "mlx",
    "mlx_lm",
    "httpx2",
    "ray",
)


def modules() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Absolute names of everything the file imports, inside functions too."""
    package = ("lowbit", *path.relative_to(SOURCE).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def wrong_imports(path: Path) -> list[str]:
    own = part(path)
    wrong = []
    for name in imported(path):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "lowbit" and other in RANK and (RANK[other] > RANK[own] or (own, other) in APART):
            wrong.append(name)
        if top == "torch" and own != "train" and path not in TORCH:
            wrong.append(name)
    return wrong


def test_every_part_has_its_place() -> None:
    here = {part(path) for path in modules()}
    assert here <= set(RANK), f"give these a line in ORDER: {sorted(here - set(RANK))}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_up(path: Path) -> None:
    assert not wrong_imports(path), f"{path}: {ORDER}"


def test_the_order_is_enforced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "pack").mkdir()
    path = tmp_path / "pack" / "gguf.py"
    for line, allowed in (
        ("from lowbit.train import data", False),
        ("from ..train import data", False),
        ("from lowbit import cli", False),
        ("def f():\n    import lowbit.measure", False),
        ("def f():\n    import torch.nn", False),
        ("from .. import errors", True),
        ("from . import recipe", True),
        ("from lowbit import __version__", True),
        ("import lowbit.checkpoint.families", True),
    ):
        path.write_text(line)
        assert (not wrong_imports(path)) == allowed, line


@pytest.mark.parametrize("words", [None, [], *([verb] for verb in VERBS)], ids=str)
def test_nothing_heavy_is_imported(words: list[str] | None) -> None:
    """``import lowbit`` and every ``--help``, each in an interpreter of its own."""
    call = (
        "import lowbit" if words is None else f"from lowbit.cli import main; assert main({[*words, '--help']!r}) == 0"
    )
    code = f"{call}\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stderr.split()) & set(HEAVY)
