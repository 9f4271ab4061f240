"""A checkpoint as named tensors in Hugging Face's layout, whatever container holds them, read one at a time."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint.families.base import Family, TensorSpec
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.tensor_file import Entry, TensorFile
from lowbit.errors import BadFile, LowbitError, NotFound
from lowbit.grid.base import Blocks

FORMAT = "lowbit-checkpoint/1"
MANIFEST, BLOCKS, METADATA = "lowbit.json", "blocks.safetensors", "metadata.gguf"
ACTIVATIONS = "activations.safetensors"  # scales of static int8 activations, where they were trained


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

    def activation_scales(self) -> dict[str, np.float32]:
        """Those of static int8 activations, by the names that ``static_activations`` tells; {} where there are none."""
        return {}

    def choose(self, recipe: str) -> None:
        """From here on codes and values are that recipe's, where training was for several; else the first one's."""

    def gguf_metadata(self) -> list[Field] | None:
        """Every key-value of the GGUF that this checkpoint comes from, untouched; None if there is none."""
        return None

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self.specs[name]
        except KeyError:
            raise NotFound("no such tensor", where=f"{self.path}: {name}") from None


def read_json(path: Path, error_class: type[LowbitError]) -> dict[str, Any]:
    """A JSON object from a file; ``error_class`` where it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise error_class("not valid JSON", where=path, found=error) from error
    if not isinstance(value, dict):
        raise error_class("not a JSON object", where=path)
    return value


def text_of(value: object) -> str | None:
    """A text that says something; None of anything else."""
    return value if isinstance(value, str) and value else None


def info_of(spec: TensorSpec, dtype: str, grid: str | None) -> TensorInfo:
    """What is told of a tensor that is stored as ``dtype``."""
    return TensorInfo(
        name=spec.name, gguf_name=spec.gguf_name, role=spec.role, shape=spec.shape, dtype=dtype, grid=grid
    )


def check_layers(where: Path, layers: object, n_tensors: int) -> None:
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


def check_shape(path: Path, spec: TensorSpec, entry: Entry | None, stored: str) -> None:
    """Raises BadFile unless the tensor is there, in its shape."""
    if entry is None:
        raise BadFile("a tensor of the model is missing", where=f"{path}: {stored}", hint="The download is incomplete")
    if entry.shape != spec.shape:
        raise BadFile(
            "a tensor's shape is not what the config gives",
            where=f"{path}: {stored}",
            found=list(entry.shape),
            expected=list(spec.shape),
        )
