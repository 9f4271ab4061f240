"""From what a user calls a model to the open checkpoint, whatever container holds it."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint.folder_checkpoint import FolderCheckpoint
from lowbit.checkpoint.gguf_checkpoint import GgufCheckpoint
from lowbit.checkpoint.litertlm_checkpoint import LitertLmCheckpoint
from lowbit.checkpoint.litertlm_file import is_litertlm
from lowbit.checkpoint.model import Checkpoint
from lowbit.checkpoint.resolve import resolve
from lowbit.errors import NotFound


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens ``model`` (see ``resolve``) and checks it whole: config, names, shapes, byte counts. Reads no tensor yet.

    Raises NotFound, BadFile, BadConfig or Unsupported.
    """
    path = resolve(model)
    try:
        if is_litertlm(path):
            return LitertLmCheckpoint(path)
        return FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=error.filename or path) from error
