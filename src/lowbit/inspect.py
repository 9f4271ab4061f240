"""What is in a file or folder: architecture, tensors, types, bits per weight, and whether it lies on a lowbit grid."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.checkpoint import Checkpoint, open_checkpoint, resolve
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.litertlm_file import CONFIG, SCALES, LitertLmFile, is_litertlm
from lowbit.checkpoint.model import FORMAT, MANIFEST, read_json
from lowbit.checkpoint.packed import Scheme
from lowbit.checkpoint.projectors import Projector
from lowbit.checkpoint.safetensors_file import SafetensorsFile, open_folder, to_float32
from lowbit.checkpoint.schemes import scheme_of
from lowbit.checkpoint.tensor_file import Entry
from lowbit.errors import BadConfig, BadFile, LowbitError, NotFound, Unsupported
from lowbit.pack import identify
from lowbit.units import bits_per_weight
from lowbit.verbs import make_callable

Raw = Callable[[str], np.ndarray]  # a tensor's stored bytes by its name
_LONGEST_ROW = 1 << 20  # a longer one is no matrix of a model, and a sample of rows would be large

# What is shown of the size of a model: our name, GGUF's key after the architecture, config.json's.
_DIMENSIONS = (
    ("layers", "block_count", "num_hidden_layers"),
    ("hidden_size", "embedding_length", "hidden_size"),
    ("context_length", "context_length", "max_position_embeddings"),
)


def inspect(model: str | Path) -> dict[str, Any]:
    """What ``model`` is: a GGUF of any architecture, a .safetensors or .litertlm file, a Hugging Face folder, a hub
    id or a name.

    The result is JSON as it stands:
      path, kind ('gguf', 'litert-lm'; of folders 'safetensors', 'mlx' or 'compressed-tensors'), architecture (GGUF's
        word, 'llama'), name, license, tied;
      tensors: [{name, shape (row-major), dtype, bytes (of a matrix of MLX or compressed-tensors the weights' shape, the
        format, 'mlx_affine4_g32' or 'int4_g32', and the bytes of all parts); grid where the tensor has lowbit codes
        and scales; lattice where
        it is a matrix of BF16, F16 or F32: the 4-bit grid that its values sit on, told from a sample of its rows, or
        'none'}];
      types: {dtype: {count, weights, bytes}}; grids: {grid: tensors} of a checkpoint that lowbit trained; lattices:
        {lattice: tensors};
      weights, size_bytes (of the files with the tensors), bits_per_weight (the tensors' bytes only; None where
      weights are packed into integers in a way that lowbit does not know);
      layers, hidden_size, context_length, quantization as far as the file says;
      projectors: {'vision' or 'audio': its name in llama.cpp} of an mmproj, {} of another file, and projection_size,
        the hidden size of the text model that it belongs to;
      problem: why lowbit cannot work with it, or None.
    Raises NotFound, and BadFile where the file is truncated or its parts contradict each other.
    """
    path = resolve(model)
    try:
        if path.is_dir():
            found, entries, raw = _folder(path)
        elif path.suffix == ".safetensors":
            found, entries, raw = _safetensors(path)
        elif is_litertlm(path):
            found, entries, raw = _litertlm(path)
        else:
            found, entries, raw = _gguf(path)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=error.filename or path) from error
    found = {"path": _utf8(str(path))} | found | {"problem": None}
    grids: Mapping[str, str] = found.pop("_grids", {})
    countable = found["quantization"] is None or found["kind"] != "safetensors"
    if not found["projectors"]:  # an mmproj is no model of its own
        try:
            with open_checkpoint(path) as checkpoint:
                _add_checkpoint(found, checkpoint)
        except LowbitError as error:
            found["problem"] = _utf8(str(error))
    lattices = {name: lattice for name in entries if (lattice := _lattice(entries[name], raw, name)) is not None}
    return found | _summary(entries, grids, lattices, countable=countable)


def _gguf(path: Path) -> tuple[dict[str, Any], dict[str, Entry], Raw]:
    file = GgufFile(path)
    values, entries = file.values, file.entries
    architecture = _text(values.get("general.architecture"))
    found: dict[str, Any] = {
        "kind": "gguf",
        "architecture": architecture,
        "name": _text(values.get("general.name")) or _utf8(path.stem),
        "license": _text(values.get("general.license")),
        "tied": "token_embd.weight" in entries and "output.weight" not in entries,
        "size_bytes": path.stat().st_size,
        "quantization": None,
    }
    projectors = _projectors(values) if architecture == Projector.arch else {}
    prefix = f"{architecture}.{next(iter(projectors))}" if projectors else architecture
    found |= {ours: _size(values.get(f"{prefix}.{key}")) for ours, key, _ in _DIMENSIONS}
    found |= {"projectors": projectors, "projection_size": _size(values.get(f"{prefix}.projection_dim"))}
    if projectors:
        found["tied"] = None
    return found, entries, file.raw


def _projectors(values: Mapping[str, Any]) -> dict[str, str]:
    """The towers of an mmproj, as llama.cpp reads the keys: one name for all goes before a tower's own."""
    kinds = [kind for kind in ("vision", "audio") if values.get(f"clip.has_{kind}_encoder") is True]
    every = values.get("clip.projector_type")
    named = {kind: _text(every) or _text(values.get(f"clip.{kind}.projector_type")) for kind in kinds}
    return {kind: name for kind, name in named.items() if name}


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Entry], Raw]:
    file = SafetensorsFile(path)
    nothing = dict.fromkeys(("architecture", "license", "tied", "quantization", *(d[0] for d in _DIMENSIONS)))
    found: dict[str, Any] = {"kind": "safetensors", "name": _utf8(path.stem), "size_bytes": path.stat().st_size}
    found |= {**nothing, "projectors": {}, "projection_size": None}
    return found, file.entries, file.raw


def _litertlm(path: Path) -> tuple[dict[str, Any], dict[str, Entry], Raw]:
    file = LitertLmFile(path)
    scales = {name: entry.n_bytes for name, entry in file.entries.items() if name.endswith(SCALES)}
    entries = {
        name: replace(entry, n_bytes=entry.n_bytes + scales.get(name + SCALES, 0))
        for name, entry in file.entries.items()
        if name not in scales
    }
    nothing = dict.fromkeys(("architecture", "license", "tied", "quantization"))
    found: dict[str, Any] = {"kind": "litert-lm", "name": _utf8(path.stem), "size_bytes": path.stat().st_size}
    try:
        config = json.loads(file.header.entries.get(CONFIG, "{}"))
    except (ValueError, RecursionError):
        config = {}  # which is the checkpoint's problem, and told as that
    config = config if isinstance(config, dict) else {}
    found |= {**nothing, "projectors": {}, "projection_size": None}
    return found | {ours: _size(config.get(key)) for ours, _, key in _DIMENSIONS}, entries, file.raw


def _folder(path: Path) -> tuple[dict[str, Any], dict[str, Entry], Raw]:
    config = read_json(path / "config.json", BadConfig)
    files = open_folder(path)
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else config
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else None
    entries = {name: file.entries[name] for name, file in files.items()}
    kind = "mlx" if any(file.metadata.get("format") == "mlx" for file in files.values()) else "safetensors"
    with contextlib.suppress(Unsupported):  # which is the checkpoint's problem, and told as that
        if (scheme := scheme_of(config, path / "config.json")) is not None:
            kind, method = scheme.kind, "affine" if scheme.kind == "mlx" else method
            entries = _matrices(scheme, files, entries)
    found: dict[str, Any] = {
        "kind": kind,
        "architecture": _text(config.get("model_type")),
        "name": _utf8(path.resolve().name),
        "license": None,
        "tied": text["tie_word_embeddings"] if isinstance(text.get("tie_word_embeddings"), bool) else None,
        "size_bytes": sum(file.stat().st_size for file in {file.path for file in files.values()}),
        "quantization": _utf8(str(method)) if method is not None else None,
        "_grids": _trained_grids(path),
        "projectors": {},
        "projection_size": None,
    }
    found |= {ours: _size(text.get(key)) for ours, _, key in _DIMENSIONS}
    return found, entries, lambda name: files[name].raw(name)


def _matrices(scheme: Scheme, files: Mapping[str, SafetensorsFile], entries: dict[str, Entry]) -> dict[str, Entry]:
    """``entries`` with one for each matrix in the place of its codes, scales and the like: format, shape, all its
    bytes."""
    whole = dict(entries)
    for name in sorted(scheme.matrices(files)):
        kind, shape = scheme.describe(files, name)
        parts = [entries[part] for part in scheme.parts(name) if part in entries]
        for part in scheme.parts(name):
            whole.pop(part, None)
        whole[name] = Entry(kind, shape, parts[0].start, sum(part.n_bytes for part in parts))
    return whole


def _trained_grids(folder: Path) -> dict[str, str]:
    """Tensor name -> grid of a checkpoint that lowbit trained; empty for another folder."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = read_json(folder / MANIFEST, BadFile)
    tensors = manifest.get("tensors")
    if manifest.get("format") != FORMAT or not isinstance(tensors, dict):
        return {}
    grids = {name: entry.get("grid") for name, entry in tensors.items() if isinstance(entry, dict)}
    return {name: _utf8(grid) for name, grid in grids.items() if isinstance(grid, str)}


def _add_checkpoint(found: dict[str, Any], checkpoint: Checkpoint) -> None:
    """What only a family knows: it names the architecture, and whether the head is the embedding."""
    found["architecture"] = checkpoint.family.arch
    found["name"], found["license"] = _utf8(checkpoint.name), _text(checkpoint.license)
    found["tied"] = checkpoint.tied


def _summary(
    entries: Mapping[str, Entry], grids: Mapping[str, str], lattices: Mapping[str, str], *, countable: bool
) -> dict[str, Any]:
    tensors = []
    types: dict[str, dict[str, int]] = {}
    for name, entry in entries.items():
        tensor = {"name": _utf8(name), "shape": list(entry.shape), "dtype": entry.dtype, "bytes": entry.n_bytes}
        told = {"grid": grids, "lattice": lattices}
        tensors.append(tensor | {key: by_name[name] for key, by_name in told.items() if name in by_name})
        of_type = types.setdefault(entry.dtype, {"count": 0, "weights": 0, "bytes": 0})
        for key, amount in (("count", 1), ("weights", math.prod(entry.shape)), ("bytes", entry.n_bytes)):
            of_type[key] += amount
    weights = sum(of_type["weights"] for of_type in types.values())
    n_bytes = sum(of_type["bytes"] for of_type in types.values())
    return {
        "weights": weights if countable else None,
        "bits_per_weight": bits_per_weight(n_bytes, weights) if countable else None,
        "types": types,
        "grids": _counts(grids.values()),
        "lattices": _counts(lattices.values()),
        "tensors": tensors,
    }


def _lattice(entry: Entry, raw: Raw, name: str) -> str | None:
    """The lattice of a float matrix, from a sample of its rows; None for any other tensor."""
    if entry.dtype not in ("BF16", "F16", "F32") or len(entry.shape) < 2 or not math.prod(entry.shape):
        return None
    n_rows, n = math.prod(entry.shape[:-1]), entry.shape[-1]
    if n > _LONGEST_ROW:
        return identify.NONE
    picked = identify.sample(n_rows, n)
    stored = raw(name).reshape(n_rows, -1)[picked]
    return identify.describe(to_float32(stored.reshape(-1), entry.dtype, (len(picked), n), name), entry.dtype)


def _counts(items: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return _utf8(value) if isinstance(value, str) and value else None


def _utf8(text: str) -> str:
    """A GGUF's strings keep bytes that are not UTF-8; JSON cannot."""
    return text.encode("utf-8", "replace").decode()


make_callable(__name__)
