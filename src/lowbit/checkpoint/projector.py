"""A checkpoint's vision or audio towers and projector as named tensors: what goes into an mmproj."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.checkpoint import projectors
from lowbit.checkpoint.families.base import Family
from lowbit.checkpoint.folder_checkpoint import FolderCheckpoint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.projectors import preprocessor
from lowbit.checkpoint.resolve import resolve
from lowbit.errors import BadConfig, NotFound, Unsupported


class ProjectorCheckpoint(FolderCheckpoint):
    """The towers of an open Hugging Face folder. Made by ``open_projector``; a context manager."""

    def _read_config(self, path: Path) -> dict[str, Any]:
        config = super()._read_config(path)
        pixels: dict[str, Any] = {}
        sounds: dict[str, Any] = {}
        for name in preprocessor.FILES:
            if (path / name).exists():
                found = read_json(path / name, BadConfig)
                pixels |= _nested(found, "image_processor", otherwise=found)
                sounds |= _nested(found, "feature_extractor", otherwise={})
        return config | {preprocessor.KEY: pixels, preprocessor.SOUND_KEY: sounds}

    def _family(self, config: dict[str, Any], where: Path) -> Family:
        return projectors.by_config(config, where)

    def gguf_metadata(self) -> list[Field] | None:
        return None


def open_projector(model: str | Path) -> ProjectorCheckpoint:
    """Opens the vision or audio towers of ``model`` (see ``resolve``) and checks them whole: config, names, shapes,
    byte counts. Reads no tensor yet.

    Raises NotFound, BadFile, BadConfig or Unsupported (no such tower, or a GGUF).
    """
    path = resolve(model)
    if not path.is_dir():
        hint = "An mmproj is made from the folder with config.json and the weights"
        raise Unsupported("not a checkpoint folder", where=path, hint=hint)
    try:
        return ProjectorCheckpoint(path)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=error.filename or path) from error


def _nested(config: dict[str, Any], key: str, *, otherwise: dict[str, Any]) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else otherwise
