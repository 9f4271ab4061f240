"""The calibration file: what `lowbit calibrate` measured of each matrix, checked against the model that is packed.

A safetensors file. Of every linear layer NAME.inputs, (n, n) float32: the second moments of its inputs, each token
weighted by the mean square of the loss's gradient at its outputs; NAME.outputs, (rows,): that mean square output by
output. Of the output head the inputs' unweighted moments, and the mean of p (1 - p) of each token of the vocabulary; of
the embedding .lookups, (rows,), how often a row is looked up, and .gradients, (n,). Made by lowbit.train.importance.
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
from lowbit.errors import BadFile, NotFound
from lowbit.grid.base import Grid
from lowbit.pack import identify
from lowbit.pack.compensate import Moments, can_compensate, compensate, moments_of
from lowbit.pack.guide import Encoder
from lowbit.pack.rows import file_rows, precision_of

_HINT = "lowbit calibrate MODEL -o FILE makes one of this model"
_MAX_WIDTH = 1 << 16
_ROWS = 512
_KEPT_BYTES = 1 << 30


class Calibration:
    """An open calibration file. Any thread may ask it. Raises NotFound, and BadFile where it is of another model."""

    def __init__(self, path: str | Path, checkpoint: Checkpoint) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFound("no such file", where=self.path, expected="a calibration", hint=_HINT)
        self._file = SafetensorsFile(self.path)
        self._lock = threading.Lock()
        self._kept: dict[str, Moments] = {}  # the latest last
        self.head = next(
            (n for n in checkpoint.names if checkpoint.info(n).role == "output"), "model.embed_tokens.weight"
        )
        known = 0
        for stored, entry in self._file.entries.items():
            name, _, part = stored.rpartition(".")
            spec = checkpoint.specs.get(name)
            wanted = None
            if spec is not None and len(spec.shape) == 2 and spec.shape[-1] <= _MAX_WIDTH:
                rows, n = spec.shape
                wanted = {"inputs": (n, n), "outputs": (rows,), "lookups": (rows,), "gradients": (n,)}.get(part)
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
        return _ROWS if self.has(spec.name) else 0

    def encoder(self, checkpoint: Checkpoint, spec: TensorSpec, grid: Grid, *, naive: bool) -> Encoder | None:
        if naive or grid.max_code == 0 or not self.knows(spec.name) or _on_lattice(checkpoint, spec):
            return None
        return lambda start, stop: self.rounded(spec.name, file_rows(checkpoint, spec, start, stop), grid)

    def rounded(self, name: str, values: np.ndarray, grid: Grid) -> np.ndarray:
        """Bytes (rows, row_bytes) of a tensor's rows, ``values`` (rows, n) float32, rounded as well as is known how."""
        if self.has(name) and can_compensate(grid) and grid.bits_per_weight < 8:
            return grid.pack(compensate(values, self.moments(name), grid))
        if grid.block_size == 1:
            return grid.pack(grid.quantize(values))
        return ggml.quantize(values, ggml.type_of(grid), self.importance(name) if self.knows(name) else None)

    def has(self, name: str) -> bool:
        """Whether a tensor can be rounded by it: a matrix whose inputs were seen, and not the head."""
        return self.knows(name) and name != self.head

    def knows(self, name: str) -> bool:
        """Whether ``costs`` can tell what errors of this tensor do."""
        return f"{name}.inputs" in self._file.entries and f"{name}.outputs" in self._file.entries

    def moments(self, name: str) -> Moments:
        """Of a matrix that it ``has``. The latest are kept: threads work on neighbours at a time."""
        with self._lock:
            found = self._kept.pop(name, None)
            if found is None:
                try:
                    found = moments_of(self._values(f"{name}.inputs"))
                except np.linalg.LinAlgError:
                    raise BadFile("not second moments", where=f"{self.path}: {name}.inputs", hint=_HINT) from None
            self._kept[name] = found
            while len(self._kept) > 2 and sum(2 * kept.values.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            return found

    def importance(self, name: str) -> np.ndarray:
        """(n,) float32: the mean square of each input, as an importance matrix has it."""
        return np.ascontiguousarray(self._values(f"{name}.inputs").diagonal())

    def costs(self, name: str, rows: np.ndarray, errors: Sequence[np.ndarray]) -> np.ndarray:
        """Nats a token, to second order, that each of several ``errors`` would cause: (len(errors),) float64.

        rows: (k,), the rows they are in. errors: (k, n) float32 each.
        """
        outputs = self._values(f"{name}.outputs").astype(np.float64)
        if name != self.head:
            outputs /= max(outputs.mean(), 1e-300)
        inputs, weights = self._values(f"{name}.inputs"), outputs[rows]
        found = [np.einsum("i,ij,ij->", weights, e @ inputs, e, dtype=np.float64) for e in errors]
        if f"{name}.lookups" in self._file.entries:
            lookups, gradients = self._values(f"{name}.lookups")[rows], self._values(f"{name}.gradients")
            looked_up = [np.dot(lookups, np.square(e) @ gradients) for e in errors]
            found = [a + b for a, b in zip(found, looked_up, strict=True)]
        return np.array(found) / 2

    def _values(self, stored: str) -> np.ndarray:
        entry = self._file.entries[stored]
        values = self._file.read(stored, 0, entry.n_bytes).view("<f4").reshape(entry.shape)
        if not np.isfinite(values).all():
            raise BadFile("NaN or Inf", where=f"{self.path}: {stored}", hint=_HINT)
        return values


def _on_lattice(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    """Whether training left the tensor on a 4-bit grid, told from a sample of its rows."""
    rows, n = spec.n_rows, spec.shape[-1]
    values = np.concatenate([file_rows(checkpoint, spec, int(i), int(i) + 1) for i in identify.sample(rows, n)])
    return identify.identify(values, precision_of(checkpoint, spec)) is not None
