"""What the containers share that are folders: config.json, safetensors in shards with an index, a tokenizer's files.

Tensors lie in Hugging Face's names and layout. Codes and scales are tensors of their own, so scales may be BF16, F16 or
F32; a scale that gives codes their exact values is stored in a dtype that holds it, and only others are rounded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowbit import __version__, console
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.safetensors_file import SafetensorsWriter
from lowbit.checkpoint.write import copy_side_files
from lowbit.errors import NotFound
from lowbit.files import write_json
from lowbit.pack import identify, lattice
from lowbit.pack.rows import plain_rows, row_slices
from lowbit.partial import PartialFolder, resumable_folder
from lowbit.threads import in_order, keep_freed_memory, thread_count

T = TypeVar("T")

CERTIFICATE = "certificate.json"
SHARD_BYTES = 5 * 10**9  # of a shard's tensors, as transformers and mlx-lm split them; a larger tensor is a shard
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SLICE_WEIGHTS = 1 << 20  # weights read at a time: 4 MiB of float32
_SAMPLED = 4  # matrices that are looked at for the dtype of scales
_WEIGHT_BYTES = 4  # at most, of any type


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of the folder: safetensors' dtype, and its bytes in arrays one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    arrays: Iterable[np.ndarray]


def write(
    checkpoint: Checkpoint,
    out: Path,
    *,
    config: Mapping[str, Any],
    parts_of: Callable[[TensorSpec], Iterator[Part]],
    names_of: Callable[[TensorSpec], Sequence[str]],
    written_by: str,
    asked: Mapping[str, object],
    check: Callable[[Path], None] | None,
) -> int:
    """Writes the folder whole or not at all, and returns the size of its safetensors in bytes.

    names_of: the tensors that ``parts_of`` will give for one of the model's. written_by: the safetensors' ``format``.
    asked: JSON, what else decides about the bytes. check: is given the whole folder before it takes its name.
    Interrupted or killed, it leaves a partial folder that the next call with the same arguments goes on with.
    """
    keep_freed_memory()
    asked = {
        "lowbit": __version__, "source": [file.identity for file in checkpoint.files], "format": written_by,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(), "asked": asked,
    }  # fmt: skip
    with resumable_folder(out, tuple(checkpoint.specs), asked, marker=CERTIFICATE) as partial:
        folder = partial.path
        if partial.done:
            console.log(f"{out}: going on, {len(partial.done)} of {len(checkpoint.specs)} tensors are there")
        shards = _shards(checkpoint.specs.values())
        weight_map: dict[str, str] = {}
        size = 0
        with console.progress("Packing", checkpoint.n_weights, "weights") as bar:
            for file_name, specs in shards.items():
                names = [name for spec in specs for name in names_of(spec)]
                weight_map |= dict.fromkeys(names, file_name)
                _write_shard(partial, folder / file_name, specs, names, written_by, parts_of, bar)
                size += (folder / file_name).stat().st_size
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / "model.safetensors.index.json", index)
        write_json(folder / "config.json", dict(config))
        write_tokenizer(folder, checkpoint)
        if check is not None:
            check(folder)
    return size


def _write_shard(
    partial: PartialFolder,
    path: Path,
    specs: Sequence[TensorSpec],
    names: Sequence[str],
    written_by: str,
    parts_of: Callable[[TensorSpec], Iterator[Part]],
    bar: console.Progress,
) -> None:
    """One file of tensors, from where an earlier run has left it."""
    with open(path, "r+b" if path.exists() else "w+b") as handle:
        writer = SafetensorsWriter(handle, names, {"format": written_by})
        missing = [spec for spec in specs if spec.name not in partial.done]
        for spec in specs[: len(specs) - len(missing)]:
            for name, dtype, shape in partial.done[spec.name]:
                writer.skip(name, dtype, tuple(shape))
            bar.advance(_n_weights(spec))
        writer.cut()
        for spec in missing:
            told = []
            for part in parts_of(spec):
                writer.add_parts(part.name, part.shape, part.dtype, part.arrays)
                told.append((part.name, part.dtype, part.shape))
            partial.finish_part(spec.name, handle, told)
            bar.advance(_n_weights(spec))
        partial.note(handle)
        writer.finish()


def each_slice(spec: TensorSpec, job: Callable[[int, int], T], threads: int | None) -> list[T]:
    """``job(start, stop)`` of slices of a tensor's rows, several at a time; results in the order of the rows."""
    jobs = (functools.partial(job, *rows) for rows in row_slices(spec, SLICE_WEIGHTS))
    return list(in_order(jobs, thread_count(threads)))


def float_part(checkpoint: Checkpoint, spec: TensorSpec, grid: str, preferred: str) -> Part:
    """A tensor that is not quantized, on the grid 'f16' or 'bf16'; on 'f32' without loss, in 16 bits where one of
    their dtypes holds every number, ``preferred`` before the other."""
    dtype = grid.upper() if grid != "f32" else _narrowest(checkpoint, spec, preferred)
    chosen = grids.get(dtype.lower())
    rows = (chosen.pack(chosen.quantize(plain_rows(checkpoint, spec, *r))) for r in row_slices(spec, SLICE_WEIGHTS))
    return Part(name=spec.name, dtype=dtype, shape=spec.shape, arrays=rows)


def scale_dtype(exact: Sequence[np.ndarray], others: Sequence[np.ndarray], preferred: str) -> str:
    """The dtype for a tensor's scales: ``preferred``, else another 16-bit one, else 'F32'. It holds every number of the
    float32 arrays ``exact`` as it is; ``others`` may be rounded, but not to Inf."""
    for dtype in (preferred, "F16", "BF16"):
        rounded = ((part, round_to(part, dtype)) for part in exact)
        fits = all(np.array_equal(part, held, equal_nan=True) for part, held in rounded)
        if fits and all(np.isfinite(round_to(part, dtype)).all() for part in others):
            return dtype
    return "F32"


def round_to(part: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to ``dtype``, float32 again; Inf where it is beyond it."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return part.astype(np.float16).astype(np.float32)
    return lattice.round_to(part, dtype)


def as_bytes(part: np.ndarray, dtype: str) -> np.ndarray:
    """float32 scales as stored in ``dtype``: uint8."""
    grid = grids.get(dtype.lower())
    return grid.pack(grid.quantize(part))


def preferred_dtype(checkpoint: Checkpoint, quantized: Sequence[str]) -> str:
    """'BF16' or 'F16', told from a sample of the tensors ``quantized``: a 16-bit source's own, but for BF16 values on
    scales that only F16 holds; of others BF16 where it holds their scales, as of training on BF16 ones, else F16."""
    picked = quantized[:: max(1, len(quantized) // _SAMPLED)][:_SAMPLED] or checkpoint.names[:1]
    return "F16" if any(_wants_f16(checkpoint, name) for name in picked) else "BF16"


def _wants_f16(checkpoint: Checkpoint, name: str) -> bool:
    n_rows = checkpoint.specs[name].n_rows
    rows = range(0, n_rows, max(1, n_rows // 16))
    coded = [checkpoint.coded_rows(name, row, row + 1) for row in rows]
    scales = [blocks.scales for _, blocks in filter(None, coded) if blocks.scales is not None]
    if scales:
        return not all(np.array_equal(round_to(s, "BF16"), s) for s in (s.astype(np.float32) for s in scales))
    sampled = np.concatenate([checkpoint.read_rows(name, row, row + 1) for row in rows])
    dtype = lattice.precision(sampled, checkpoint.info(name).dtype)
    if dtype == "F16":
        return True
    found = identify.identify(sampled, dtype)
    return found.scales != "bf16" if found else dtype != "BF16"


def _narrowest(checkpoint: Checkpoint, spec: TensorSpec, preferred: str) -> str:
    """The dtype that holds every value of the tensor in the fewest bits."""
    dtype = checkpoint.info(spec.name).dtype
    if dtype in ("BF16", "F16"):
        return dtype
    candidates = [preferred, *({"BF16", "F16"} - {preferred})]
    for rows in row_slices(spec, SLICE_WEIGHTS):
        part = plain_rows(checkpoint, spec, *rows)
        candidates = [kind for kind in candidates if np.array_equal(round_to(part, kind), part)]
    return candidates[0] if candidates else "F32"


def _shards(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """The tensors by file. Planned by the most they can take, as scales' dtypes show only when they are written."""
    groups: list[list[TensorSpec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        most = _WEIGHT_BYTES * _n_weights(spec)
        if groups[-1] and most > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(spec)
        room -= most
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _n_weights(spec: TensorSpec) -> int:
    return spec.n_rows * spec.shape[-1]


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The source's own files; those of a GGUF as transformers makes them. Raises NotFound."""
    if checkpoint.gguf_metadata() is None:
        copy_side_files(checkpoint.path, folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            hint = "Copy it from the model it was trained from, or save it there with save_pretrained"
            raise NotFound("no tokenizer.json", where=checkpoint.path, hint=hint)
        return
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        hint = "Run: pip install 'lowbit[train]', or pack from the Hugging Face folder"
        raise NotFound("transformers is needed for a GGUF's tokenizer", where=checkpoint.path, hint=hint) from error
    source = checkpoint.tokenizer_source
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
