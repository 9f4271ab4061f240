"""The LiteRT-LM container: a .litertlm of one text model, which phones and ``litert-lm run`` open.

The matrices are symmetric integers of 2, 4 or 8 bits with a float32 scale a row (the mobile schema), exactly the codes
and scales of a checkpoint that has them; LiteRT's CPU kernels round what flows into a matrix to 8 bits, a token at a
time, as it runs (dynamic range). The graph is written here, in LiteRT's built-in operators (``tflite_decoder``), and
not by litert-torch, which wants torch, 2 GB and a typing-extensions of its own, and rounds the weights by its own rule.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lowbit import __version__, console
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.litertlm_file import flip
from lowbit.errors import BadOption, Unsupported
from lowbit.grid._channelwise import Channelwise
from lowbit.grid.base import Blocks
from lowbit.pack import litertlm_sections as sections
from lowbit.pack import tflite_decoder
from lowbit.pack.guide import Guide, refuse
from lowbit.pack.rows import plain_rows, row_slices
from lowbit.pack.tflite_model import Finished, Weight
from lowbit.partial import Partial, resumable
from lowbit.threads import in_order, keep_freed_memory, thread_count

RECIPE = "mobile_w8"
CONTEXT = 4096  # tokens that the caches hold unless another number is asked for
_SLICE_WEIGHTS = 1 << 20


def holds(grid: str) -> bool:
    return grid == "f32" or isinstance(grids.get(grid), Channelwise)


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
    context: int | None = None,
) -> int:
    """See containers.Container. context: tokens that the caches hold, at most what the model was trained for.

    Interrupted or killed, it leaves a partial file that the next call with the same arguments goes on with.
    """
    refuse(guide, "litert-lm")
    keep_freed_memory()
    context = _context(checkpoint, context)
    weights = {spec.name: _weight(spec, types[spec.name]) for spec in checkpoint.specs.values()}
    model = tflite_decoder.build(checkpoint.family.decoder(checkpoint.config), weights, context).finish()
    parts = sections.beside(checkpoint, context, max(n for n in tflite_decoder.PREFILL if n <= context))
    parts.append(sections.model(model.size))
    header, begins = sections.header(parts, checkpoint.config, f"{__version__} {file_type}")
    start = [(0, header), *((at, part.data) for at, part in zip(begins, parts, strict=True))]
    at = begins[-1]
    start[-1] = (at, model.flatbuffer)
    asked = {
        "lowbit": __version__,
        "start": hashlib.sha256(b"".join(data for _, data in start)).hexdigest(),
        "naive": naive,
        "source": [file.identity for file in checkpoint.files],
    }
    with resumable(out, at + model.size, start, checkpoint.specs, asked) as file:
        missing = [spec for spec in checkpoint.specs.values() if spec.name not in file.done]
        if file.done:
            console.log(f"{out}: going on, {len(file.done)} of {len(checkpoint.specs)} tensors are there")
        jobs = _jobs(checkpoint, missing, types, model, at, file, naive=naive)
        with (
            console.progress("Packing", sum(spec.n_rows * spec.shape[-1] for spec in missing), "weights") as bar,
            contextlib.closing(in_order(jobs, thread_count(threads))) as finished,
        ):
            for spec, rows, is_last in finished:
                bar.advance(rows * spec.shape[-1])
                if is_last:
                    file.finish_part(spec.name)
        if check is not None:
            file.sync()
            check(file.path)
    return at + model.size


def _context(checkpoint: Checkpoint, asked: int | None) -> int:
    most, least = checkpoint.config["max_position_embeddings"], min(tflite_decoder.PREFILL)
    context = min(most, CONTEXT) if asked is None else asked
    if not least <= context <= most:
        expected = f"{least} to {most:,} tokens, for which the model was trained"
        raise BadOption("bad value for context", found=context, expected=expected)
    return context


def _weight(spec: TensorSpec, kind: str) -> Weight:
    grid = grids.get(kind)
    if kind == "f32":
        return Weight(shape=spec.shape, bits=32)
    if not isinstance(grid, Channelwise) or len(spec.shape) != 2:
        raise Unsupported(
            "LiteRT-LM takes a matrix with one scale a row, or float32", where=spec.name, found=kind,
            expected="channelwise2, channelwise4, channelwise8 or f32", hint="--to compressed-tensors may hold it",
        )  # fmt: skip
    return Weight(shape=spec.shape, bits=grid.bits)


def _jobs(
    checkpoint: Checkpoint,
    specs: list[TensorSpec],
    types: Mapping[str, str],
    model: Finished,
    begin: int,
    file: Partial,
    *,
    naive: bool,
) -> Iterator[Callable[[], tuple[TensorSpec, int, bool]]]:
    """For each slice of each tensor, what encodes it and writes it, codes and scales, each to its place."""

    def job(spec: TensorSpec, start: int, stop: int) -> tuple[TensorSpec, int, bool]:
        codes, scales = _encoded(checkpoint, spec, types[spec.name], start, stop, naive=naive)
        place = model.places[spec.name]
        _put(file, begin + place.at, codes, start)
        if scales is not None and place.scales_at is not None:
            _put(file, begin + place.scales_at, scales, start)
        return spec, stop - start, stop == spec.n_rows

    for spec in specs:
        for start, stop in row_slices(spec, _SLICE_WEIGHTS):
            yield functools.partial(job, spec, start, stop)


def _put(file: Partial, at: int, rows: np.ndarray, start: int) -> None:
    """Rows of a tensor that begins at ``at``, of which these are the ones from ``start`` on."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    file.write(at + start * raw.shape[1], raw.reshape(-1).data)


def _encoded(
    checkpoint: Checkpoint, spec: TensorSpec, kind: str, start: int, stop: int, *, naive: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows as LiteRT has them: the codes' bytes and float32 scales, or float32 values and None."""
    grid = grids.get(kind)
    if not isinstance(grid, Channelwise):
        values = plain_rows(checkpoint, spec, start, stop)
        offset = np.float32(checkpoint.family.decoder(checkpoint.config).norm_offset) if spec.role == "norm" else 0
        return (values + offset).astype("<f4"), None
    blocks = None if naive else _own_codes(checkpoint, spec, grid, start, stop)
    if blocks is None:
        blocks = grid.quantize(plain_rows(checkpoint, spec, start, stop))
    assert blocks.scales is not None
    grids.check_finite(blocks.scales, f"{checkpoint.path}: {spec.name}")
    return flip(grid.pack_codes(blocks.codes[:, 0]), grid.bits), blocks.scales.astype("<f4")


def _own_codes(checkpoint: Checkpoint, spec: TensorSpec, grid: Channelwise, start: int, stop: int) -> Blocks | None:
    """The source's own codes and scales where they have a scale a row and the grid holds them, else None."""
    coded = checkpoint.coded_rows(spec.name, start, stop)
    if coded is None:
        return None
    source = grids.get(coded[0])
    return coded[1] if isinstance(source, Channelwise) and source.bits <= grid.bits else None
