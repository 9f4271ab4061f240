"""A .litertlm file: its sections, what its header says, and the weights of its model at their offsets.

A file is the magic, a version, where the header ends, the header (a flatbuffer), and sections. One section is the
model, a .tflite: a flatbuffer whose graphs name constant tensors, and their bytes. Source: litert_lm_builder's
litertlm_header_schema and LiteRT's schema.fbs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowbit.checkpoint.litert_library import header_schema, tflite_schema
from lowbit.checkpoint.tensor_file import Entry, TensorFile
from lowbit.errors import BadFile, NotFound, Unsupported
from lowbit.units import MIB

MAGIC = b"LITERTLM"
HEADER_BEGIN = 32
CONFIG = "lowbit.config"  # the header's key of the text model's config.json
MODEL, METADATA = 3, 5  # AnySectionDataType of the format's schema: TFLiteModel, LlmMetadataProto
TEXT_MODELS = ("", "tf_lite_prefill_decode")  # "model_type" of the section of a text model
SCALES = "#scales"  # after a weight's name: the tensor of its scales
_LARGEST_HEADER = 64 * MIB  # its end is a uint64 at 24
_MOST = 1 << 20  # sections, tensors: more are no model
_LONGEST_NAME = 1024
_BITS = {"FLOAT32": 32, "INT8": 8, "INT4": 4, "INT2": 2}
_NAMES = {32: "F32", 8: "channelwise8", 4: "channelwise4", 2: "channelwise2"}


class Section(NamedTuple):
    """kind: of AnySectionDataType. model_type: of a model, or "". begin, end: its bytes in the file."""

    kind: int
    model_type: str
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """sections: in file order. entries: the file's own key-values that are text."""

    sections: tuple[Section, ...]
    entries: dict[str, str]

    def model(self, where: Path) -> Section:
        """The section of the text model. Raises Unsupported where it is not the only model."""
        found = [section for section in self.sections if section.kind == MODEL]
        if len(found) != 1 or found[0].model_type not in TEXT_MODELS:
            kinds = ", ".join(sorted(section.model_type or "unnamed" for section in found)) or "no model"
            raise Unsupported("not a file of one text model alone", where=where, found=kinds)
        return found[0]


def flip(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packed codes (uint8) between the grid's unsigned ones and LiteRT's two's complement: the top bit of each."""
    return codes ^ np.uint8({2: 0xAA, 4: 0x88, 8: 0}[bits])


def is_litertlm(path: Path) -> bool:
    """Whether a file is called so, or begins as one. Raises OSError where it cannot be read."""
    if path.is_dir():
        return False
    with open(path, "rb") as handle:
        return path.suffix.lower() == ".litertlm" or handle.read(len(MAGIC)) == MAGIC


def check_magic(path: Path) -> None:
    """Raises NotFound where there is no such file, and BadFile where it is no .litertlm. Needs no library."""
    _read_start(path)


def _read_start(path: Path) -> tuple[bytes, int, int]:
    """The header's bytes, where it ends, and the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            head = handle.read(HEADER_BEGIN)
            if head[: len(MAGIC)] != MAGIC:
                found = f"the first bytes {head[: len(MAGIC)]!r}"
                raise BadFile("not a .litertlm", where=path, found=found, expected=repr(MAGIC))
            end = struct.unpack_from("<Q", head, 24)[0] if len(head) == HEADER_BEGIN else 0
            if not HEADER_BEGIN < end <= min(size, _LARGEST_HEADER):
                raise BadFile("the header is damaged", where=path, found=f"its end at byte {end} of {size}")
            return handle.read(end - HEADER_BEGIN), end, size
    except FileNotFoundError:
        raise NotFound("no such file", where=path, expected="a .litertlm") from None
    except OSError as error:
        raise BadFile("cannot be read", where=path, found=error.strerror) from None


def read_header(path: Path) -> Header:
    """The header of a .litertlm. Raises NotFound (no such file, LiteRT-LM not installed) and BadFile."""
    header, end, size = _read_start(path)
    schema = header_schema()
    try:
        root = schema.LiteRTLMMetaData.GetRootAs(header, 0)
        listed, system = root.SectionMetadata(), root.SystemMetadata()
        objects = [listed.Objects(i) for i in range(min(listed.ObjectsLength(), _MOST))]
        sections = tuple(
            Section(int(o.DataType()), str(_items(o.Items, o.ItemsLength()).get("model_type", "")).lower(),
                    int(o.BeginOffset()), int(o.EndOffset()))
            for o in objects
        )  # fmt: skip
        entries = _items(system.Entries, system.EntriesLength()) if system is not None else {}
    except Exception as error:  # flatbuffers reads wherever a damaged offset points: struct.error, TypeError, ...
        raise BadFile("the header is damaged", where=path, found=str(error).splitlines()[0][:100]) from error
    for section in sections:
        if not end <= section.begin <= section.end <= size:
            found = f"bytes {section.begin} to {section.end}"
            raise BadFile("a section lies outside the file", where=path, found=found)
    return Header(sections=sections, entries=entries)


def _items(item: Any, n: int) -> dict[str, str]:
    from litert_lm_builder import litertlm_peek

    pairs = [litertlm_peek.kvp_to_dict(item(i)) for i in range(min(n, 1000))]
    return {str(p["key"]): p["value"] for p in pairs if isinstance(p.get("value"), str)}


class LitertLmFile(TensorFile):
    """The weights of a file of one text model that lowbit wrote: codes of 2, 4 or 8 bits ('channelwise4'), whose scales
    are a tensor of their own (name + SCALES), or float32. Raises NotFound, BadFile, Unsupported."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        model = self.header.model(path)
        super().__init__(path)
        self.entries = {}
        try:
            self._read_model(model)
        except BadFile:
            self.close()
            raise
        except Exception as error:
            self.close()
            what = "the model in it is damaged"
            raise BadFile(what, where=path, found=str(error).splitlines()[0][:100]) from error

    def _read_model(self, section: Section) -> None:
        schema, raw = tflite_schema(), memoryview(self._map.data)[: section.end]
        model = schema.Model.GetRootAs(raw, section.begin)
        found = [model.SignatureDefs(i) for i in range(min(model.SignatureDefsLength(), 1000))]
        decode = next((s.SubgraphIndex() for s in found if s.SignatureKey() == b"decode"), None)
        if decode is None:
            raise BadFile("the model has no decode signature", where=self.path)
        graph = model.Subgraphs(decode)
        kinds = {value: name for name, value in vars(schema.TensorType).items() if name in _BITS}
        for i in range(_counted(graph.TensorsLength(), self.path)):
            tensor = graph.Tensors(i)
            buffer = model.Buffers(tensor.Buffer())
            if buffer is None or buffer.Offset() <= 1 or tensor.Type() not in kinds:
                continue  # what operators make, and small constants
            self._add(tensor, buffer, _BITS[kinds[tensor.Type()]], section)

    def _add(self, tensor: Any, buffer: Any, bits: int, section: Section) -> None:
        name = _name(tensor, self.path)
        shape = tuple(int(n) for n in tensor.ShapeAsNumpy())[:8] if tensor.ShapeLength() else ()
        start, size = section.begin + int(buffer.Offset()), int(buffer.Size())
        where = f"{self.path}: {name}"
        if size * 8 != math.prod(shape) * bits or any(n < 1 for n in shape) or len(shape) not in (1, 2):
            found = f"{size} bytes for {list(shape)} of {bits} bits"
            raise BadFile("a tensor's size is not that of its shape", where=where, found=found)
        if start + size > section.end:
            raise BadFile("a tensor lies outside the model", where=where, found=f"bytes {start} to {start + size}")
        if bits < 32:
            self._add_scales(tensor, name, shape[0], where)
        self.entries[name] = Entry(_NAMES[bits], shape, start, size)

    def _add_scales(self, tensor: Any, name: str, rows: int, where: str) -> None:
        given = tensor.Quantization()
        field = given._tab.Offset(8) if given is not None else 0  # of QuantizationParameters.scale
        if given is None or not field or given.ScaleLength() != rows or given.QuantizedDimension():
            found = f"{given.ScaleLength() if given is not None else 0} scales for {rows} rows"
            raise BadFile("not a scale for each row", where=where, found=found)
        start = int(given._tab.Vector(field))
        if start + 4 * rows > len(self._map):
            raise BadFile("the scales lie outside the file", where=where, found=f"byte {start}")
        self.entries[name + SCALES] = Entry("F32", (rows,), start, 4 * rows)

    def floats(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements of a float32 tensor seen as flat: a fresh array."""
        return self.read(name, 4 * start, 4 * stop).view("<f4")


def _counted(n: int, path: Path) -> int:
    if n > _MOST:
        raise BadFile("more tensors than any model has", where=path, found=n)
    return n


def _name(tensor: Any, path: Path) -> str:
    field = tensor._tab.Offset(10)  # of Tensor.name
    if not field or tensor._tab.VectorLen(field) > _LONGEST_NAME:
        raise BadFile("a weight has no name, or a long one", where=path)
    return bytes(tensor.Name()).decode("utf-8", "replace")
