"""The GGUF container: which key-values it carries, and its tensors streamed a slice of rows at a time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from lowbit import __version__, console, ggml
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec, text, uint
from lowbit.checkpoint.gguf_file import Field, TensorHead, write_header
from lowbit.checkpoint.tensor_file import pick_rows
from lowbit.errors import Unsupported
from lowbit.grid.base import Grid
from lowbit.pack import lattice, tokenizer
from lowbit.pack.guide import Encoder, Guide
from lowbit.pack.rows import file_rows, precision_of, row_slices
from lowbit.partial import Partial, resumable
from lowbit.threads import in_order, keep_freed_memory, thread_count

RECIPE = "q4_0"
# llama.cpp's LLAMA_FTYPE_*: what `general.file_type` says a file mostly is.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q4_k": 14, "q4_k_m": 15,
    "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "bf16": 32, "mxfp4": 38,
}  # fmt: skip
_GUESSED = 1024
_QUANTIZATION_VERSION = 2
_REPLACED = ("general.file_type", "general.quantization_version")
_SLICE_WEIGHTS = 1 << 20  # weights encoded at a time: 4 MiB of float32


def holds(grid: str) -> bool:
    return grids.get(grid).ggml_type is not None


def write(
    checkpoint: Checkpoint,
    types: Mapping[str, str],
    out: Path,
    *,
    file_type: str,
    naive: bool,
    threads: int | None = None,
    guide: Guide | None = None,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Writes the file whole or not at all and returns its size in bytes. ``types``: grid name by tensor name.

    Interrupted or killed, it leaves a partial file that the next call with the same arguments goes on with. The bytes
    do not depend on ``threads``. check: is given the whole file before it takes its name, and may refuse it by raising.
    """
    keep_freed_memory()
    workers = thread_count(threads)
    fields = metadata(checkpoint, file_type, guide)
    computed = checkpoint.family.computed(checkpoint.config)
    specs = checkpoint.specs
    heads = [_head(spec, grids.get(types[name])) for name, spec in specs.items()]
    heads += [TensorHead(name, values.shape, ggml.type_of(grids.get("f32"))) for name, values in computed.items()]
    header = io.BytesIO()
    offsets = write_header(header, fields, heads)
    start = [(0, header.getvalue())]
    start += [(at, values.tobytes()) for at, values in zip(offsets[len(specs) :], computed.values(), strict=True)]
    size = offsets[-1] + heads[-1].n_bytes
    asked = {
        "lowbit": __version__,
        "header": hashlib.sha256(start[0][1]).hexdigest(),
        "naive": naive,
        "guide": guide.identity if guide is not None else None,
        "source": [file.identity for file in checkpoint.files],
    }
    with resumable(out, size, start, specs, asked) as file:
        if file.done:
            console.log(f"{out}: going on, {len(file.done)} of {len(specs)} tensors are there")
        missing = [pair for pair in zip(specs.values(), offsets, strict=False) if pair[0].name not in file.done]
        jobs = _jobs(checkpoint, missing, types, file, naive=naive, guide=guide)
        with (
            threadpool_limits(1, "blas"),  # the slices are what runs side by side
            console.progress("Packing", sum(math.prod(spec.shape) for spec, _ in missing), "weights") as bar,
            contextlib.closing(in_order(jobs, workers)) as finished,
        ):
            for spec, rows, is_last in finished:
                bar.advance(rows * spec.gguf_shape[-1])
                if is_last:
                    file.finish_part(spec.name)
        if check is not None:
            file.sync()
            check(file.path)
    return size


def _jobs(
    checkpoint: Checkpoint,
    tensors: Iterable[tuple[TensorSpec, int]],
    types: Mapping[str, str],
    file: Partial,
    *,
    naive: bool,
    guide: Guide | None,
) -> Iterator[Callable[[], tuple[TensorSpec, int, bool]]]:
    """For each slice of each tensor, what encodes it and writes it from the tensor's offset on: gives its tensor, its
    rows, whether it is the last."""

    def job(spec: TensorSpec, encode: Encoder, at: int, start: int, stop: int) -> tuple[TensorSpec, int, bool]:
        raw = np.ascontiguousarray(encode(start, stop)).view(np.uint8)
        file.write(at + start * (raw.size // (stop - start)), raw.reshape(-1).data)
        return spec, stop - start, stop == spec.gguf_n_rows

    for spec, at in tensors:
        encode = encoder(checkpoint, spec, grids.get(types[spec.name]), naive=naive, guide=guide)
        least = guide.rows_at_least(spec) * spec.gguf_shape[-1] if guide is not None else 0
        for start, stop in row_slices(spec, max(_SLICE_WEIGHTS, least)):
            yield functools.partial(job, spec, encode, at, start, stop)


def header_bytes(checkpoint: Checkpoint, guide: Guide | None = None) -> int:
    """Bytes of the file before its tensors and of those that follow from the config; types change none of it."""
    computed = checkpoint.family.computed(checkpoint.config)
    heads = [TensorHead(spec.gguf_name, spec.gguf_shape, 0) for spec in checkpoint.specs.values()]
    heads += [TensorHead(name, values.shape, 0) for name, values in computed.items()]
    handle = io.BytesIO()
    write_header(handle, metadata(checkpoint, "mix", guide), heads)
    padded = -(-len(handle.getvalue()) // 32) * 32
    return padded + sum(-(-values.nbytes // 32) * 32 for values in computed.values())


def metadata(checkpoint: Checkpoint, file_type: str, guide: Guide | None = None) -> list[Field]:
    """The file's key-values: a source GGUF's own, untouched but for the file type; else made from the HF folder."""
    own = [
        uint("general.quantization_version", _QUANTIZATION_VERSION),
        uint("general.file_type", FILE_TYPES.get(file_type, _GUESSED)),
    ]
    own += guide.fields() if guide is not None else []
    carried = checkpoint.gguf_metadata()
    if carried is not None:
        # A split source has been joined by now, so its split.* keys would lie; so would another imatrix.
        dropped = ("split.", "quantize.imatrix.") if guide is not None else ("split.",)
        return [f for f in carried if f.key not in _REPLACED and not f.key.startswith(dropped)] + own
    general = [
        text("general.architecture", checkpoint.family.arch),
        text("general.type", checkpoint.family.gguf_type),
        text("general.name", checkpoint.name),
    ]
    if checkpoint.license:
        general.append(text("general.license", checkpoint.license))
    tokens: list[Field] = []
    if checkpoint.family.gguf_type == "model":
        vocab_size, spm_model = checkpoint.info("model.embed_tokens.weight").shape[0], checkpoint.family.spm_model
        tokens = tokenizer.metadata(checkpoint.path, checkpoint.config, vocab_size, spm_model=spm_model)
    return general + checkpoint.family.metadata(checkpoint.config) + tokens + own


def encoder(
    checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool, guide: Guide | None = None
) -> Encoder:
    """How a tensor's rows become bytes."""
    if guide is not None and (naive or checkpoint.info(spec.name).grid != grid.name):
        guided = guide.encoder(checkpoint, spec, grid, naive=naive)
        if guided is not None:
            return guided

    def values(start: int, stop: int) -> np.ndarray:
        return file_rows(checkpoint, spec, start, stop)

    if naive:
        return lambda start, stop: ggml.quantize(values(start, stop), ggml.type_of(grid), checked=True)
    if checkpoint.info(spec.name).grid == grid.name:
        return functools.partial(_stored, checkpoint, spec, grid)
    if not grid.has_scales:
        # The same bits from either; K-quants from the C library in a quarter of the time.
        if grid.block_size > 1 and ggml.is_installed():
            return lambda start, stop: ggml.quantize(values(start, stop), ggml.type_of(grid), checked=True)
        return lambda start, stop: grid.pack(grid.quantize(values(start, stop)))
    # Quantization-aware training leaves values without their codes and scales. Where these cannot be found again this
    # is ordinary rounding.
    dtype = precision_of(checkpoint, spec)
    return lambda start, stop: grid.pack(lattice.recover(values(start, stop), dtype, grid)[0])


def _stored(checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, start: int, stop: int) -> np.ndarray:
    def read(first: int, last: int) -> np.ndarray:
        blocks = checkpoint.block_rows(spec.name, first, last)
        assert blocks is not None
        return blocks

    # Blocks run along a row, so reordering rows moves whole rows of bytes and changes no block.
    raw = pick_rows(spec.gguf_rows(), start, stop, read)
    stored = grid.unpack(raw)
    for part in (stored.scales, stored.mins):
        if part is not None:
            grids.check_finite(part, f"{checkpoint.path}: {spec.name}")
    return raw


def _head(spec: TensorSpec, grid: Grid) -> TensorHead:
    if spec.gguf_shape[-1] % grid.block_size:
        raise Unsupported(
            f"rows are not a multiple of {grid.block_size}, which {grid.name} needs",
            where=spec.name, found=spec.gguf_shape[-1], hint="Choose a float recipe such as f16",
        )  # fmt: skip
    return TensorHead(spec.gguf_name, spec.gguf_shape, ggml.type_of(grid))
