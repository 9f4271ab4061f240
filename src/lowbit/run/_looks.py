"""What an artifact looks like, before anything opens it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.errors import BadConfig, LowbitError
from lowbit.run import is_url


def is_file_of(target: str | os.PathLike[str], suffix: str, magic: bytes) -> bool:
    """A file of that suffix, there or not, or one that begins with ``magic``?"""
    if is_url(target):
        return False
    path = Path(target)
    if path.suffix.lower() == suffix:
        return not path.is_dir()
    try:
        with open(path, "rb") as handle:
            return handle.read(len(magic)) == magic
    except OSError:
        return False


def folder_kind(target: str | os.PathLike[str]) -> str | None:
    """'mlx' for a folder quantized by or written for MLX ('mlx-plain': not quantized), 'hugging-face' for another with
    a config.json, None for what is none. A config.json that cannot be read is left to whoever opens it."""
    if is_url(target) or not (path := Path(target)).is_dir() or not (path / "config.json").is_file():
        return None
    config: dict[str, Any] = {}
    with contextlib.suppress(LowbitError):
        config = read_json(path / "config.json", BadConfig)
    if isinstance(config.get("quantization"), dict) and "bits" in config["quantization"]:
        return "mlx"
    if "quantization_config" not in config and _written_by_mlx(path):
        return "mlx-plain"
    return "hugging-face"


def _written_by_mlx(path: Path) -> bool:
    for file in sorted(path.glob("*.safetensors"))[:1]:
        with contextlib.suppress(LowbitError, OSError):
            return SafetensorsFile(file).metadata.get("format") == "mlx"
    return False
