"""A .litertlm that lowbit wrote, read as a checkpoint in Hugging Face's names and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint import families
from lowbit.checkpoint.litertlm_file import CONFIG, SCALES, LitertLmFile, flip
from lowbit.checkpoint.model import Checkpoint, TensorInfo, check_layers, check_shape, info_of, text_of
from lowbit.checkpoint.tensor_file import TensorFile
from lowbit.errors import BadFile, Unsupported
from lowbit.grid._channelwise import Channelwise
from lowbit.grid.base import Blocks


class LitertLmCheckpoint(Checkpoint):
    """The weights of the model in the file. Norms lie there with what their family adds to them, so ``stored_rows`` are
    exact and ``read_rows`` of a norm may differ in a last bit from what was packed."""

    def __init__(self, path: Path) -> None:
        self._file = LitertLmFile(path)
        config = _config(self._file.header.entries.get(CONFIG), path)
        family = families.by_config(config, path)
        check_layers(path, config.get("num_hidden_layers"), len(self._file.entries))
        super().__init__(path, "litert-lm", family.text_config(config, path), family)
        self._norm_offset = np.float32(family.decoder(self.config).norm_offset)
        for spec in self.specs.values():
            check_shape(path, spec, self._file.entries.get(spec.name), spec.name)

    @property
    def name(self) -> str:
        return text_of(self.config.get("_name_or_path")) or self.path.stem

    @property
    def license(self) -> str | None:
        return None

    @property
    def files(self) -> tuple[TensorFile, ...]:
        return (self._file,)

    def info(self, name: str) -> TensorInfo:
        dtype = self._file.entries[self._spec(name).name].dtype
        return info_of(self.specs[name], dtype, None if dtype == "F32" else dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        coded = self.coded_rows(name, start, stop)
        if coded is not None:
            return np.ascontiguousarray(grids.get(coded[0]).dequantize(coded[1]), np.float32)
        values = self.stored_rows(name, start, stop)
        assert values is not None
        return values - self._norm_offset if self.specs[name].role == "norm" else values

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Rows of the float32 numbers that LiteRT computes with; None of a tensor with codes."""
        if self.info(name).grid is not None:
            return None
        n = self.specs[name].shape[-1]
        return self._file.floats(name, start * n, stop * n).reshape(stop - start, n)

    def coded_rows(self, name: str, start: int, stop: int) -> tuple[str, Blocks] | None:
        name_of_grid = self.info(name).grid
        if name_of_grid is None:
            return None
        grid = grids.get(name_of_grid)
        assert isinstance(grid, Channelwise)
        codes = grid.unpack_codes(flip(self._file.read_rows(name, start, stop), grid.bits))
        scales = self._file.floats(name + SCALES, start, stop)
        return grid.name, Blocks(codes=codes[:, None, :], scales=scales[:, None])

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        coded = self.coded_rows(name, start, stop)
        return None if coded is None else grids.get(coded[0]).pack(coded[1])


def _config(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        hint = "Only those that lowbit wrote say which weights are which"
        raise Unsupported("the file does not say what model it is", where=path, found=f"no {CONFIG}", hint=hint)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile("the model's config is not JSON", where=path, found=error) from error
    if not isinstance(config, dict):
        raise BadFile("the model's config is not an object", where=path)
    return config
