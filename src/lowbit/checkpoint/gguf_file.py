"""GGUF in and out: every count, length and offset checked against the file before it is used.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py's own reader trusts the counts it
reads; this one is for files from strangers. Strings keep bytes that are not UTF-8 (surrogateescape), so that
what is read can be written again unchanged.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lowbit.checkpoint.tensor_file import Entry, TensorFile
from lowbit.errors import BadFile, Unsupported

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_MAX_DIMS, _MAX_NAME, _MAX_KEY = 4, 63, 65535
_REDOWNLOAD = "Download or copy the file again"

_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


class Field(NamedTuple):
    """One key-value: ``type`` and, for an array, ``subtype`` are gguf.GGUFValueType values."""

    key: str
    value: Any
    type: int
    subtype: int | None = None


@dataclass(frozen=True)
class TensorHead:
    """What a GGUF's table says of a tensor: row-major shape (the file stores it reversed), ggml type, bytes."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.shape[-1], self.ggml_type)


def row_bytes(n: int, ggml_type: int) -> int:
    """Bytes of a row of ``n`` weights."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    return n // block * size


class GgufFile(TensorFile):
    """One open GGUF: ``fields``, and ``entries`` by tensor name (row-major shapes)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        parser = _Parser(path, self._map)
        self.fields: list[Field] = parser.fields()
        self.values: dict[str, Any] = {field.key: field.value for field in self.fields}
        self.entries: dict[str, Entry] = parser.tensors(self._alignment())

    def _alignment(self) -> int:
        alignment = self.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise BadFile(
                "general.alignment is not a power of two", where=self.path, found=str(alignment)[:40], hint=_REDOWNLOAD
            )
        return alignment


def read_fields(path: Path) -> list[Field]:
    """A GGUF's key-values alone, also where its tensors are not all there. Raises BadFile, Unsupported, OSError."""
    with contextlib.closing(TensorFile(path)) as file:
        return _Parser(path, file._map).fields()


class _Parser:
    """Walks the header. Every read says how many bytes it wants first, so no lie about a size can allocate."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.position = path, data, 0
        if bytes(self.take(4, "the magic")) != MAGIC:
            hint = "Give a .gguf file, or a folder with config.json"
            raise BadFile("not a GGUF file", where=path, found=bytes(data[:4]), expected=MAGIC, hint=hint)
        version = self.scalar("<u4", "the version")
        if version not in (2, 3):
            big_endian = int.from_bytes(struct.pack("<I", version), "big") in (2, 3)
            found = "a big-endian file" if big_endian else f"version {version}"
            raise Unsupported("this GGUF version is not readable", where=path, found=found, expected="version 2 or 3")
        self.n_tensors = self.count("<u8", "the tensor count", least_bytes=24)
        self.n_fields = self.count("<u8", "the key count", least_bytes=13)

    def take(self, n: int, what: str) -> np.ndarray:
        if n > len(self.data) - self.position:
            raise BadFile(
                f"the file ends inside {what}",
                where=self.path,
                found=f"{len(self.data):,} bytes",
                expected=f"at least {self.position + n:,}",
                hint=_REDOWNLOAD,
            )
        self.position += n
        return self.data[self.position - n : self.position]

    def scalar(self, dtype: str, what: str) -> Any:
        return self.take(np.dtype(dtype).itemsize, what).view(dtype)[0].item()

    def count(self, dtype: str, what: str, *, least_bytes: int) -> int:
        n = self.scalar(dtype, what)
        if n * least_bytes > len(self.data) - self.position:
            raise BadFile(
                f"{what} is more than the file can hold",
                where=self.path,
                found=f"{n:,}",
                expected=f"at most {(len(self.data) - self.position) // least_bytes:,}",
                hint=_REDOWNLOAD,
            )
        return n

    def string(self, what: str) -> str:
        n = self.count("<u8", f"the length of {what}", least_bytes=1)
        return self.take(n, what).tobytes().decode("utf-8", "surrogateescape")

    def strings(self, n: int, what: str) -> list[str]:
        # The same as n calls of string(), over one bytes object: vocabularies have 262,144 of them.
        blob, at, found = self.data, self.position, []
        end, unpack = len(blob), struct.Struct("<Q").unpack
        view = memoryview(blob)  # type: ignore[arg-type]
        for _ in range(n):
            if at + 8 > end:
                break
            (length,) = unpack(view[at : at + 8])
            if length > end - at - 8:
                break
            found.append(bytes(view[at + 8 : at + 8 + length]).decode("utf-8", "surrogateescape"))
            at += 8 + length
        if len(found) < n:
            raise BadFile(f"the file ends inside {what}", where=self.path, hint=_REDOWNLOAD)
        self.position = at
        return found

    def fields(self) -> list[Field]:
        result: list[Field] = []
        seen: set[str] = set()
        for i in range(self.n_fields):
            key = self.string(f"key {i}")
            if len(key) > _MAX_KEY or key in seen or not key:
                raise BadFile("a key is empty, overlong or given twice", where=self.path, found=key[:60])
            seen.add(key)
            kind = self.scalar("<u4", key)
            if kind == GGUFValueType.ARRAY:
                subtype = self.scalar("<u4", key)
                result.append(Field(key, self._array(key, subtype), kind, subtype))
            else:
                result.append(Field(key, self._value(key, kind), kind))
        return result

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(key)
        value = self.scalar(self._dtype(key, kind), key)
        return self._bools(key, [value])[0] if kind == GGUFValueType.BOOL else value

    def _array(self, key: str, subtype: int) -> list[Any]:
        if subtype == GGUFValueType.STRING:
            return self.strings(self.count("<u8", f"the length of {key}", least_bytes=8), key)
        dtype = self._dtype(key, subtype)
        n = self.count("<u8", f"the length of {key}", least_bytes=np.dtype(dtype).itemsize)
        values = self.take(n * np.dtype(dtype).itemsize, key).view(dtype).tolist()
        return self._bools(key, values) if subtype == GGUFValueType.BOOL else values

    def _bools(self, key: str, values: list[int]) -> list[bool]:
        if any(v > 1 for v in values):
            raise BadFile("a truth value is neither 0 nor 1", where=f"{self.path}: {key}", hint=_REDOWNLOAD)
        return [bool(v) for v in values]

    def _dtype(self, key: str, kind: int) -> str:
        try:
            return _SCALARS[GGUFValueType(kind)]
        except (ValueError, KeyError):
            raise BadFile("unknown value type", where=f"{self.path}: {key}", found=kind, hint=_REDOWNLOAD) from None

    def tensors(self, alignment: int) -> dict[str, Entry]:
        table: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for i in range(self.n_tensors):
            name = self.string(f"the name of tensor {i}")
            if not name or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME or name in table:
                raise BadFile("a tensor's name is empty, overlong or given twice", where=self.path, found=name[:80])
            table[name] = self._tensor(name, alignment)
        data_start = -(-self.position // alignment) * alignment
        entries: dict[str, Entry] = {}
        position = 0
        for name, (dtype, shape, offset, n_bytes) in sorted(table.items(), key=lambda item: item[1][2]):
            if offset < position:
                raise BadFile("a tensor overlaps another tensor", where=f"{self.path}: {name}", hint=_REDOWNLOAD)
            position = offset + n_bytes
            if data_start + position > len(self.data):
                raise BadFile(
                    "a tensor lies past the end of the file; it is truncated",
                    where=f"{self.path}: {name}",
                    found=f"{len(self.data):,} bytes",
                    expected=f"at least {data_start + position:,}",
                    hint=_REDOWNLOAD,
                )
            entries[name] = Entry(dtype, shape, data_start + offset, n_bytes)
        return {name: entries[name] for name in table}

    def _tensor(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        where = f"{self.path}: {name}"
        n_dims = self.scalar("<u4", name)
        if not 1 <= n_dims <= _MAX_DIMS:
            what = "a tensor has an impossible number of dimensions"
            raise BadFile(what, where=where, found=n_dims, expected=f"1 to {_MAX_DIMS}", hint=_REDOWNLOAD)
        dims = [self.scalar("<u8", name) for _ in range(n_dims)]
        ggml_type = self.scalar("<u4", name)
        offset = self.scalar("<u8", name)
        try:
            kind = GGMLQuantizationType(ggml_type)
            block, _ = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise Unsupported("unknown ggml type", where=where, found=ggml_type, hint="Update lowbit") from None
        if not all(0 < d < 2**48 for d in dims) or math.prod(dims) >= 2**60:
            raise BadFile("a tensor has an impossible size", where=where, found=dims, hint=_REDOWNLOAD)
        if dims[0] % block or offset % alignment:
            raise BadFile(
                f"rows are not a multiple of {block} or the offset is not aligned to {alignment}",
                where=where,
                found=f"row length {dims[0]}, offset {offset}",
                hint=_REDOWNLOAD,
            )
        head = TensorHead(name, tuple(reversed(dims)), ggml_type)
        return kind.name, head.shape, offset, head.n_bytes


def write_header(handle: BinaryIO, fields: Sequence[Field], tensors: Iterable[TensorHead]) -> list[int]:
    """Writes magic, key-values and tensor table; pads to the data section. Returns the tensors' absolute offsets.

    The caller writes each tensor's bytes at its offset; the alignment is the fields' own.
    """
    alignment = next((f.value for f in fields if f.key == "general.alignment"), DEFAULT_ALIGNMENT)
    tensors = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for field in fields:
        parts += [_string(field.key), _field(field)]
    offset, offsets = 0, []
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        parts += [_string(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.ggml_type, offset)]
        offsets.append(offset)
        offset = -(-(offset + tensor.n_bytes) // alignment) * alignment
    handle.write(b"".join(parts))
    data_start = -(-handle.tell() // alignment) * alignment
    handle.write(b"\0" * (data_start - handle.tell()))
    return [data_start + o for o in offsets]


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:  # JSON can name half of a character
        raise BadFile("a text that is no Unicode cannot be written", found=ascii(text)[:60]) from error
    return struct.pack("<Q", len(data)) + data


def _field(field: Field) -> bytes:
    if field.type == GGUFValueType.STRING:
        return struct.pack("<I", field.type) + _string(field.value)
    if field.type != GGUFValueType.ARRAY:
        return struct.pack("<I", field.type) + np.array(field.value, _SCALARS[GGUFValueType(field.type)]).tobytes()
    assert field.subtype is not None
    head = struct.pack("<IIQ", field.type, field.subtype, len(field.value))
    if field.subtype == GGUFValueType.STRING:
        return head + b"".join(map(_string, field.value))
    return head + np.array(field.value, _SCALARS[GGUFValueType(field.subtype)]).tobytes()
