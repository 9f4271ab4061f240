"""A GGUF of a supported architecture, read as a checkpoint in Hugging Face's names and layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import grid as grids
from lowbit.checkpoint import families, safetensors_file
from lowbit.checkpoint.gguf_file import Field, GgufFile
from lowbit.checkpoint.model import Checkpoint, TensorInfo, check_layers, check_shape, info_of, text_of
from lowbit.checkpoint.tensor_file import TensorFile, n_rows, pick_rows
from lowbit.errors import LowbitError, Unsupported

_FLOATS = ("F32", "F16", "BF16", "F64")


class GgufCheckpoint(Checkpoint):
    """A GGUF of a supported architecture."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            hint = f"Give its folder, {path.parent}, with the config.json"
            raise Unsupported("a safetensors file alone does not say what model it is", where=path, hint=hint)
        self.path, self._file = path, GgufFile(path)
        values = self._file.values
        if values.get("split.count", 0) not in (0, 1):
            hint = "Join the parts with llama-gguf-split --merge"
            raise Unsupported("a GGUF split into several files", where=path, found=values["split.count"], hint=hint)
        family = families.by_arch(values.get("general.architecture"), path)
        shapes = {name: entry.shape for name, entry in self._file.entries.items()}
        check_layers(path, values.get(f"{family.arch}.block_count"), len(shapes))
        config = family.config_from_gguf(values, shapes, path)
        known = {spec.gguf_name for spec in family.tensors(config)}
        for name in self._file.entries:
            if name not in known and not family.unused_in_gguf(name, config):
                family.adopt_computed(config, name, self._whole(name), path)
        super().__init__(path, "gguf", family.text_config(config, path), family)
        for spec in self.specs.values():
            check_shape(path, spec, self._file.entries.get(spec.gguf_name), spec.gguf_name)

    @property
    def name(self) -> str:
        return text_of(self._file.values.get("general.name")) or self.path.stem

    @property
    def license(self) -> str | None:
        return text_of(self._file.values.get("general.license"))

    @property
    def tokenizer_source(self) -> Path:
        return self.path

    def info(self, name: str) -> TensorInfo:
        spec = self._spec(name)
        dtype = self._file.entries[spec.gguf_name].dtype
        return info_of(spec, dtype, _grid_of(dtype) if len(spec.shape) > 1 else None)

    @property
    def files(self) -> tuple[TensorFile, ...]:
        return (self._file,)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        spec = self._spec(name)
        is_vector = len(spec.shape) == 1
        values = pick_rows(
            spec.hf_rows(), start, stop, lambda a, b: self._decode(spec.gguf_name, a, b), of_vector=is_vector
        )
        with np.errstate(invalid="ignore"):
            return values - np.float32(spec.gguf_offset) if spec.gguf_offset else values

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        spec = self._spec(name)
        if self.info(name).grid is None:
            return None
        return pick_rows(spec.hf_rows(), start, stop, lambda a, b: self._file.read_rows(spec.gguf_name, a, b))

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        return self._decode(self._spec(name).gguf_name, start, stop)

    def gguf_metadata(self) -> list[Field] | None:
        return list(self._file.fields)

    def _whole(self, gguf_name: str) -> np.ndarray:
        shape = self._file.entries[gguf_name].shape
        return self._decode(gguf_name, 0, n_rows(shape)).reshape(shape)

    def _decode(self, gguf_name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a stored tensor as the file has them: float32 (stop - start, n)."""
        entry = self._file.entries[gguf_name]
        raw, shape = self._file.read_rows(gguf_name, start, stop), (stop - start, entry.shape[-1])
        if entry.dtype in _FLOATS:
            return safetensors_file.to_float32(raw.reshape(-1), entry.dtype, shape, f"{self.path}: {gguf_name}")
        grid = _grid_of(entry.dtype)
        if grid is not None:
            return _dequantize(raw, grid, shape)
        import gguf

        try:
            values = gguf.quants.dequantize(raw, GGMLQuantizationType[entry.dtype])
        except NotImplementedError as error:
            where = f"{self.path}: {gguf_name}"
            raise Unsupported("this ggml type cannot be dequantized", where=where, found=entry.dtype) from error
        return np.array(values, dtype=np.float32)


def _grid_of(dtype: str) -> str | None:
    """The lowbit grid of a ggml type with scales, if there is one."""
    if dtype in _FLOATS or dtype not in GGMLQuantizationType.__members__:
        return None
    try:
        return grids.by_ggml_type(GGMLQuantizationType[dtype]).name
    except LowbitError:
        return None


def _dequantize(raw: np.ndarray, grid_name: str, shape: tuple[int, ...]) -> np.ndarray:
    grid = grids.get(grid_name)
    values = grid.dequantize(grid.unpack(raw))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
