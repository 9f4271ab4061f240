"""A good release of a tiny real model, made once, and copies of it for tests to spoil."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import save_base

import lowbit


@pytest.fixture(scope="session")
def good_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a Q4_0 GGUF and an MLX folder of it with their certificates. Not to be changed."""
    root = tmp_path_factory.mktemp("release") / "good"
    root.mkdir()
    save_base(root / "base")
    lowbit.pack(root / "base", "q4_0", root / "model-q4_0.gguf", certificate=True)
    lowbit.pack(root / "base", "mlx_affine4_g32", root / "mlx", certificate=True)
    return root


@pytest.fixture
def release(good_release: Path, tmp_path: Path) -> Path:
    """A copy of the good release, to be spoiled."""
    return Path(shutil.copytree(good_release, tmp_path / "release"))
