"""A checkpoint as named tensors in Hugging Face's layout, whatever container holds them, read one at a time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import grid as grids
from lowbit.checkpoint import families, safetensors_file, schemes
from lowbit.checkpoint.families.base import Family, TensorSpec
from lowbit.checkpoint.gguf_file import Field, GgufFile
from lowbit.checkpoint.resolve import resolve
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.tensor_file import Entry, TensorFile, n_rows, pick_rows
from lowbit.errors import BadConfig, BadFile, LowbitError, NotFound, Unsupported
from lowbit.grid.base import Blocks

FORMAT = "lowbit-checkpoint/1"
MANIFEST, BLOCKS, METADATA = "lowbit.json", "blocks.safetensors", "metadata.gguf"
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a checkpoint.

    name, shape: Hugging Face's. dtype: as stored ('F32', 'BF16', 'Q4_1', ...). grid: the lowbit grid whose stored
    codes and scales ``Checkpoint.blocks`` gives, or None. role: 'embedding', 'output', 'attn_q', 'attn_k', 'attn_v',
    'attn_o', 'ffn_gate', 'ffn_up', 'ffn_down', 'norm', 'bias' or 'scale'; of experts 'router', 'experts_gate_up' and
    'experts_down', which have a dimension more; of per-layer embeddings 'per_layer_embedding', 'per_layer_model_proj',
    'per_layer_gate' and 'per_layer_proj'; of a drafter 'pre_projection' and 'post_projection'.
    """

    name: str
    gguf_name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    grid: str | None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """An open checkpoint. Made by ``open_checkpoint``; a context manager."""

    path: Path
    kind: str  # 'safetensors' or 'gguf'
    config: dict[str, Any]  # the text model's config.json
    family: Family
    names: tuple[str, ...]

    def __init__(self, path: Path, kind: str, config: dict[str, Any], family: Family) -> None:
        self.path, self.kind, self.config, self.family = path, kind, config, family
        self.specs = {spec.name: spec for spec in family.tensors(config)}
        self.names = tuple(self.specs)
        self.manifest: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """The open files that the tensors are in."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the files."""
        for file in self.files:
            file.close()

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return "lm_head.weight" not in self.specs

    @property
    def n_weights(self) -> int:
        """Weights of the text model; a tied embedding counts once."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def license(self) -> str | None:
        raise NotImplementedError

    @property
    def tokenizer_source(self) -> Path:
        """What transformers' AutoTokenizer loads from: a folder, or a GGUF (its parent, with gguf_file=its name)."""
        raise NotImplementedError

    def info(self, name: str) -> TensorInfo:
        raise NotImplementedError

    def read(self, name: str) -> np.ndarray:
        """The tensor in Hugging Face's layout: a fresh float32 array of ``info(name).shape``, dequantized."""
        spec = self._spec(name)
        return self.read_rows(name, 0, spec.n_rows).reshape(spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of ``read(name)`` seen as (rows, n), all leading dimensions flattened and a vector
        as one row: a fresh float32 (stop - start, n). Nothing else of the tensor is read. Any thread may call it."""
        raise NotImplementedError

    def blocks(self, name: str) -> np.ndarray | None:
        """The stored codes and scales, uint8 (spec.n_rows, row_bytes) in Hugging Face's row order, where
        ``info(name).grid`` is not None; None elsewhere."""
        return self.block_rows(name, 0, self._spec(name).n_rows)

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Rows ``start`` to ``stop`` of ``blocks(name)``; nothing else of the tensor is read."""
        raise NotImplementedError

    def coded_rows(self, name: str, start: int, stop: int) -> tuple[str, Blocks] | None:
        """Rows ``start`` to ``stop`` of the codes and scales as they are stored, and the name of the grid they are of;
        None where a tensor has none. Unlike ``block_rows`` this loses nothing of scales that are not float16."""
        grid, raw = self.info(name).grid, self.block_rows(name, start, stop)
        return None if grid is None or raw is None else (grid, grids.get(grid).unpack(raw))

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Rows ``start`` to ``stop`` of the tensor as the GGUF that this checkpoint is has them, float32: in its order
        and with its offset, without the way to Hugging Face's and back, on which a norm's last bits are lost. None for
        a folder."""
        return None

    def gguf_metadata(self) -> list[Field] | None:
        """Every key-value of the GGUF that this checkpoint comes from, untouched; None if there is none."""
        return None

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self.specs[name]
        except KeyError:
            raise NotFound("no such tensor", where=f"{self.path}: {name}") from None


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens ``model`` (see ``resolve``) and checks it whole: config, names, shapes, byte counts. Reads no tensor yet.

    Raises NotFound, BadFile, BadConfig or Unsupported.
    """
    path = resolve(model)
    try:
        return FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=error.filename or path) from error


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
        _check_layers(path, values.get(f"{family.arch}.block_count"), len(shapes))
        config = family.config_from_gguf(values, shapes, path)
        known = {spec.gguf_name for spec in family.tensors(config)}
        for name in self._file.entries:
            if name not in known and not family.unused_in_gguf(name, config):
                family.adopt_computed(config, name, self._whole(name), path)
        super().__init__(path, "gguf", family.text_config(config, path), family)
        for spec in self.specs.values():
            _check_shape(path, spec, self._file.entries.get(spec.gguf_name), spec.gguf_name)

    @property
    def name(self) -> str:
        return _text(self._file.values.get("general.name")) or self.path.stem

    @property
    def license(self) -> str | None:
        return _text(self._file.values.get("general.license"))

    @property
    def tokenizer_source(self) -> Path:
        return self.path

    def info(self, name: str) -> TensorInfo:
        spec = self._spec(name)
        dtype = self._file.entries[spec.gguf_name].dtype
        return _info(spec, dtype, _grid_of(dtype) if len(spec.shape) > 1 else None)

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


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder of safetensors; with lowbit.json beside it, one that lowbit trained."""

    def __init__(self, path: Path) -> None:
        config_path = path / "config.json"
        config = self._read_config(path)
        family = self._family(config, config_path)
        self._scheme = schemes.scheme_of(config, config_path)
        for key in schemes.KEYS:
            config.pop(key, None)
        checked = family.text_config(config, config_path)
        self._files = safetensors_file.open_folder(path)
        parts = (checked, *(part for part in checked.values() if isinstance(part, dict)))  # a drafter's, a tower's
        _check_layers(config_path, [part.get("num_hidden_layers") for part in parts], len(self._files))
        super().__init__(path, "safetensors", checked, family)
        self._packed = self._scheme.matrices(self._files) if self._scheme else set()  # by stored name
        stored_names = self._files.keys() | self._packed
        self._stored = {name: family.stored_name(name, stored_names) for name in self.names}
        used = set(self._stored.values())
        for spec in self.specs.values():
            stored = self._stored[spec.name]
            if self._scheme and stored in self._packed:
                self._scheme.check(self._files, stored, spec.shape)
                used |= {*self._scheme.parts(stored)}
                continue
            file = self._files.get(stored)
            _check_shape(path, spec, file.entries[stored] if file else None, stored)
        for stored in sorted(set(self._files) - used):
            if not family.ignorable(stored, self.config):
                hint = "Is config.json the one that belongs to these weights?"
                raise BadFile("a tensor that the config does not have", where=f"{path}: {stored}", hint=hint)
        self._grids: dict[str, str] = {}
        self._blocks: SafetensorsFile | None = None
        self._metadata: GgufFile | None = GgufFile(path / METADATA) if (path / METADATA).exists() else None
        manifest = read_json(path / MANIFEST, BadFile) if (path / MANIFEST).exists() else {}
        if manifest.get("format") == FORMAT:
            self.manifest = manifest
            self._open_blocks(path)

    def _read_config(self, path: Path) -> dict[str, Any]:
        return read_json(path / "config.json", BadConfig)

    def _family(self, config: dict[str, Any], where: Path) -> Family:
        return families.by_config(config, where)

    def _open_blocks(self, path: Path) -> None:
        where = path / MANIFEST
        tensors = self.manifest.get("tensors", {})
        if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
            raise BadFile("tensors is not a map of objects", where=where)
        self._grids = {name: entry["grid"] for name, entry in tensors.items() if isinstance(entry.get("grid"), str)}
        if not self._grids:
            return
        self._blocks = SafetensorsFile(path / BLOCKS)
        for name, grid_name in self._grids.items():
            spec, entry = self._spec(name), self._blocks.entries.get(name)
            grid = grids.get(grid_name)
            expected = (spec.n_rows, spec.shape[-1] // grid.block_size * grid.block_bytes)
            if len(spec.shape) < 2 or entry is None or entry.dtype != "U8" or entry.shape != expected:
                found = f"{entry.dtype} {entry.shape}" if entry else "nothing"
                raise BadFile(
                    f"the {grid_name} blocks are not there",
                    where=f"{path / BLOCKS}: {name}",
                    found=found,
                    expected=f"U8 {expected}",
                )

    @property
    def name(self) -> str:
        return (
            _text(self._source.get("name"))
            or _text(self.config.get("_name_or_path"))
            or _folder_name(self.path.resolve())
        )

    @property
    def license(self) -> str | None:
        if self.manifest:
            return _text(self._source.get("license"))
        card = self.path / "README.md"
        if not card.is_file() or card.stat().st_size > 1 << 20:
            return None
        match = re.match(r"---\r?\n.*?^license:[ \t]*([\w.-]+)", card.read_text("utf-8", "replace"), re.S | re.M)
        return match[1] if match else None

    @property
    def tokenizer_source(self) -> Path:
        return self.path / METADATA if self._metadata else self.path

    @property
    def _source(self) -> dict[str, Any]:
        source = self.manifest.get("source")
        return source if isinstance(source, dict) else {}

    def info(self, name: str) -> TensorInfo:
        spec = self._spec(name)
        stored = self._stored[name]
        if self._scheme and stored in self._packed:
            return _info(spec, self._scheme.grid(self._files, stored), self._scheme.block_grid())
        return _info(spec, self._files[stored].entries[stored].dtype, self._grids.get(name))

    @property
    def files(self) -> tuple[TensorFile, ...]:
        shards = {file.path.name: file for file in self._files.values()}
        return (*(shards[name] for name in sorted(shards)), *filter(None, (self._blocks, self._metadata)))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        spec = self._spec(name)
        stored = self._stored[name]
        if self._scheme and stored in self._packed:
            return self._scheme.read_rows(self._files, stored, start, stop)
        file = self._files[stored]
        where, shape = f"{file.path}: {stored}", (stop - start, spec.shape[-1] if spec.shape else 1)
        raw = file.read_rows(stored, start, stop)
        return safetensors_file.to_float32(raw.reshape(-1), file.entries[stored].dtype, shape, where)

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        self._spec(name)
        if self._scheme and self._stored[name] in self._packed:
            return self._scheme.block_rows(self._files, self._stored[name], start, stop)
        if name not in self._grids or self._blocks is None:
            return None
        return self._blocks.read_rows(name, start, stop)

    def coded_rows(self, name: str, start: int, stop: int) -> tuple[str, Blocks] | None:
        stored = self._stored[self._spec(name).name]
        if self._scheme and stored in self._packed:
            return self._scheme.grid(self._files, stored), self._scheme.coded_rows(self._files, stored, start, stop)
        return super().coded_rows(name, start, stop)

    def gguf_metadata(self) -> list[Field] | None:
        return list(self._metadata.fields) if self._metadata else None


def read_json(path: Path, error_class: type[LowbitError]) -> dict[str, Any]:
    """A JSON object from a file; ``error_class`` where it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_class("not valid JSON", where=path, found=error) from error
    if not isinstance(value, dict):
        raise error_class("not a JSON object", where=path)
    return value


def _folder_name(path: Path) -> str:
    """The folder's name; in huggingface_hub's cache (models--ORG--NAME/snapshots/COMMIT) the model's."""
    repository = path.parent.parent.name
    in_cache = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.split("--", 2)[-1] if in_cache else path.name


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


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


def _info(spec: TensorSpec, dtype: str, grid: str | None) -> TensorInfo:
    return TensorInfo(
        name=spec.name, gguf_name=spec.gguf_name, role=spec.role, shape=spec.shape, dtype=dtype, grid=grid
    )


def _check_layers(where: Path, layers: object, n_tensors: int) -> None:
    """Refuses more layers than there are tensors, before each layer's tensors are listed."""
    for n in layers if isinstance(layers, list) else [layers]:
        if isinstance(n, int) and n > n_tensors:
            raise BadFile(
                "more layers than the file has tensors",
                where=where,
                found=n,
                expected=f"at most {n_tensors}",
                hint="The download is incomplete, or of another model",
            )


def _check_shape(path: Path, spec: TensorSpec, entry: Entry | None, stored: str) -> None:
    if entry is None:
        raise BadFile("a tensor of the model is missing", where=f"{path}: {stored}", hint="The download is incomplete")
    if entry.shape != spec.shape:
        raise BadFile(
            "a tensor's shape is not what the config gives",
            where=f"{path}: {stored}",
            found=list(entry.shape),
            expected=list(spec.shape),
        )
