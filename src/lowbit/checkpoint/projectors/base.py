"""What is said of a vision or audio tower and its projector: which keys its config has, which tensors follow from it,
and how the file that llama.cpp's mtmd loads beside the text model (an mmproj) spells both.

Names and keys: tools/mtmd/clip-impl.h of llama.cpp; which tensor has which type: conversion/base.py and gemma.py there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.checkpoint.families.base import Family, LayerCache, ReadRows, TensorSpec, real, text, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

# The type of a tensor where it is not the recipe's. llama.cpp reads some by kernels that know few types.
ALWAYS_F32 = {"f16": "f32", "bf16": "f32", "q8_0": "f32"}
PATCHES = {"bf16": "f32", "q8_0": "f32"}  # a convolution's kernel is F16 or F32
TRANSPOSED = {"bf16": "f16", "q8_0": "f16"}  # transposed as it is read


@dataclass(frozen=True, kw_only=True)
class ProjectorSpec(TensorSpec):
    """One tensor of a tower or projector.

    view, axes: GGUF's values are ``values.reshape(view).transpose(axes)`` of Hugging Face's, in shape ``stored``.
    stored: GGUF's shape, row-major; Hugging Face's where it is not given. compute: what is then done to each value.
    instead: the type of the tensor by recipe, where it is not the recipe's own.
    """

    view: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    compute: Callable[[np.ndarray], np.ndarray] | None = None
    instead: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        return self.stored or self.shape

    @property
    def same_values(self) -> bool:
        return super().same_values and self.compute is None

    def gguf_values(self, read: ReadRows, start: int, stop: int) -> np.ndarray:
        if not self.view:
            values = super().gguf_values(read, start, stop)
        elif self.axes[0] == 0 and self.view[0] == self.n_rows:
            # Each row of Hugging Face's becomes ``each`` whole rows.
            each = self.gguf_n_rows // self.n_rows
            first, last = start // each, -(-stop // each)
            values = read(first, last).reshape(last - first, *self.view[1:]).transpose(self.axes)
            values = values.reshape((last - first) * each, -1)[start - first * each : stop - first * each]
        else:
            whole = read(0, self.n_rows).reshape(self.view).transpose(self.axes)
            values = whole.reshape(self.gguf_n_rows, -1)[start:stop]
        return values if self.compute is None else self.compute(values)


class Projector(Family):
    """The towers and projectors of one family; subclasses set the class variables and write the methods.

    parts: the keys of config.json that describe a tower ('vision_config'); at least one must be there.
    """

    arch = "clip"
    gguf_type = "mmproj"
    parts: ClassVar[tuple[str, ...]] = ("vision_config",)

    @abstractmethod
    def own_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        """What ``tensors`` and ``metadata`` need, from the whole config.json with the preprocessor's settings under
        ``preprocessor.KEY``, checked key by key. Raises BadConfig or Unsupported naming the key."""

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        return self.own_config(config, where)

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        return ()  # a tower sees its image once

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        raise Unsupported("a packed mmproj is not read as a checkpoint", where=where)


def part(config: Mapping[str, Any], key: str, where: object) -> dict[str, Any]:
    """The object under ``key`` of a config. Raises BadConfig."""
    value = config.get(key)
    if not isinstance(value, dict):
        raise BadConfig(f"missing key {key}", where=where, expected="an object")
    return value


def text_hidden_size(config: Mapping[str, Any], where: object, default: int) -> int:
    """Width of the text model that the projector feeds; ``default`` is its config class's. Raises BadConfig."""
    value = part(config, "text_config", where).get("hidden_size", default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
        raise BadConfig("bad value for text_config.hidden_size", where=where, found=repr(value)[:60])
    return value


def check_attention(config: Mapping[str, Any], where: object, default: str | None, runs: str | None) -> None:
    """Raises Unsupported where an image's tokens attend to each other differently from what llama.cpp ``runs``:
    'vision', each to all of its image, or None, each to those before it. ``default`` is the text config class's."""
    found = part(config, "text_config", where).get("use_bidirectional_attention", default)
    if found != runs:
        raise Unsupported(
            "llama.cpp has another attention among an image's tokens for a text model of this kind and width",
            where=where, found=f"use_bidirectional_attention {found!r}"[:80], expected=repr(runs),
        )  # fmt: skip


def layers(
    ours: str, theirs: str, n_layers: int, named: Sequence[tuple[str, str, str, tuple[int, ...]]]
) -> list[ProjectorSpec]:
    """The tensors of equal layers. named: (Hugging Face name, GGUF name, role, shape) of each tensor of a layer, after
    the layer's own ``ours.0.`` and ``theirs.0.``."""
    return [
        ProjectorSpec(name=f"{ours}.{i}.{hf}", gguf_name=f"{theirs}.{i}.{gguf}", role=role, shape=shape)
        for i in range(n_layers)
        for hf, gguf, role, shape in named
    ]


def reals(key: str, values: Sequence[float]) -> Field:
    return Field(key, [float(value) for value in values], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def flag(key: str, value: bool) -> Field:
    return Field(key, value, GGUFValueType.BOOL)


def tower_metadata(
    kind: str, *, sizes: Mapping[str, int], eps: float, projector: str, only: bool = False
) -> list[Field]:
    """The key-values that every tower has. kind: 'vision' or 'audio'; sizes: projection_dim, embedding_length,
    feed_forward_length, block_count, attention.head_count; projector: mtmd's name of the projector; only: the family
    has no tower of another kind, and the projector goes under the one key that older readers know."""
    return [
        flag(f"clip.has_{kind}_encoder", True),
        text("clip.projector_type" if only else f"clip.{kind}.projector_type", projector),
        *(uint(f"clip.{kind}.{key}", value) for key, value in sizes.items()),
        real(f"clip.{kind}.attention.layer_norm_epsilon", eps),
    ]
