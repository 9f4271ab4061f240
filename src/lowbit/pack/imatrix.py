"""Importance matrices in llama.cpp's files: of every input of every matrix, its mean square over a text.

Two forms are read and written: GGUF (``general.type`` imatrix; for a weight NAME the tensors NAME.in_sum2 and
NAME.counts) and the older .dat, which holds means times a number of chunks. Source: llama.cpp's
tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp. Files come from strangers: every
size is checked against the file before anything of that size is made.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import text, uint
from lowbit.checkpoint.gguf_file import MAGIC, Field, GgufFile, TensorHead, write_header
from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.files import replacing

FORMATS = ("gguf", "dat")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_F32 = 0
_MOST_COUNT = 2**53
_HINT = "lowbit imatrix and llama-imatrix make such files"
_OTHER_MODEL = "Is this imatrix of this very model? lowbit imatrix makes one"


@dataclass(frozen=True)
class Entry:
    """Of one weight: sums (n_mat, n) float32, the squares of its inputs summed; counts (n_mat,) int64, how many inputs
    each matrix has seen. A .dat file does not tell matrices apart: there n_mat is 1 and n all values."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Imatrix:
    """An importance matrix: ``entries`` by the weight's name in GGUF.

    name: of its file. datasets: what it was computed on, the oldest first. chunk_count: how many chunks of text.
    chunk_size: tokens a chunk; 0 in a .dat file, whose counts are of chunks.
    """

    name: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    @property
    def sha256(self) -> str:
        """Of the numbers and their names, as hex: equal for two that quantize alike."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.sums.shape}".encode("utf-8", "surrogateescape"))
            digest.update(entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def importance(self, name: str) -> np.ndarray | None:
        """The mean square of each input of a weight, float32 (n_mat, n); None where the file does not have it.

        As llama-quantize has it: 1 throughout for a matrix without inputs, such as an expert that was never chosen.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        counts = entry.counts[:, None].astype(np.float32)
        return np.where(counts > 0, entry.sums / np.maximum(counts, 1), np.float32(1))

    def importance_of(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """``importance``, (matrices, n) for a weight of this row-major shape, its leading dimensions stacked."""
        found = self.importance(name)
        return None if found is None else found.reshape(-1, shape[-1])

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raises BadFile unless this may be of ``checkpoint`` (see ``check_shapes``)."""
        self.check_shapes({spec.gguf_name: spec.shape for spec in checkpoint.specs.values()}, checkpoint.path)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], model: object) -> None:
        """Raises BadFile unless this may be of a model of these tensors: its weights are there in the sizes they need,
        and no layer is without. Single weights may lack, as what a graph does not use is not collected."""
        layers = set()
        for name, entry in self.entries.items():
            shape = shapes.get(name)
            if shape is None and not name.startswith("blk."):
                continue  # a head that is the embedding under another name, or a projector
            if shape is None or len(shape) < 2:
                what = f"the model {model} has no such weight"
                raise BadFile(what, where=f"{self.name}: {name}", hint=_OTHER_MODEL)
            n_values = math.prod(shape[:-2]) * shape[-1]
            if entry.sums.size != n_values:
                raise BadFile(
                    f"not the inputs of the model {model}",
                    where=f"{self.name}: {name}",
                    found=f"{entry.sums.size:,} values",
                    expected=f"{n_values:,}",
                    hint=_OTHER_MODEL,
                )
            layers.add(layer_of(name))
        for name, shape in shapes.items():
            if len(shape) > 1 and name.startswith("blk.") and layer_of(name) not in layers:
                what = f"nothing of layer {layer_of(name)} of the model {model}"
                raise BadFile(what, where=self.name, hint=_OTHER_MODEL)

    def fields(self) -> list[Field]:
        """What a GGUF that was quantized under it says of it."""
        found = [_short("quantize.imatrix.file", self.name)]
        found += [_short("quantize.imatrix.dataset", name) for name in self.datasets[:1]]
        found.append(uint("quantize.imatrix.entries_count", len(self.entries)))
        return found + [uint("quantize.imatrix.chunks_count", self.chunk_count)] * (self.chunk_count > 0)


def layer_of(gguf_name: str) -> int | None:
    """The number of the layer that a tensor of GGUF belongs to."""
    match = re.match(r"blk\.(\d{1,6})\.", gguf_name)
    return int(match[1]) if match else None


def read(path: str | Path) -> Imatrix:
    """Reads either form. Raises NotFound, and BadFile for anything that is not an importance matrix whole."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            magic = handle.read(len(MAGIC))
        return _read_gguf(path) if magic == MAGIC else _read_dat(path)
    except FileNotFoundError:
        raise NotFound("no such file", where=path, expected="an importance matrix", hint=_HINT) from None
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=path) from error


def write(imatrix: Imatrix, path: str | Path, *, format: str = "gguf") -> None:
    """Writes 'gguf' or 'dat', whole or not at all, as llama-imatrix does. Raises CannotWrite."""
    if format not in FORMATS:
        raise BadOption("no such format of an imatrix", found=repr(format), expected="one of " + ", ".join(FORMATS))
    content = _gguf_bytes(imatrix) if format == "gguf" else _dat_bytes(imatrix)
    with replacing(path) as partial:
        partial.write_bytes(content)


def combine(parts: Iterable[Imatrix], *, name: str, chunk_size: int) -> Imatrix:
    """All of them as if computed in one run with chunks of ``chunk_size`` tokens, which .dat files are taken to have.

    Raises BadFile where they are of models of different sizes, or too large to add.
    """
    entries: dict[str, Entry] = {}
    datasets: tuple[str, ...] = ()
    for part in parts:
        datasets += part.datasets
        factor = 1 if part.chunk_size else chunk_size
        for weight, entry in part.entries.items():
            with np.errstate(over="ignore"):  # _checked refuses what is too large
                sums, counts = entry.sums * np.float32(factor), entry.counts * factor
            earlier = entries.get(weight, Entry(np.zeros_like(sums), np.zeros_like(counts)))
            n_mat = max(len(counts), len(earlier.counts))
            if earlier.sums.size != sums.size or min(len(counts), len(earlier.counts)) not in (1, n_mat):
                found, expected = sums.shape, earlier.sums.shape
                raise BadFile("of another size than in the files before", where=f"{part.name}: {weight}",
                              found=found, expected=expected, hint="Combine files of one model")  # fmt: skip
            with np.errstate(over="ignore"):
                both = earlier.sums.reshape(n_mat, -1) + sums.reshape(n_mat, -1)
            entries[weight] = _checked(f"{part.name}: {weight}", both, np.broadcast_to(earlier.counts + counts, n_mat))
    most = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    count = min(most // chunk_size, 2**31 - 1)  # what the files have room for
    return Imatrix(name=name, entries=entries, datasets=datasets, chunk_count=count, chunk_size=chunk_size)


def _checked(where: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    """Raises BadFile unless these are sums of squares and how many they are of."""
    if not counts.size or not sums.size or sums.size % counts.size:
        found = f"{sums.size} sums, {counts.size} counts"
        raise BadFile("the sums are not of as many matrices as the counts", where=where, found=found)
    for what, values in (("sums", sums), ("counts", counts)):
        if not np.isfinite(values).all() or (values < 0).any():
            raise BadFile(f"the {what} are not all numbers from 0 on", where=where, hint="Compute the imatrix again")
    if counts.max() > _MOST_COUNT:
        raise BadFile("an impossible count", where=where, found=counts.max())
    return Entry(sums.reshape(len(counts), -1), np.rint(counts).astype(np.int64))


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    kind = file.values.get("general.type")
    if kind != "imatrix":
        raise BadFile("this GGUF is not an importance matrix", where=path, found=f"general.type {kind}", hint=_HINT)
    names = {n.removesuffix(s) for n in file.entries for s in (_SUMS, _COUNTS) if n.endswith(s)}
    entries = {}
    for name in sorted(names):
        for part in (name + _SUMS, name + _COUNTS):
            dtype = file.entries[part].dtype if part in file.entries else "nothing"
            if dtype != "F32":
                raise BadFile("not there as F32", where=f"{path}: {part}", found=dtype)
        sums, counts = (
            file.read(name + s, 0, file.entries[name + s].n_bytes).view("<f4").astype(np.float32)
            for s in (_SUMS, _COUNTS)
        )
        entries[name] = _checked(f"{path}: {name}", sums, counts)
    if not entries:
        raise BadFile("the importance matrix is empty", where=path)
    datasets = file.values.get(_DATASETS)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise BadFile("no list of datasets", where=f"{path}: {_DATASETS}", hint=_HINT)
    return Imatrix(
        name=path.name,
        entries=entries,
        datasets=tuple(datasets),
        chunk_count=_number(file, _CHUNKS, least=0),
        chunk_size=_number(file, _CHUNK_SIZE, least=1),
    )


def _number(file: GgufFile, key: str, *, least: int) -> int:
    found = file.values.get(key)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found < 2**31:
        raise BadFile("not a number of chunks or tokens", where=f"{file.path}: {key}", found=found, hint=_HINT)
    return found


def _gguf_bytes(imatrix: Imatrix) -> bytes:
    fields = [
        text("general.type", "imatrix"),
        Field(_DATASETS, list(imatrix.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING),
        uint(_CHUNKS, imatrix.chunk_count),
        uint(_CHUNK_SIZE, imatrix.chunk_size),
    ]
    heads, values = [], []
    for name, entry in sorted(imatrix.entries.items()):
        one = len(entry.counts) == 1  # ggml counts no dimension of 1 at the end
        heads.append(TensorHead(name + _SUMS, (entry.sums.size,) if one else entry.sums.shape, _F32))
        heads.append(TensorHead(name + _COUNTS, (1,) if one else (len(entry.counts), 1), _F32))
        values += [entry.sums, entry.counts]
    file = io.BytesIO()
    for at, value in zip(write_header(file, fields, heads), values, strict=True):
        file.seek(at)
        file.write(value.astype("<f4").tobytes())
    file.write(b"\0" * (-file.tell() % 32))
    return file.getvalue()


class _Dat:
    """The bytes of a .dat file, taken from the front."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)

    def take(self, n: int, what: str) -> bytes:
        if not 0 <= n <= len(self.raw) - self.at:
            where, left = f"{self.path}: {what}", f"{len(self.raw) - self.at:,} bytes left"
            found = f"a length of {n:,} bytes, {left}"
            raise BadFile("neither a GGUF nor a whole .dat importance matrix", where=where, found=found, hint=_HINT)
        self.at += n
        return self.raw[self.at - n : self.at].tobytes()

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _read_dat(path: Path) -> Imatrix:
    file = _Dat(path)
    entries: dict[str, Entry] = {}
    n_entries = file.number("the number of entries")
    if not 0 < n_entries <= len(file.raw) // 16:
        found = f"{n_entries:,} entries"
        raise BadFile("neither a GGUF nor a .dat importance matrix", where=path, found=found, hint=_HINT)
    for i in range(n_entries):
        raw = file.take(file.number(f"the name of entry {i}"), f"the name of entry {i}")
        name = raw.decode("utf-8", "surrogateescape")
        n_calls, n_values = file.number(f"entry {i}"), file.number(f"entry {i}")
        sums = np.frombuffer(file.take(4 * n_values, f"entry {i}"), "<f4").astype(np.float32)
        # llama-quantize takes the values as they are where no chunk was counted.
        entries[name] = _checked(f"{path}: entry {i}", sums, np.array([max(1, n_calls)], np.float64))
    count, datasets = 0, list[str]()
    if file.at < len(file.raw):
        count = max(0, file.number("the number of chunks"))
        raw = file.take(file.number("the dataset"), "the dataset")
        datasets = [raw.decode("utf-8", "surrogateescape")] if raw else []
    return Imatrix(name=path.name, entries=entries, datasets=tuple(datasets), chunk_count=count, chunk_size=0)


def _dat_bytes(imatrix: Imatrix) -> bytes:
    stored = {name: entry for name, entry in sorted(imatrix.entries.items()) if entry.counts.any()}
    parts = [struct.pack("<i", len(stored))]
    for name, entry in stored.items():
        n_calls = -(-int(entry.counts.max()) // max(1, imatrix.chunk_size))
        means = imatrix.importance(name)
        assert means is not None
        raw = name.encode("utf-8", "surrogateescape")
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", n_calls, means.size)]
        parts.append((means * np.float32(n_calls)).astype("<f4").tobytes())
    dataset = "".join(imatrix.datasets[-1:]).encode("utf-8", "surrogateescape")
    return b"".join([*parts, struct.pack("<ii", imatrix.chunk_count, len(dataset)), dataset])


def _short(key: str, value: str) -> Field:
    # llama-quantize has room for 127 bytes.
    return text(key, value.encode("utf-8", "surrogateescape")[:127].decode("utf-8", "ignore"))
