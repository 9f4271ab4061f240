"""What a model family says: which keys its config has, which tensors follow from it, how GGUF spells both.

A family never touches tensor data. It describes each tensor (``TensorSpec``), and the one reader and the one packer
apply what the description says: a row order for query and key rows, an offset for norms.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.checkpoint.decoder import Decoder
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.tensor_file import n_rows, pick_rows
from lowbit.errors import BadConfig, BadFile, Unsupported

# Keys that every transformers config may carry and that change nothing about the numbers of a plain forward pass.
HARMLESS_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
    "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
_MAX_SIZE = 1 << 31
_MAX_NUMBER = 2.0**127

ReadRows = Callable[[int, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the text model.

    shape: row-major, as Hugging Face stores it. heads: > 0 where GGUF interleaves the rows of each head (rotary
    pairs side by side instead of in two halves). gguf_offset: what GGUF's values have on top of Hugging Face's.
    """

    name: str
    gguf_name: str
    role: str
    shape: tuple[int, ...]
    heads: int = 0
    gguf_offset: float = 0.0

    @property
    def n_rows(self) -> int:
        """Rows of the tensor seen as (rows, n), all leading dimensions flattened; 1 of a vector."""
        return n_rows(self.shape)

    def gguf_rows(self) -> np.ndarray | None:
        """Index array such that GGUF row i is Hugging Face row ``gguf_rows()[i]``; None where the order is the same."""
        if not self.heads:
            return None
        return np.arange(self.shape[0]).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def hf_rows(self) -> np.ndarray | None:
        """The inverse of ``gguf_rows``."""
        rows = self.gguf_rows()
        return None if rows is None else np.argsort(rows)

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        """Row-major, as GGUF stores it."""
        return self.shape

    @property
    def same_values(self) -> bool:
        """Whether GGUF's values are Hugging Face's, in whatever order."""
        return not self.gguf_offset

    @property
    def gguf_n_rows(self) -> int:
        """Rows of GGUF's tensor seen as (rows, n); 1 of a vector."""
        return n_rows(self.gguf_shape)

    def gguf_values(self, read: ReadRows, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of GGUF's tensor seen as (rows, n): float32 (stop - start, n). ``read``: from
        (first, last) to these rows of Hugging Face's, float32 of the caller's own."""
        values = pick_rows(self.gguf_rows(), start, stop, read, of_vector=len(self.shape) == 1)
        if self.gguf_offset:
            with np.errstate(invalid="ignore"):  # whoever uses the values checks that they are finite
                values += np.float32(self.gguf_offset)
        return values


TARGET = -1


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one layer keeps of each token it has read, so that later tokens can attend to it.

    kv_heads: key-value heads. k_dim, v_dim: elements of a head's key and of its value. window: tokens that a sliding
    layer attends to; None where the layer attends to everything. owner: the layer whose keys and values this one
    attends to instead of keeping its own; TARGET (-1) for those of the model that a drafter drafts for; None where
    the layer has its own.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    owner: int | None = None


def decoder_tensors(
    layer: Sequence[tuple[str, str, str, tuple[int, ...]]],
    n_layers: int,
    hidden: int,
    vocab: int,
    *,
    tied: bool,
    norm_offset: float = 0.0,
) -> tuple[TensorSpec, ...]:
    """Every tensor of a model of equal layers without biases, none of whose rows GGUF reorders.

    layer: (Hugging Face name, GGUF name, role, shape) of each tensor of a layer, the names without their beginning and
    ``.weight``. tied: the embedding is the output head. norm_offset: what GGUF's norms have on top of Hugging Face's.
    """
    named: list[tuple[str, str, str, tuple[int, ...]]] = [
        ("model.embed_tokens", "token_embd", "embedding", (vocab, hidden)),
        *(
            (f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}", role, shape)
            for i in range(n_layers)
            for ours, theirs, role, shape in layer
        ),
        ("model.norm", "output_norm", "norm", (hidden,)),
    ]
    if not tied:
        named.append(("lm_head", "output", "output", (vocab, hidden)))
    return tuple(
        TensorSpec(
            name=f"{ours}.weight",
            gguf_name=f"{theirs}.weight",
            role=role,
            shape=shape,
            gguf_offset=norm_offset if role == "norm" else 0.0,
        )
        for ours, theirs, role, shape in named
    )


def multimodal_name(name: str, stored: Collection[str]) -> str:
    """The name under which a folder holds tensor ``name`` of a text model that may be part of a multimodal one."""
    for prefix in ("", "language_model.", "model.language_model."):
        bare = name.removeprefix("model.") if prefix == "model.language_model." else name
        if prefix + bare in stored:
            return prefix + bare
    return name


class Family(ABC):
    """One family; subclasses set the class variables and write the methods."""

    name: ClassVar[str]
    arch: ClassVar[str]  # GGUF's general.architecture
    gguf_type: ClassVar[str] = "model"  # GGUF's general.type; a 'model' has a tokenizer
    model_types: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]
    spm_model: ClassVar[str] = "llama"  # tokenizer.ggml.model of a tokenizer with byte fallback
    packs: ClassVar[bool] = True  # False of a family that can be planned for and nothing else

    @abstractmethod
    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        """The text model's own config.json, checked key by key. Raises BadConfig or Unsupported naming the key."""

    @abstractmethod
    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        """Every tensor of the text model in file order; a tied output head is absent."""

    @abstractmethod
    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        """What each layer of a checked config caches, in order; empty where nothing is cached."""

    def stored_name(self, name: str, stored: Collection[str]) -> str:
        """The name under which a Hugging Face folder holds tensor ``name`` (multimodal models prefix theirs)."""
        return name

    def ignorable(self, stored_name: str, config: Mapping[str, Any]) -> bool:
        """Whether a folder may hold this tensor although the text model has no use for it."""
        return False

    def unused_in_gguf(self, gguf_name: str, config: Mapping[str, Any]) -> bool:
        """Whether a GGUF may hold this tensor although the text model has no use for it."""
        return False

    @abstractmethod
    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        """The architecture's GGUF key-values (``<arch>.*``) for a config."""

    @abstractmethod
    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        """config.json rebuilt from a GGUF's key-values and tensor shapes (by GGUF name, row-major)."""

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as mlx-lm's model of this family reads it. Raises Unsupported where it has none."""
        raise Unsupported("lowbit does not write this family for MLX", found=self.name, hint="--to gguf has it")

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        """What a model of a checked config computes. Raises Unsupported where lowbit cannot write that down."""
        raise Unsupported("lowbit does not write this family for LiteRT-LM", found=self.name, hint="--to gguf has it")

    def computed(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Tensors that GGUF stores and Hugging Face computes from the config (by GGUF name, float32)."""
        return {}

    def adopt_computed(self, config: dict[str, Any], name: str, values: np.ndarray, where: object) -> None:
        """Puts into a config rebuilt from a GGUF what its stored ``name`` tells; raises if that is unknown."""
        raise Unsupported("lowbit does not know this tensor", where=f"{where}: {name}")


class Keys:
    """Reads a config's keys one by one, remembers which were asked for, and refuses the rest."""

    def __init__(self, config: Mapping[str, Any], where: object, defaults: Mapping[str, Any] | None = None) -> None:
        self.config, self.where, self.defaults = config, where, defaults or {}
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, most: int = _MAX_SIZE, least: int = 1) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self.get(key, self.defaults.get(key, default))
        if value is None:
            raise BadConfig(f"missing key {key}", where=self.where, expected="a positive whole number")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            expected = f"{least} to {most}"
            raise BadConfig(f"bad value for {key}", where=self.where, found=repr(value)[:60], expected=expected)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, self.defaults.get(key, default))
        if value is None:
            raise BadConfig(f"missing key {key}", where=self.where, expected="a positive number")
        return positive(key, value, self.where)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise BadConfig(f"bad value for {key}", where=self.where, found=repr(value)[:60], expected="true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The key may be absent or null, or have one of the values that lowbit and llama.cpp compute with."""
        value = self.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(repr(a) for a in allowed) or "null"
            raise Unsupported(f"{key} has an unsupported value", where=self.where, found=value, expected=expected)

    def finish(self) -> None:
        """Call last: any key not asked for is unknown."""
        if "quantization_config" in self.config:
            raise Unsupported(
                "the checkpoint is already quantized", where=self.where, found="quantization_config",
                hint="Start from the unquantized checkpoint",
            )  # fmt: skip
        if "auto_map" in self.config:
            raise Unsupported(
                "the config names code of its own, and lowbit runs no remote code", where=self.where, found="auto_map"
            )
        unknown = sorted(set(self.config) - self.asked - HARMLESS_KEYS)
        if unknown:
            raise BadConfig(
                f"unknown key {unknown[0]}",
                where=self.where,
                found=", ".join(unknown),
                hint="lowbit does not know what it changes; remove it if it changes nothing",
            )


def positive(key: str, value: Any, where: object) -> float:
    """``value`` as a float, if it is a finite number above zero."""
    # Numbers end up as float32 in the file and in the model, which JSON's own may be far beyond.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_NUMBER:
        raise BadConfig(f"bad value for {key}", where=where, found=repr(value)[:60], expected="a positive number")
    return float(value)


def rope_of(config: Mapping[str, Any], where: object, allowed: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """``rope_parameters`` of a config in which all layers rotate alike, under either of transformers' keys."""
    theta = config.get("rope_theta") or 10000.0
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    return rope_parameters(config.get(key), where, allowed, theta, key)


def mlx_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm's keys of a rope: it knows ``rope_parameters`` for few models only."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if rope["rope_type"] != "default" else None}


def rope_parameters(
    value: Any, where: object, allowed: Mapping[str, tuple[str, ...]], theta: float, key: str = "rope_parameters"
) -> dict[str, Any]:
    """A rope description in either of transformers' spellings, as {rope_type, rope_theta, ...}.

    ``allowed`` maps each supported rope type to the numbers that it must have. ``theta`` fills an absent rope_theta.
    """
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise BadConfig(f"bad value for {key}", where=where, found=repr(value)[:60], expected="an object")
    rest = dict(value)
    kinds = [k for k in (rest.pop("rope_type", None), rest.pop("type", None)) if k is not None] or ["default"]
    kind = kinds[0]
    if kinds[-1] != kind or not isinstance(kind, str) or kind not in allowed:
        raise Unsupported(f"{key} has an unsupported rope_type", where=where, found=kind, expected=list(allowed))
    result = {"rope_type": kind, "rope_theta": positive(f"{key}.rope_theta", rest.pop("rope_theta", theta), where)}
    if "partial_rotary_factor" not in allowed[kind] and rest.pop("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise Unsupported("partial_rotary_factor is not supported", where=where)
    for number in allowed[kind]:
        if number not in rest:
            raise BadConfig(f"missing key {key}.{number}", where=where, expected=f"a number, for rope type {kind}")
        result[number] = positive(f"{key}.{number}", rest.pop(number), where)
    if rest:
        raise BadConfig(f"unknown key {key}.{sorted(rest)[0]}", where=where)
    return result


class Gguf:
    """Typed reading of a GGUF's key-values, with errors that name the key."""

    def __init__(self, values: Mapping[str, Any], arch: str, where: object) -> None:
        self.values, self.arch, self.where = values, arch, where

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(f"{self.arch}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise BadFile(f"missing key {self.arch}.{key}", where=self.where)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # a value a layer, all the same
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_SIZE:
            what = f"bad value for {self.arch}.{key}"
            raise BadFile(what, where=self.where, found=repr(value)[:60], expected="a positive whole number")
        return value

    def count(self, key: str) -> int:
        """A whole number that may be 0, and is where the key is absent."""
        return 0 if self.get(key, 0) == 0 else self.size(key)

    def each(self, key: str, n: int, default: int | None = None) -> list[int]:
        """A positive whole number for each of ``n`` layers: an array, or one number for all."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return [self.size(key, default)] * n
        if len(value) != n or not all(type(v) is int and 0 < v <= _MAX_SIZE for v in value):
            what = f"bad value for {self.arch}.{key}"
            raise BadFile(what, where=self.where, found=repr(value)[:60], expected=f"{n} positive whole numbers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise BadFile(f"missing key {self.arch}.{key}", where=self.where)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_NUMBER:
            raise BadFile(f"bad value for {self.arch}.{key}", where=self.where, found=repr(value)[:60])
        # The file has float32 where the config had a decimal: 9.999999747378752e-06 was written as 1e-05.
        return float(np.format_float_scientific(np.float32(value), unique=True))

    def token_ids(self) -> dict[str, int | None]:
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {ours: self.values.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}

    def only(self, *known: str) -> None:
        """Refuses keys of the architecture that lowbit does not know."""
        pattern = re.compile(rf"{re.escape(self.arch)}\.(?P<key>.*)")
        for full in self.values:
            match = pattern.fullmatch(full)
            if match and match["key"] not in known:
                raise Unsupported("a key of the model that lowbit does not know", where=self.where, found=full)


def uint(key: str, value: int) -> Field:
    return Field(key, int(value), GGUFValueType.UINT32)


def real(key: str, value: float) -> Field:
    return Field(key, float(value), GGUFValueType.FLOAT32)


def text(key: str, value: str) -> Field:
    return Field(key, value, GGUFValueType.STRING)


def array(key: str, values: Sequence[Any], kind: GGUFValueType) -> Field:
    return Field(key, list(values), GGUFValueType.ARRAY, kind)
