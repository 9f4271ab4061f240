"""Safetensors in and out: a header checked before anything is believed, a map of the file, a tensor at a time.

The layout is eight bytes of header length (little endian), a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). A file from a stranger may lie in every one of these, so sizes
are compared with the file's before anything is allocated.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.checkpoint.tensor_file import Entry, TensorFile
from lowbit.errors import BadFile, NotFound, Unsupported
from lowbit.files import replacing

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_MAX_DIMS = 8
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_REDOWNLOAD = "Download or copy the file again"


class SafetensorsFile(TensorFile):
    """One open .safetensors file."""

    def __init__(self, path: Path) -> None:
        self.entries, self.metadata = read_header(path)
        super().__init__(path)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises BadFile where the header and the file disagree."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise BadFile("not a safetensors file", where=path, found=f"{size} bytes", hint=_REDOWNLOAD)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise BadFile(
                "the safetensors header does not fit in the file",
                where=path,
                found=f"a header length of {length:,} bytes",
                expected=f"at most {min(size - 8, MAX_HEADER_BYTES):,}",
                hint=_REDOWNLOAD,
            )
        text = handle.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadFile("the safetensors header is not JSON", where=path, found=error, hint=_REDOWNLOAD) from error
    if not isinstance(header, dict):
        raise BadFile("the safetensors header is not a JSON object", where=path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadFile("the safetensors __metadata__ is not a map of strings", where=path)
    data_start = 8 + length
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_tiling(path, entries, data_start, size)
    return entries, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    where = f"{path}: {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise BadFile("a header entry is not {dtype, shape, data_offsets}", where=where, hint=_REDOWNLOAD)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadFile("unknown dtype", where=where, found=repr(dtype)[:40], expected=", ".join(ITEM_BYTES))
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise BadFile("the shape is not a list of sizes", where=where, found=repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise BadFile("data_offsets is not [begin, end]", where=where, found=repr(offsets)[:80])
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != n_bytes:
        raise BadFile(
            "shape and byte count disagree",
            where=where,
            found=f"{offsets[1] - offsets[0]:,} bytes",
            expected=f"{n_bytes:,} for {dtype} {shape}",
            hint=_REDOWNLOAD,
        )
    return Entry(dtype, tuple(shape), data_start + offsets[0], n_bytes)


def _check_tiling(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> None:
    """The tensors must lie one after another and fill the file: no overlap, no hole, nothing past the end."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "leaves a hole before it"
            raise BadFile(f"a tensor {what}", where=f"{path}: {name}", hint=_REDOWNLOAD)
        position += entry.n_bytes
        if position > size:
            raise BadFile(
                "a tensor lies past the end of the file; it is truncated",
                where=f"{path}: {name}",
                found=f"{size:,} bytes",
                expected=f"at least {position:,}",
                hint=_REDOWNLOAD,
            )
    if position != size:
        raise BadFile("bytes after the last tensor", where=path, found=f"{size - position:,}", hint=_REDOWNLOAD)


def open_folder(folder: Path) -> dict[str, SafetensorsFile]:
    """Every tensor of a folder (model.safetensors, or the shards its index names) with the file that holds it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise _no_weights(folder, files)
        file = SafetensorsFile(files[0])
        return dict.fromkeys(file.entries, file)
    shards: dict[str, SafetensorsFile] = {}
    owners: dict[str, SafetensorsFile] = {}
    for name, shard in _weight_map(index).items():
        if shard not in shards:
            path = folder / shard
            if not path.is_file():
                raise NotFound("a shard is missing", where=path, hint=f"{index.name} names it; download it too")
            shards[shard] = SafetensorsFile(path)
        if name not in shards[shard].entries:
            raise BadFile("the index names a tensor that its shard lacks", where=f"{folder / shard}: {name}")
        owners[name] = shards[shard]
    for file in shards.values():
        for name in file.entries:
            if owners.get(name) is not file:
                raise BadFile(
                    "a shard holds a tensor that the index places elsewhere",
                    where=f"{file.path}: {name}",
                    found=f"{owners[name].path.name} in the index" if name in owners else "nothing in the index",
                    hint=_REDOWNLOAD,
                )
    return owners


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile("the shard index is not JSON with a weight_map", where=index, hint=_REDOWNLOAD) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile("weight_map is not a map of tensors to files", where=index)
    for shard in weight_map.values():
        # A shard is a plain name in this folder: an index must not reach outside it.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadFile("weight_map names a file outside the folder", where=index, found=repr(shard)[:80])
    return weight_map


def _no_weights(folder: Path, files: list[Path]) -> Exception:
    if files:
        return Unsupported(
            "several .safetensors files and no model.safetensors.index.json",
            where=folder,
            found=", ".join(f.name for f in files[:4]),
            hint="Download the index too, or save the model again with save_pretrained",
        )
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in sorted(folder.glob(pattern))]
    if pickles:
        return Unsupported(
            "weights are stored as pickle, which can run code when it is read",
            where=folder,
            found=", ".join(pickles[:4]),
            expected="model.safetensors",
            hint="Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    return NotFound("no weights in the folder", where=folder, expected="model.safetensors or a .gguf file")


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def to_float32(raw: np.ndarray, dtype: str, shape: tuple[int, ...], where: object) -> np.ndarray:
    """Stored bytes as a fresh float32 array of ``shape``. Exact for F32, F16 and BF16."""
    if dtype == "BF16":
        values = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32).view(np.float32)
    elif dtype in _NUMPY:
        with np.errstate(over="ignore", invalid="ignore"):  # whoever uses the values checks that they are finite
            values = raw.view(_NUMPY[dtype]).astype(np.float32)
    else:
        raise Unsupported(
            "the weights are not floating point", where=where, found=dtype, expected="F32, F16 or BF16",
            hint="lowbit starts from unquantized weights (or a GGUF)",
        )  # fmt: skip
    return values.reshape(shape)


class SafetensorsWriter:
    """Writes tensors in the order they come, one at a time, without knowing the last when the first is written.

    Room for the header is left at the front (its greatest length follows from the names that may come) and filled
    with the real header and spaces at the end, as the format allows.
    """

    def __init__(self, handle: Any, names: Iterable[str], metadata: dict[str, str]) -> None:
        self._handle, self._metadata, self._position = handle, metadata, 0
        self._entries: dict[str, Any] = {}
        worst = {name: _header_entry("BF16", (2**40, 2**40), 2**60, 2**60) for name in names}
        self._room = -(-len(self._encode(worst)) // 8) * 8
        handle.seek(0)
        handle.write(b"\0" * (8 + self._room))

    def skip(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Counts a tensor as added that lies in the file already, where ``add`` would put it."""
        n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        self._entries[name] = _header_entry(dtype, shape, self._position, self._position + n_bytes)
        self._position += n_bytes

    def cut(self) -> None:
        """Ends the file behind the tensors so far, where the next is added."""
        self._handle.truncate(8 + self._room + self._position)
        self._handle.seek(0, os.SEEK_END)

    def add(self, name: str, values: np.ndarray, dtype: str) -> None:
        """Appends one tensor; ``dtype`` is safetensors' name for the array's dtype."""
        if values.nbytes != values.size * ITEM_BYTES[dtype]:
            raise ValueError(f"{name}: {values.dtype} is not {dtype}")
        self.add_parts(name, values.shape, dtype, [values])

    def add_parts(self, name: str, shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> None:
        """Appends one tensor whose bytes come in several arrays, one after another."""
        n_bytes = 0
        for part in parts:
            data = np.ascontiguousarray(part)
            self._handle.write(data.view(np.uint8).data if data.size else b"")
            n_bytes += data.nbytes
        if n_bytes != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name}: {n_bytes} bytes are not {dtype} {shape}")
        self._entries[name] = _header_entry(dtype, shape, self._position, self._position + n_bytes)
        self._position += n_bytes

    def finish(self) -> None:
        header = self._encode(self._entries)
        self._handle.seek(0)
        self._handle.write(struct.pack("<Q", self._room) + header.ljust(self._room))

    def _encode(self, entries: dict[str, Any]) -> bytes:
        return json.dumps({"__metadata__": self._metadata, **entries}, separators=(",", ":")).encode("utf-8")


class Layout:
    """Where tensors lie in a file whose every shape is known before the first is written, so that they can be written
    in any order: ``offsets`` by name, from the file's start, and ``n_bytes`` of the whole file."""

    _METADATA = 256  # bytes that metadata may come to take

    def __init__(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """tensors: dtype, as safetensors calls it, and shape by name."""
        self._entries: dict[str, Any] = {}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + math.prod(shape) * ITEM_BYTES[dtype]
            self._entries[name] = _header_entry(dtype, shape, position, end)
            position = end
        self._room = -(-(len(self._encode({})) + self._METADATA) // 8) * 8
        self.offsets = {name: 8 + self._room + entry["data_offsets"][0] for name, entry in self._entries.items()}
        self.n_bytes = 8 + self._room + position

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """What the file begins with; of the same length whatever the metadata."""
        text = self._encode(metadata)
        if len(text) > self._room:
            raise ValueError(f"no room for metadata of {len(text)} bytes")
        return struct.pack("<Q", self._room) + text.ljust(self._room)

    def _encode(self, metadata: Mapping[str, str]) -> bytes:
        return json.dumps({"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")).encode("utf-8")


def _header_entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_files(
    paths: dict[str, Path],
    names: Iterable[str],
    fill: Callable[[dict[str, SafetensorsWriter]], None],
) -> None:
    """Opens a writer for each of ``paths``, lets ``fill`` add tensors, and puts all files in place when whole."""
    names = tuple(names)
    with contextlib.ExitStack() as stack:
        writers = {}
        for key, path in paths.items():
            partial = stack.enter_context(replacing(path))
            handle = stack.enter_context(open(partial, "wb"))
            writers[key] = SafetensorsWriter(handle, names, {"format": "pt"})
        fill(writers)
        for writer in writers.values():
            writer.finish()
