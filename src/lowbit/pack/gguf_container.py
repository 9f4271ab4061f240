"""The GGUF container: which key-values it carries, and its tensors streamed a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowbit import ggml
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec, text, uint
from lowbit.checkpoint.gguf_file import Field, TensorHead, pad_to, write_header
from lowbit.errors import Unsupported
from lowbit.files import replacing
from lowbit.grid.base import Grid
from lowbit.pack import lattice, tokenizer

# llama.cpp's LLAMA_FTYPE_*: what `general.file_type` says a file mostly is.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q6_k": 18, "bf16": 32,
}  # fmt: skip
_GUESSED = 1024
_QUANTIZATION_VERSION = 2
_REPLACED = ("general.file_type", "general.quantization_version")
_SLICE_WEIGHTS = 1 << 22  # weights rounded at a time: 16 MiB of float32


def write(
    checkpoint: Checkpoint,
    types: Mapping[str, str],
    out: Path,
    *,
    file_type: str,
    naive: bool,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Writes the file whole or not at all and returns its size in bytes. ``types``: grid name by tensor name.

    check: is given the whole file before it takes its name, and may refuse it by raising.
    """
    fields = metadata(checkpoint, file_type)
    computed = checkpoint.family.computed(checkpoint.config)
    specs = list(checkpoint.specs.values())
    heads = [_head(spec, grids.get(types[spec.name])) for spec in specs]
    heads += [TensorHead(name, values.shape, grids.get("f32").ggml_type) for name, values in computed.items()]
    with replacing(out) as partial:
        with open(partial, "wb") as handle:
            offsets = write_header(handle, fields, heads)
            for spec, offset in zip(specs, offsets, strict=False):
                pad_to(handle, offset)
                for rows in encoded(checkpoint, spec, grids.get(types[spec.name]), naive=naive):
                    _put(handle, rows)
            for values, offset in zip(computed.values(), offsets[len(specs) :], strict=True):
                pad_to(handle, offset)
                _put(handle, values)
            size = handle.tell()
        if check is not None:
            check(partial)
    return size


def metadata(checkpoint: Checkpoint, file_type: str) -> list[Field]:
    """The file's key-values: a source GGUF's own, untouched but for the file type; else made from the HF folder."""
    own = [
        uint("general.quantization_version", _QUANTIZATION_VERSION),
        uint("general.file_type", FILE_TYPES.get(file_type, _GUESSED)),
    ]
    carried = checkpoint.gguf_metadata()
    if carried is not None:
        # A split source has been joined by now, so its split.* keys would lie.
        return [f for f in carried if f.key not in _REPLACED and not f.key.startswith("split.")] + own
    general = [
        text("general.architecture", checkpoint.family.arch),
        text("general.type", "model"),
        text("general.name", checkpoint.name),
    ]
    if checkpoint.license:
        general.append(text("general.license", checkpoint.license))
    vocab_size = checkpoint.info("model.embed_tokens.weight").shape[0]
    tokens = tokenizer.metadata(checkpoint.path, checkpoint.config, vocab_size)
    return general + checkpoint.family.metadata(checkpoint.config) + tokens + own


def encoded(checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Iterator[np.ndarray]:
    """The tensor's bytes as GGUF has them, uint8 (some rows, row_bytes), a slice of rows at a time."""
    order = spec.gguf_rows()
    if not naive and checkpoint.info(spec.name).grid == grid.name:
        blocks = checkpoint.blocks(spec.name)
        assert blocks is not None
        stored = grid.unpack(blocks)
        for part in (stored.scales, stored.mins):
            if part is not None:
                grids.check_finite(part, f"{checkpoint.path}: {spec.name}")
        # Blocks run along a row, so reordering rows moves whole rows of bytes and changes no block.
        yield blocks if order is None else blocks[order]
        return
    values = file_values(checkpoint, spec)
    recovers = grid.has_scales and not naive
    dtype = precision_of(checkpoint, spec, values) if recovers else "F32"
    step = max(1, _SLICE_WEIGHTS // values.shape[1])
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if recovers:
            # Quantization-aware training leaves values without their codes and scales. Where these cannot be found
            # again this is ordinary rounding.
            yield grid.pack(lattice.recover(part, dtype, grid)[0])
        else:
            yield ggml.quantize(part, grid.ggml_type) if naive else grid.pack(grid.quantize(part))


def file_values(checkpoint: Checkpoint, spec: TensorSpec) -> np.ndarray:
    """The tensor's values as the file means them: (rows, n) float32, a vector as one row; rows in the file's order and
    its offset added. Raises BadFile on NaN or Inf."""
    values = checkpoint.stored_values(spec.name)
    if values is None:
        values, order = checkpoint.read(spec.name), spec.gguf_rows()
        if order is not None:
            values = values[order]
        if spec.gguf_offset:
            with np.errstate(invalid="ignore"):
                values = values + np.float32(spec.gguf_offset)
    grids.check_finite(values, f"{checkpoint.path}: {spec.name}")
    return values.reshape(-1, values.shape[-1])


def precision_of(checkpoint: Checkpoint, spec: TensorSpec, values: np.ndarray) -> str:
    """What ``file_values`` are rounded to: 'BF16', 'F16' or 'F32'; after an offset it is F32."""
    return "F32" if spec.gguf_offset else lattice.precision(values, checkpoint.info(spec.name).dtype)


def _head(spec: TensorSpec, grid: Grid) -> TensorHead:
    if spec.shape[-1] % grid.block_size:
        raise Unsupported(
            f"rows are not a multiple of {grid.block_size}, which {grid.name} needs",
            where=spec.name, found=spec.shape[-1], hint="Choose a float recipe such as f16",
        )  # fmt: skip
    return TensorHead(spec.gguf_name, spec.shape, grid.ggml_type)


def _put(handle: BinaryIO, values: np.ndarray) -> None:
    handle.write(np.ascontiguousarray(values).view(np.uint8).data)
