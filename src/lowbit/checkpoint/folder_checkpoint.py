"""A Hugging Face folder of safetensors, plain, quantized by a scheme, or trained by lowbit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import families, safetensors_file, schemes, static_activations
from lowbit.checkpoint.families.base import Family
from lowbit.checkpoint.gguf_file import Field, GgufFile
from lowbit.checkpoint.model import (
    BLOCKS,
    FORMAT,
    MANIFEST,
    METADATA,
    Checkpoint,
    TensorInfo,
    check_layers,
    check_shape,
    info_of,
    read_json,
    text_of,
)
from lowbit.checkpoint.safetensors_file import SafetensorsFile
from lowbit.checkpoint.tensor_file import TensorFile
from lowbit.errors import BadConfig, BadFile
from lowbit.grid.base import Blocks


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
        check_layers(config_path, [part.get("num_hidden_layers") for part in parts], len(self._files))
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
            check_shape(path, spec, file.entries[stored] if file else None, stored)
        for stored in sorted(set(self._files) - used):
            if not family.ignorable(stored, self.config):
                hint = "Is config.json the one that belongs to these weights?"
                raise BadFile("a tensor that the config does not have", where=f"{path}: {stored}", hint=hint)
        self._grids: dict[str, str] = {}
        self._blocks: SafetensorsFile | None = None
        self._also: dict[str, tuple[dict[str, str], SafetensorsFile]] = {}  # by recipe, of a training for several
        self._chosen: str | None = None
        self._metadata: GgufFile | None = GgufFile(path / METADATA) if (path / METADATA).exists() else None
        manifest = read_json(path / MANIFEST, BadFile) if (path / MANIFEST).exists() else {}
        if manifest.get("format") == FORMAT:
            self.manifest = manifest
            self._grids, self._blocks = self._opened(path, self.manifest.get("tensors", {}), BLOCKS)
            self._open_others(path)

    def _read_config(self, path: Path) -> dict[str, Any]:
        return read_json(path / "config.json", BadConfig)

    def _family(self, config: dict[str, Any], where: Path) -> Family:
        return families.by_config(config, where)

    def _open_others(self, path: Path) -> None:
        also = self.manifest.get("also", {})
        for recipe, entry in also.items() if isinstance(also, dict) else ():
            file = entry.get("file") if isinstance(entry, dict) else None
            if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
                raise BadFile("no file of blocks", where=path / MANIFEST, found=recipe, expected="a name in the folder")
            grid_names, blocks = self._opened(path, entry.get("tensors", {}), file)
            if blocks is not None:
                self._also[recipe] = grid_names, blocks

    def choose(self, recipe: str) -> None:
        self._chosen = recipe if recipe in self._also else None

    def _coded(self) -> tuple[dict[str, str], SafetensorsFile | None]:
        """The grids and the blocks of the recipe that is chosen."""
        return (self._grids, self._blocks) if self._chosen is None else self._also[self._chosen]

    def _opened(self, path: Path, tensors: Any, file: str) -> tuple[dict[str, str], SafetensorsFile | None]:
        where = path / MANIFEST
        if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
            raise BadFile("tensors is not a map of objects", where=where)
        found = {name: entry["grid"] for name, entry in tensors.items() if isinstance(entry.get("grid"), str)}
        if not found:
            return {}, None
        blocks = SafetensorsFile(path / file)
        for name, grid_name in found.items():
            spec, entry = self._spec(name), blocks.entries.get(name)
            grid = grids.get(grid_name)
            expected = (spec.n_rows, grid.row_bytes(spec.shape[-1]))
            if len(spec.shape) < 2 or entry is None or entry.dtype != "U8" or entry.shape != expected:
                raise BadFile(
                    f"the {grid_name} blocks are not there",
                    where=f"{path / file}: {name}",
                    found=f"{entry.dtype} {entry.shape}" if entry else "nothing",
                    expected=f"U8 {expected}",
                )
        return found, blocks

    @property
    def name(self) -> str:
        return (
            text_of(self._source.get("name"))
            or text_of(self.config.get("_name_or_path"))
            or _folder_name(self.path.resolve())
        )

    @property
    def license(self) -> str | None:
        if self.manifest:
            return text_of(self._source.get("license"))
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
            return info_of(spec, self._scheme.grid(self._files, stored), self._scheme.block_grid(self._files, stored))
        return info_of(spec, self._files[stored].entries[stored].dtype, self._coded()[0].get(name))

    @property
    def files(self) -> tuple[TensorFile, ...]:
        shards = {file.path.name: file for file in self._files.values()}
        others = [blocks for _, blocks in self._also.values()]
        return (*(shards[name] for name in sorted(shards)), *filter(None, (self._blocks, *others, self._metadata)))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        spec = self._spec(name)
        stored = self._stored[name]
        if self._scheme and stored in self._packed:
            return self._scheme.read_rows(self._files, stored, start, stop)
        if self._chosen is not None and name in self._coded()[0]:  # the values in the folder are the first recipe's
            coded = self.coded_rows(name, start, stop)
            assert coded is not None
            values: np.ndarray = grids.get(coded[0]).dequantize(coded[1])
            return values
        file = self._files[stored]
        where, shape = f"{file.path}: {stored}", (stop - start, spec.shape[-1] if spec.shape else 1)
        raw = file.read_rows(stored, start, stop)
        return safetensors_file.to_float32(raw.reshape(-1), file.entries[stored].dtype, shape, where)

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        self._spec(name)
        if self._scheme and self._stored[name] in self._packed:
            return self._scheme.block_rows(self._files, self._stored[name], start, stop)
        of, blocks = self._coded()
        return blocks.read_rows(name, start, stop) if name in of and blocks is not None else None

    def coded_rows(self, name: str, start: int, stop: int) -> tuple[str, Blocks] | None:
        stored = self._stored[self._spec(name).name]
        if self._scheme and stored in self._packed:
            return self._scheme.grid(self._files, stored), self._scheme.coded_rows(self._files, stored, start, stop)
        return super().coded_rows(name, start, stop)

    def activation_scales(self) -> dict[str, np.float32]:
        found = static_activations.read(self.path, self.manifest.get("activations"))
        for name, stored in self._stored.items():
            if self._scheme and stored in self._packed:
                beside = self._scheme.activation_scales(self._files, stored)
                own = stored.rpartition(name)[0]  # what the folder's names begin with
                found |= {scale.removeprefix(own): value for scale, value in beside.items()}
        return found

    def gguf_metadata(self) -> list[Field] | None:
        return list(self._metadata.fields) if self._metadata else None


def _folder_name(path: Path) -> str:
    """The folder's name; in huggingface_hub's cache (models--ORG--NAME/snapshots/COMMIT) the model's."""
    repository = path.parent.parent.name
    in_cache = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.split("--", 2)[-1] if in_cache else path.name
