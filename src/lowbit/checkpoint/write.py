"""Writing the checkpoint where training and packing meet: float values, and the codes and scales they came from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint.gguf_file import write_header
from lowbit.checkpoint.model import BLOCKS, FORMAT, MANIFEST, METADATA, Checkpoint
from lowbit.checkpoint.safetensors_file import SafetensorsWriter, write_files
from lowbit.errors import BadFile
from lowbit.files import cannot_write, replacing, write_json

# What belongs to a tokenizer or to generation in a Hugging Face folder; copied as it is.
_SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor to write.

    values: float32 in Hugging Face's layout and shape. grid: the name of the grid that it lies on, or None.
    blocks: with a grid, its packed bytes, uint8 (rows, row_bytes) in the same row order; ``values`` are what the
    grid dequantizes them to.
    """

    name: str
    values: np.ndarray
    grid: str | None = None
    blocks: np.ndarray | None = None


def write_checkpoint(
    folder: str | Path, like: Checkpoint, tensors: Iterable[Tensor], *, notes: Mapping[str, Any] | None = None
) -> Path:
    """Writes a folder that ``open_checkpoint`` and transformers read: config.json, model.safetensors (F32),
    blocks.safetensors (packed bytes under the same names), lowbit.json, and the tokenizer's files or metadata.gguf.

    ``tensors`` must give every name of ``like`` once, in any order; they are written as they come. lowbit.json, which
    says ``notes`` besides, is written last: a folder without it is not whole. Raises CannotWrite, or BadFile where a
    tensor does not fit.
    """
    folder = Path(folder)
    manifest: dict[str, Any] = {"format": FORMAT, "source": _source(like), **(notes or {}), "tensors": {}}

    def fill(writers: dict[str, SafetensorsWriter]) -> None:
        for tensor in tensors:
            _check(tensor, like, manifest["tensors"])
            writers["values"].add(tensor.name, np.asarray(tensor.values, dtype=np.float32), "F32")
            if tensor.grid is not None and tensor.blocks is not None:
                writers["blocks"].add(tensor.name, tensor.blocks, "U8")
            manifest["tensors"][tensor.name] = {"grid": tensor.grid}
        missing = [name for name in like.names if name not in manifest["tensors"]]
        if missing:
            raise BadFile("a tensor was not given", where=f"{folder}: {missing[0]}", found=f"{len(missing)} missing")
        # The new files are about to take their names; until then an earlier checkpoint in the folder stays whole.
        (folder / MANIFEST).unlink(missing_ok=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files({"values": folder / "model.safetensors", "blocks": folder / BLOCKS}, like.names, fill)
        config = {key: value for key, value in like.config.items() if key != "torch_dtype"}  # dtype's old spelling
        write_json(folder / "config.json", config | {"dtype": "float32"})
        _copy_tokenizer(folder, like)
        write_json(folder / MANIFEST, manifest)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _source(like: Checkpoint) -> dict[str, Any]:
    previous = like.manifest.get("source")
    return dict(previous) if isinstance(previous, dict) else {"name": like.name, "license": like.license}


def _check(tensor: Tensor, like: Checkpoint, written: dict[str, Any]) -> None:
    if tensor.name not in like or tensor.name in written:
        raise BadFile("a tensor is not the model's or was given twice", where=tensor.name)
    shape = like.info(tensor.name).shape
    if tuple(tensor.values.shape) != shape:
        raise BadFile("wrong shape", where=tensor.name, found=tuple(tensor.values.shape), expected=shape)
    if (tensor.grid is None) != (tensor.blocks is None):
        raise BadFile("grid and blocks go together", where=tensor.name)
    if tensor.grid is None or tensor.blocks is None:
        return
    grid = grids.get(tensor.grid)
    expected = (math.prod(shape[:-1]), grid.row_bytes(shape[-1]))
    if tensor.blocks.dtype != np.uint8 or tensor.blocks.shape != expected:
        found = f"{tensor.blocks.dtype} {tensor.blocks.shape}"
        raise BadFile(f"not {tensor.grid} blocks", where=tensor.name, found=found, expected=f"uint8 {expected}")


def _copy_tokenizer(folder: Path, like: Checkpoint) -> None:
    fields = like.gguf_metadata()
    if fields is not None:
        with replacing(folder / METADATA) as partial, open(partial, "wb") as handle:
            write_header(handle, fields, [])
        return
    copy_side_files(like.path, folder)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer and of generation from one Hugging Face folder to another."""
    for name in _SIDE_FILES:
        file = source / name
        if file.is_file() and file.resolve() != (folder / name).resolve():
            with replacing(folder / name) as partial:
                shutil.copyfile(file, partial)
