"""The calibration file: what `lowbit calibrate` measured of each matrix, checked against the model that is packed.

A safetensors file. Of every linear layer NAME.inputs, (n, n) float32: the second moments of its inputs, each token
weighted by the mean square of the loss's gradient at its outputs; NAME.outputs, (rows,): that mean square output by
output; where there are at most 2,048 rows NAME.slopes, (rows, rows): the second moments of that gradient, by which rows
are told of each other's errors. Of the output head the inputs' unweighted moments, and the mean of p (1 - p) of each
token of the vocabulary; of the embedding .lookups, (rows,), how often a row is looked up, and .gradients, (n,). Made by
lowbit.train.importance.

A layer's experts are one weight (experts, rows, n) and have .inputs (experts, n, n) and .outputs (experts, rows) of the
tokens that were routed to each; .tokens (experts,), how many; and .pooled (n, n), all experts' inputs together. An
expert is rounded as if it had seen a number of the layer's average tokens besides its own (``_LEAN``): one that the
text hardly reached leans on the others, one that it often reached hardly does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowbit import ggml
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.compensate import Moments, can_compensate, compensate, compensate_together, moments_of
from lowbit.errors import BadFile, NotFound
from lowbit.grid.base import Grid
from lowbit.pack import identify
from lowbit.pack.guide import Encoder
from lowbit.pack.rows import file_rows, matrix_slices, precision_of

_HINT = "lowbit calibrate MODEL -o FILE makes one of this model"
_MAX_WIDTH = 1 << 16
_ROWS = 512
_KEPT_BYTES = 1 << 30
_LEAN = 0.25  # average tokens that an expert is given, in parts of the width of its inputs


class Calibration:
    """An open calibration file. Any thread may ask it. Raises NotFound, and BadFile where it is of another model."""

    def __init__(self, path: str | Path, checkpoint: Checkpoint) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFound("no such file", where=self.path, expected="a calibration", hint=_HINT)
        self._file = SafetensorsFile(self.path)
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int], Moments] = {}  # the latest last
        self.head = next(
            (n for n in checkpoint.names if checkpoint.info(n).role == "output"), "model.embed_tokens.weight"
        )
        known = 0
        for stored, entry in self._file.entries.items():
            name, _, part = stored.rpartition(".")
            spec = checkpoint.specs.get(name)
            wanted = _shapes(spec).get(part) if spec is not None else None
            if wanted is None:
                raise BadFile("the model has no such tensor", where=f"{self.path}: {stored[:80]}", hint=_HINT)
            if entry.shape != wanted or entry.dtype != "F32":
                found, expected = f"{entry.dtype} {list(entry.shape)}", f"F32 {list(wanted)}"
                raise BadFile(
                    "not the model's shape",
                    where=f"{self.path}: {stored[:80]}",
                    found=found,
                    expected=expected,
                    hint=_HINT,
                )
            known += part == "inputs"
        if not known:
            raise BadFile("nothing of the model is in it", where=self.path, expected="NAME.inputs", hint=_HINT)

    @property
    def identity(self) -> list[object]:
        """What tells this file from another, for a packing that goes on."""
        return self._file.identity

    def fields(self) -> list[Field]:
        return []

    def rows_at_least(self, spec: TensorSpec) -> int:
        # Every call goes through the whole matrix of moments: not for a few rows.
        if not self.has(spec.name):
            return 0
        return spec.n_rows if f"{spec.name}.slopes" in self._file.entries else _ROWS

    def encoder(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Encoder | None:
        if naive or grid.max_code == 0 or not self.knows(spec.name) or _on_lattice(checkpoint, spec):
            return None

        if f"{spec.name}.slopes" in self._file.entries and self.has(spec.name) and _is_compensated(grid):
            lock, whole = threading.Lock(), list[np.ndarray]()

            def encode_all(start: int, stop: int) -> np.ndarray:
                with lock:
                    if not whole:
                        whole.append(self._together(checkpoint, spec, grid))
                return whole[0][start:stop]

            return encode_all

        def encode(start: int, stop: int) -> np.ndarray:
            parts = matrix_slices(spec, n_matrices(spec), start, stop)
            return np.concatenate(
                [self.rounded(spec.name, file_rows(checkpoint, spec, a, b), grid, matrix) for matrix, a, b in parts]
            )

        return encode

    def rounded(self, name: str, values: np.ndarray, grid: Grid, matrix: int = 0) -> np.ndarray:
        """Bytes (rows, row_bytes) of a tensor's rows, ``values`` (rows, n) float32, rounded as well as is known how.

        matrix: which expert's rows they are, where there are experts.
        """
        if self.has(name) and _is_compensated(grid):
            return grid.pack(compensate(values, self.moments(name, matrix), grid))
        if grid.block_size == 1:
            return grid.pack(grid.quantize(values))
        importance = self.importance(name, matrix) if self.knows(name) else None
        return ggml.quantize(values, ggml.type_of(grid), importance)

    def _together(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid) -> np.ndarray:
        """The bytes of a matrix whose rows are told of each other's errors."""
        slopes, order = self._values(f"{spec.name}.slopes"), spec.gguf_rows()
        if order is not None:
            slopes = slopes[np.ix_(order, order)]
        values = file_rows(checkpoint, spec, 0, spec.n_rows)
        try:
            return grid.pack(compensate_together(values, self.moments(spec.name), slopes, grid))
        except np.linalg.LinAlgError:
            raise BadFile("not second moments", where=f"{self.path}: {spec.name}.slopes", hint=_HINT) from None

    def has(self, name: str) -> bool:
        """Whether a tensor can be rounded by it: a matrix whose inputs were seen, and not the head."""
        return self.knows(name) and name != self.head

    def knows(self, name: str) -> bool:
        """Whether ``costs`` can tell what errors of this tensor do."""
        parts = ["inputs", "outputs"]
        if f"{name}.inputs" in self._file.entries and self._is_experts(name):
            parts += ["tokens", "pooled"]
        return all(f"{name}.{part}" in self._file.entries for part in parts)

    def moments(self, name: str, matrix: int = 0) -> Moments:
        """Of a matrix that it ``has``. The latest are kept: threads work on neighbours at a time."""
        with self._lock:
            found = self._kept.pop((name, matrix), None)
            if found is None:
                try:
                    found = moments_of(self._inputs(name, matrix))
                except np.linalg.LinAlgError:
                    raise BadFile("not second moments", where=f"{self.path}: {name}.inputs", hint=_HINT) from None
            self._kept[name, matrix] = found
            while len(self._kept) > 2 and sum(2 * kept.values.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            return found

    def importance(self, name: str, matrix: int = 0) -> np.ndarray:
        """(n,) float32: the mean square of each input, as an importance matrix has it."""
        return np.ascontiguousarray(self._inputs(name, matrix).diagonal())

    def costs(self, name: str, rows: np.ndarray, errors: Sequence[np.ndarray], matrix: int = 0) -> np.ndarray:
        """Nats a token, to second order, that each of several ``errors`` would cause: (len(errors),) float64.

        rows: (k,), the rows they are in, of the matrix. errors: (k, n) float32 each.
        """
        outputs = self._values(f"{name}.outputs", matrix).astype(np.float64)
        if name != self.head:
            outputs /= max(outputs.mean(), 1e-300)
        inputs, weights = self._inputs(name, matrix), outputs[rows]
        if self._is_experts(name):  # what leans on others is no token of its own
            own = self._values(f"{name}.tokens")[matrix]
            inputs = inputs * np.float32(own / (own + _LEAN * len(inputs)))
        found = [np.einsum("i,ij,ij->", weights, e @ inputs, e, dtype=np.float64) for e in errors]
        if f"{name}.lookups" in self._file.entries:
            lookups, gradients = self._values(f"{name}.lookups")[rows], self._values(f"{name}.gradients")
            looked_up = [np.dot(lookups, np.square(e) @ gradients) for e in errors]
            found = [a + b for a, b in zip(found, looked_up, strict=True)]
        return np.array(found) / 2

    def use(self, name: str) -> np.ndarray:
        """(experts,) float64: of each expert of a weight that it ``has``, the sum of the mean squares at its outputs;
        how much there is to lose, before it is known what its errors are."""
        shape = self._file.entries[f"{name}.outputs"].shape
        return np.array([self._values(f"{name}.outputs", i).sum(dtype=np.float64) for i in range(shape[0])])

    def _is_experts(self, name: str) -> bool:
        return len(self._file.entries[f"{name}.inputs"].shape) == 3

    def _inputs(self, name: str, matrix: int) -> np.ndarray:
        """(n, n) float32, the inputs' moments; an expert's lean on those of all."""
        inputs = self._values(f"{name}.inputs", matrix)
        if not self._is_experts(name):
            return inputs
        routed = self._values(f"{name}.tokens")
        if (routed < 0).any():
            raise BadFile("not numbers of tokens", where=f"{self.path}: {name}.tokens", hint=_HINT)
        given = _LEAN * len(inputs) / max(float(routed.sum()), 1.0)
        return inputs + np.float32(given) * self._values(f"{name}.pooled")

    def _values(self, stored: str, matrix: int | None = None) -> np.ndarray:
        """A stored part, float32; with ``matrix`` that one's of a part with one for each expert."""
        entry = self._file.entries[stored]
        start, stop, shape = 0, entry.n_bytes, entry.shape
        if matrix is not None and self._is_experts(stored.rpartition(".")[0]):
            each = entry.n_bytes // shape[0]
            start, stop, shape = matrix * each, (matrix + 1) * each, shape[1:]
        values = self._file.read(stored, start, stop).view("<f4").reshape(shape)
        if not np.isfinite(values).all():
            raise BadFile("NaN or Inf", where=f"{self.path}: {stored}", hint=_HINT)
        return values


def _shapes(spec: TensorSpec) -> dict[str, tuple[int, ...]]:
    """What may be stored of a weight."""
    if spec.shape[-1] > _MAX_WIDTH or len(spec.shape) not in (2, 3):
        return {}
    *lead, rows, n = spec.shape
    if lead:
        return {"inputs": (*lead, n, n), "outputs": (*lead, rows), "tokens": (*lead,), "pooled": (n, n)}
    found: dict[str, tuple[int, ...]] = {"inputs": (n, n), "outputs": (rows,), "lookups": (rows,), "gradients": (n,)}
    return found | ({"slopes": (rows, rows)} if rows <= _MAX_WIDTH else {})


def _is_compensated(grid: Grid) -> bool:
    return can_compensate(grid) and grid.bits_per_weight < 8


def n_matrices(spec: TensorSpec) -> int:
    """How many matrices a weight is: as many as there are experts in it, else one."""
    return spec.shape[0] if len(spec.shape) == 3 else 1


def _on_lattice(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    """Whether training left the tensor on a 4-bit grid, told from a sample of its rows."""
    rows, n = spec.n_rows, spec.shape[-1]
    values = np.concatenate([file_rows(checkpoint, spec, int(i), int(i) + 1) for i in identify.sample(rows, n)])
    return identify.identify(values, precision_of(checkpoint, spec)) is not None
