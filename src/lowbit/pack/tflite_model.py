"""A LiteRT model (.tflite) as it is put together: graphs of built-in operators over weights that lie behind it.

The flatbuffer holds the graphs, small constants and every scale; the weights' codes come after it, each at an offset
that the flatbuffer names, so that they can be streamed and may be larger than the 2 GiB of a flatbuffer. Scales have
their places inside it, which ``finish`` tells. Source: LiteRT's schema.fbs (Buffer.offset, QuantizationParameters).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lowbit.checkpoint.litert_library import tflite_schema

T = TypeVar("T")

ALIGNMENT = 64  # of weights, from the model's beginning
_VERSION = 3
_PLACEHOLDER = 127  # what older readers find in place of an operator above it
_TYPES = {"f32": "FLOAT32", "i32": "INT32", "i8": "INT8", "i4": "INT4", "i2": "INT2"}
_CODES = {8: "i8", 4: "i4", 2: "i2"}
# From which version on an operator takes what we give it: integers of 4 and 2 bits with a scale a row.
_OP_VERSIONS = {"FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the checkpoint: (rows, n) codes of 2, 4 or 8 ``bits`` with a scale a row, or float32 (bits 32)."""

    shape: tuple[int, ...]
    bits: int

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.bits // 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a weight goes: bytes from the model's beginning, of its codes and of its float32 scales (None: none)."""

    at: int
    scales_at: int | None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """flatbuffer: the model's beginning, its scales still zero. places: of every weight. size: of the whole model."""

    flatbuffer: bytes
    places: dict[str, Place]
    size: int


class Model:
    """A model under construction. weights: by name, in file order; ``graph`` adds graphs; ``finish`` lays it out."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.schema = tflite_schema()
        self.weights = dict(weights)
        self.graphs: list[Graph] = []
        self._buffers = [self.schema.BufferT()]  # the first one stands for none
        self._constants: dict[bytes, int] = {}
        self._op_codes: dict[str, int] = {}
        zeros: dict[int, _Vector] = {}
        self._outside: dict[str, tuple[int, _Scales | None]] = {}
        for name, weight in self.weights.items():
            rows = weight.shape[0]
            if weight.bits < 32:
                zeros.setdefault(rows, _Vector(np.zeros(rows, np.int64)))
            scales = _Scales(self.schema, rows, zeros[rows]) if weight.bits < 32 else None
            self._outside[name] = self._add_buffer(), scales
            self._buffers[-1].size = weight.n_bytes

    def graph(self, name: str) -> Graph:
        """Adds a graph, which becomes a signature of that name."""
        self.graphs.append(Graph(self, name))
        return self.graphs[-1]

    def constant(self, data: bytes) -> int:
        """The number of a buffer with these bytes."""
        if data not in self._constants:
            self._constants[data] = self._add_buffer()
            self._buffers[-1].data = np.frombuffer(data, np.uint8)
        return self._constants[data]

    def weight(self, name: str) -> tuple[int, Any]:
        """The number of a weight's buffer, and what packs its scales."""
        return self._outside[name]

    def op_code(self, kind: str) -> int:
        return self._op_codes.setdefault(kind, len(self._op_codes))

    def finish(self) -> Finished:
        """Lays the model out. The graphs must be whole."""
        model = self._tables()
        start = len(_flatbuffer(model))  # with offsets of any value it is as long as with the right ones
        at, places = start, {}
        for name, weight in self.weights.items():
            at = -(-at // ALIGNMENT) * ALIGNMENT
            self._buffers[self._outside[name][0]].offset = at
            places[name], at = at, at + weight.n_bytes
        raw = _flatbuffer(model)
        assert len(raw) == start
        found = {
            name: Place(at=offset, scales_at=scales.begin(len(raw)) if (scales := self._outside[name][1]) else None)
            for name, offset in places.items()
        }
        return Finished(flatbuffer=raw, places=found, size=at)

    def _add_buffer(self) -> int:
        buffer = self.schema.BufferT()
        buffer.offset = buffer.size = 0
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def _tables(self) -> Any:
        schema = self.schema
        model = schema.ModelT()
        model.version, model.description = _VERSION, "lowbit"
        model.buffers = self._buffers
        for number, _ in self._outside.values():
            self._buffers[number].offset = 1
        model.operatorCodes = [self._operator_code(kind) for kind in self._op_codes]
        model.subgraphs = [graph.table() for graph in self.graphs]
        model.signatureDefs = [graph.signature(i) for i, graph in enumerate(self.graphs)]
        return model

    def _operator_code(self, kind: str) -> Any:
        table, code = self.schema.OperatorCodeT(), getattr(self.schema.BuiltinOperator, kind)
        table.builtinCode, table.deprecatedBuiltinCode = code, min(code, _PLACEHOLDER)
        table.version = _OP_VERSIONS.get(kind, 1)
        return table


class Graph:
    """One graph: tensors are numbers, and each operator gives that of what it makes."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name
        self._schema = model.schema
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._made: dict[Hashable, Any] = {}

    def input(self, name: str, shape: Sequence[int], dtype: str = "f32") -> int:
        self._inputs[name] = self._tensor(f"{self.name}_{name}", shape, dtype)
        return self._inputs[name]

    def output(self, name: str, tensor: int) -> None:
        self._outputs[name] = tensor

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` adds, the first time; what it gave then, after that."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def weight(self, name: str) -> int:
        return self.once(("weight", name), lambda: self._weight(name))

    def _weight(self, name: str) -> int:
        weight = self.model.weights[name]
        buffer, scales = self.model.weight(name)
        number = self._tensor(name, weight.shape, _CODES.get(weight.bits, "f32"), buffer)
        self._tensors[number].quantization = scales
        return number

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(int(n) for n in self._tensors[tensor].shape)

    def ints(self, *values: int) -> int:
        return self.constant(np.array(values, np.int32))

    def floats(self, *values: float) -> int:
        return self.constant(np.array(values, np.float32))

    def constant(self, values: np.ndarray) -> int:
        """float32 or int32."""
        data, shape, dtype = values.tobytes(), values.shape, "i32" if values.dtype == np.int32 else "f32"
        name = f"{self.name}_constant_{len(self._tensors)}"
        return self.once(
            ("constant", data, shape, dtype), lambda: self._tensor(name, shape, dtype, self.model.constant(data))
        )

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        *,
        dtype: str = "f32",
        options: str | None = None,
        **values: Any,
    ) -> int:
        """Adds an operator ('FULLY_CONNECTED') and gives what it makes. ``options``: the table that ``values`` go into
        ('FullyConnectedOptions')."""
        made = self._tensor(f"{self.name}_{len(self._tensors)}", shape, dtype)
        operator = self._schema.OperatorT()
        operator.opcodeIndex = self.model.op_code(kind)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([made], np.int32)
        if options is not None:
            operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(self._schema, f"{options}T")()
            for key, value in values.items():
                setattr(operator.builtinOptions, key, value)
        self._operators.append(operator)
        return made

    def table(self) -> Any:
        graph = self._schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = self.name, self._tensors, self._operators
        graph.inputs = np.array([*self._inputs.values()], np.int32)
        graph.outputs = np.array([*self._outputs.values()], np.int32)
        return graph

    def signature(self, index: int) -> Any:
        def named(tensors: Mapping[str, int]) -> list[Any]:
            made = []
            for name, number in tensors.items():
                entry = self._schema.TensorMapT()
                entry.name, entry.tensorIndex = name, number
                made.append(entry)
            return made

        found = self._schema.SignatureDefT()
        found.signatureKey, found.subgraphIndex = self.name, index
        found.inputs, found.outputs = named(self._inputs), named(self._outputs)
        return found

    def _tensor(self, name: str, shape: Sequence[int], dtype: str, buffer: int = 0) -> int:
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type, tensor.buffer = getattr(self._schema.TensorType, _TYPES[dtype]), buffer
        self._tensors.append(tensor)
        return len(self._tensors) - 1


class _Vector:
    """A vector that several tables of one flatbuffer share."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self._builder, self._offset = values, None, 0

    def pack(self, builder: Any) -> int:
        if self._builder is not builder:
            self._builder, self._offset = builder, builder.CreateNumpyVector(self._values)
        return self._offset


class _Scales:
    """The quantization of a weight, in the flatbuffer once though every graph has a tensor of it."""

    def __init__(self, schema: Any, rows: int, zeros: _Vector) -> None:
        self._schema, self._rows, self._zeros = schema, rows, zeros
        self._builder: Any = None
        self._scales = self._offset = 0

    def Pack(self, builder: Any) -> int:  # the generated code calls it by this name
        if self._builder is builder:
            return self._offset
        self._builder = builder
        zeros, self._scales = self._zeros.pack(builder), builder.CreateNumpyVector(np.zeros(self._rows, np.float32))
        self._schema.QuantizationParametersStart(builder)
        self._schema.QuantizationParametersAddScale(builder, self._scales)
        self._schema.QuantizationParametersAddZeroPoint(builder, zeros)
        self._offset = self._schema.QuantizationParametersEnd(builder)
        return self._offset

    def begin(self, size: int) -> int:
        """Where the scales lie in a flatbuffer of ``size`` bytes: behind the vector's length."""
        return size - self._scales + 4


def _flatbuffer(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
