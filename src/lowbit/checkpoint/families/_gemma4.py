"""What Gemma 4's models and their drafters share: the text config, a layer's tensors, the metadata.

Layers that attend to a window and layers that attend to everything differ in head size and in key-value heads. The last
``num_kv_shared_layers`` have no keys and values of their own. llama.cpp takes from nowhere but its code which layer's
they use, so a config must agree with it: those of the last full and the last window layer before them, which must be
neighbours in this order. Read from llama.cpp (src/models/gemma4.cpp, src/llama-model.cpp, conversion/gemma.py) and
transformers (models/gemma4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGUFValueType

from lowbit.checkpoint.families.base import Keys, LayerCache, TensorSpec, array, positive, real, rope_parameters, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, Unsupported

ROPE_FREQS = "rope_freqs.weight"
FULL, WINDOW = "full_attention", "sliding_attention"
_ROPES: dict[str, dict[str, tuple[str, ...]]] = {
    FULL: {"proportional": ("partial_rotary_factor",), "default": ()},
    WINDOW: {"default": ()},
}
_THETAS = {FULL: 1_000_000.0, WINDOW: 10_000.0}
_DEFAULT_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": _THETAS[FULL]},
    WINDOW: {"rope_type": "default", "rope_theta": _THETAS[WINDOW]},
}
_GLOBAL_HEAD_DIM = 512  # what Gemma4TextConfig fills in
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "sliding_window",
)  # fmt: skip
_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
# A frequency divided by this much turns nothing: how GGUF spells the part of a head that is not rotated.
_NEVER = 1e30


class Layer(NamedTuple):
    """What differs between layers. owns_kv: whether it computes keys and values; wide: its MLP's size."""

    full: bool
    head_dim: int
    kv_heads: int
    owns_kv: bool
    wide: int


def layers(config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Every layer of a checked text config, in order."""
    first_shared = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    kv_heads, found = config["num_key_value_heads"], []
    for i, kind in enumerate(config["layer_types"]):
        full, shares = kind == FULL, i >= first_shared
        found.append(
            Layer(
                full=full,
                head_dim=config["global_head_dim"] if full else config["head_dim"],
                kv_heads=(config["num_global_key_value_heads"] or kv_heads) if full else kv_heads,
                owns_kv=not shares,
                wide=config["intermediate_size"] * (2 if shares and config["use_double_wide_mlp"] else 1),
            )
        )
    return tuple(found)


def checked(config: Mapping[str, Any], where: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A Gemma 4 text config with every key of meaning filled in, checked key by key; ``defaults`` for absent sizes.

    The sizes of full layers come out in both of transformers' spellings, ``global_head_dim`` and ``per_layer_config``.
    """
    keys = Keys(config, where, defaults)
    sizes: dict[str, Any] = {key: keys.size(key) for key in _SIZES}
    n_layers = sizes["num_hidden_layers"] = keys.size("num_hidden_layers", most=10_000)
    sizes["rms_norm_eps"] = keys.number("rms_norm_eps")
    for key, default in (("tie_word_embeddings", True), ("attention_k_eq_v", False), ("use_double_wide_mlp", False)):
        sizes[key] = keys.flag(key, default)
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    keys.only("use_bidirectional_attention", "vision")  # of image tokens, which no text has
    if (cap := keys.get("final_logit_softcapping")) is not None:
        positive("final_logit_softcapping", cap, where)
    sizes["num_kv_shared_layers"] = keys.size("num_kv_shared_layers", 0, least=0, most=n_layers)
    sizes["layer_types"] = checked_layer_types(keys.get("layer_types"), n_layers, where)
    sizes |= _per_layer_input(keys, sizes["vocab_size"]) | _experts(keys) | _full_layers(keys, sizes)
    for layer in set(layers(sizes)):
        if layer.head_dim % 2 or sizes["num_attention_heads"] % layer.kv_heads:
            raise BadConfig(
                "head sizes must be even and num_attention_heads a multiple of the key-value heads", where=where,
                found=f"head size {layer.head_dim}, {sizes['num_attention_heads']} heads, {layer.kv_heads} key-value",
            )  # fmt: skip
    sizes["rope_parameters"] = _ropes(keys.get("rope_parameters"), where)
    keys.finish()
    return {**config, **sizes}


def checked_layer_types(given: Any, n_layers: int, where: object) -> list[str]:
    if given is None:
        given = [WINDOW if (i + 1) % 6 else FULL for i in range(n_layers)]
    if not isinstance(given, list) or len(given) != n_layers or any(kind not in (FULL, WINDOW) for kind in given):
        expected = f"{n_layers} of {FULL} and {WINDOW}"
        raise BadConfig("bad value for layer_types", where=where, found=str(given)[:80], expected=expected)
    if given[-1] != FULL or WINDOW not in given:
        raise Unsupported(
            "layer_types has a pattern that is not run for Gemma 4", where=where, found=str(given)[-80:],
            expected=f"{FULL} at the last layer, and a layer of {WINDOW}",
        )  # fmt: skip
    return given


def check_sharing(config: Mapping[str, Any], where: object) -> None:
    """Refuses shared keys and values that llama.cpp would take from another layer than transformers does."""
    shared, kinds = config["num_kv_shared_layers"], config["layer_types"]
    first = len(kinds) - shared
    if shared and kinds[max(0, first - 2) : first] != [WINDOW, FULL]:
        raise Unsupported(
            "num_kv_shared_layers does not fit layer_types in llama.cpp", where=where,
            found=f"{shared} of {len(kinds)} layers",
            expected=f"{WINDOW} and then {FULL} at the two layers before them",
        )  # fmt: skip


def _per_layer_input(keys: Keys, vocab: int) -> dict[str, Any]:
    size = keys.size("hidden_size_per_layer_input", 0, least=0)
    rows = keys.size("vocab_size_per_layer_input", vocab, least=0)
    if size and rows != vocab:
        raise Unsupported(
            "llama.cpp has a per-layer embedding for each token", where=keys.where,
            found=f"vocab_size_per_layer_input {rows}", expected=vocab,
        )  # fmt: skip
    return {"hidden_size_per_layer_input": size, "vocab_size_per_layer_input": rows}


def _experts(keys: Keys) -> dict[str, Any]:
    older = keys.get("expert_intermediate_size")
    if not keys.flag("enable_moe_block", False):
        for key in _EXPERTS:  # of no effect
            keys.get(key)
        return {"enable_moe_block": False}
    sizes = {key: keys.size(key) for key in _EXPERTS}
    if sizes["top_k_experts"] > sizes["num_experts"] or older not in (None, sizes["moe_intermediate_size"]):
        found = f"{sizes}, expert_intermediate_size {older}"
        raise BadConfig("the sizes of the experts contradict each other", where=keys.where, found=found)
    return {"enable_moe_block": True, **sizes}


def _full_layers(keys: Keys, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Head size and key-value heads of the layers that attend to everything, from either spelling, in both."""
    base = {"head_dim": sizes["head_dim"], "num_key_value_heads": sizes["num_key_value_heads"]}
    full = [i for i, kind in enumerate(sizes["layer_types"]) if kind == FULL]
    head_dim = keys.size("global_head_dim", _GLOBAL_HEAD_DIM)
    kv_heads = keys.size("num_global_key_value_heads", base["num_key_value_heads"])
    given = keys.get("per_layer_config")
    if given is None:
        # transformers reads the key-value heads only where keys are also the values.
        changes = {"head_dim": head_dim} | ({"num_key_value_heads": kv_heads} if sizes["attention_k_eq_v"] else {})
    else:
        changes = _changes(given, full, keys.where)
        head_dim = changes.get("head_dim", base["head_dim"])
    own = base | changes
    differs = own["num_key_value_heads"] != base["num_key_value_heads"]
    if not differs:
        own.pop("num_key_value_heads")
    return {
        "global_head_dim": own["head_dim"],
        "num_global_key_value_heads": own["num_key_value_heads"] if differs else None,
        "per_layer_config": {str(i): dict(own) for i in full},
    }


def _changes(given: Any, full: list[int], where: object) -> dict[str, Any]:
    """What ``per_layer_config`` changes on the full layers: all the same, and nothing on others."""
    if not isinstance(given, dict) or not all(
        isinstance(value, dict) and str(i).isdecimal() for i, value in given.items()
    ):
        expected = "objects by the numbers of layers"
        raise BadConfig("bad value for per_layer_config", where=where, found=repr(given)[:60], expected=expected)
    by_layer = {int(i): value for i, value in given.items() if value}  # transformers writes '05' and '11'
    changes = [by_layer.pop(i, {}) for i in full]
    if by_layer or any(change != changes[0] for change in changes):
        raise Unsupported(
            "per_layer_config has a pattern that llama.cpp does not run for Gemma 4", where=where,
            found=repr(given)[:80], expected=f"the same for every layer of {FULL}, nothing for the others",
        )  # fmt: skip
    keys = Keys(changes[0], f"{where}: per_layer_config")
    found = {key: keys.size(key) for key in ("head_dim", "num_key_value_heads") if key in changes[0]}
    keys.asked |= set(found)
    keys.finish()
    return found


def _ropes(given: Any, where: object) -> dict[str, dict[str, Any]]:
    if given is None:
        given = _DEFAULT_ROPES
    if not isinstance(given, dict) or not set(given) <= set(_ROPES):
        raise BadConfig(
            "bad value for rope_parameters", where=where, found=repr(given)[:80], expected=f"{FULL} and {WINDOW}"
        )
    ropes = {
        kind: rope_parameters(
            given.get(kind, _DEFAULT_ROPES[kind]), where, _ROPES[kind], _THETAS[kind], f"rope_parameters.{kind}"
        )
        for kind in _ROPES
    }
    part = ropes[FULL].get("partial_rotary_factor", 1.0)
    if part > 1:
        raise BadConfig("bad value for partial_rotary_factor", where=where, found=part, expected="at most 1")
    return ropes


def rope_freqs(config: Mapping[str, Any]) -> np.ndarray:
    """What each rotary frequency of a full layer is divided by, (global_head_dim / 2,) float32."""
    half, rope = config["global_head_dim"] // 2, config["rope_parameters"][FULL]
    turned = int(rope.get("partial_rotary_factor", 1.0) * config["global_head_dim"] // 2)
    return np.where(np.arange(half) < turned, 1.0, _NEVER).astype(np.float32)


def cache(config: Mapping[str, Any], owners: Mapping[str, int]) -> tuple[LayerCache, ...]:
    """What every layer caches. ``owners``: by kind of layer, whose keys and values those use that have none."""
    found = []
    for kind, layer in zip(config["layer_types"], layers(config), strict=True):
        found.append(
            LayerCache(
                kv_heads=layer.kv_heads, k_dim=layer.head_dim, v_dim=layer.head_dim,
                window=None if layer.full else config["sliding_window"], owner=None if layer.owns_kv else owners[kind],
            )
        )  # fmt: skip
    return tuple(found)


def tensor(name: str, gguf_name: str, role: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, gguf_name=gguf_name, role=role, shape=shape)


def layer_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """The tensors of every layer but those of per-layer embeddings and experts."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    for i, layer in enumerate(layers(config)):
        ours, theirs = f"model.layers.{i}", f"blk.{i}"
        dim, kv = layer.head_dim, layer.kv_heads
        own_values = not (layer.full and config["attention_k_eq_v"])  # else the keys, before norm and rotation
        yield tensor(
            f"{ours}.self_attn.q_proj.weight", f"{theirs}.attn_q.weight", "attn_q", heads * dim, hidden
        )  # fmt: skip
        if layer.owns_kv:
            yield tensor(f"{ours}.self_attn.k_proj.weight", f"{theirs}.attn_k.weight", "attn_k", kv * dim, hidden)
            if own_values:
                yield tensor(f"{ours}.self_attn.v_proj.weight", f"{theirs}.attn_v.weight", "attn_v", kv * dim, hidden)
            yield tensor(f"{ours}.self_attn.k_norm.weight", f"{theirs}.attn_k_norm.weight", "norm", dim)
        yield tensor(f"{ours}.self_attn.q_norm.weight", f"{theirs}.attn_q_norm.weight", "norm", dim)
        yield tensor(f"{ours}.self_attn.o_proj.weight", f"{theirs}.attn_output.weight", "attn_o", hidden, heads * dim)
        for part, shape in (
            ("gate", (layer.wide, hidden)),
            ("up", (layer.wide, hidden)),
            ("down", (hidden, layer.wide)),
        ):
            yield tensor(f"{ours}.mlp.{part}_proj.weight", f"{theirs}.ffn_{part}.weight", f"ffn_{part}", *shape)
        for norm, gguf_norm in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ):
            yield tensor(f"{ours}.{norm}.weight", f"{theirs}.{gguf_norm}.weight", "norm", hidden)
        yield tensor(f"{ours}.layer_scalar", f"{theirs}.layer_output_scale.weight", "scale", 1)


def metadata(config: Mapping[str, Any], arch: str) -> list[Field]:
    """``<arch>.*`` of a checked text config, as llama.cpp's converter writes it."""
    every, ropes = layers(config), config["rope_parameters"]
    full_dim = config["global_head_dim"]

    def per_layer(key: str, values: list[int]) -> Field:
        same = len(set(values)) == 1
        return uint(f"{arch}.{key}", values[0]) if same else array(f"{arch}.{key}", values, GGUFValueType.INT32)

    fields = [
        uint(f"{arch}.block_count", config["num_hidden_layers"]),
        uint(f"{arch}.context_length", config["max_position_embeddings"]),
        uint(f"{arch}.embedding_length", config["hidden_size"]),
        per_layer("feed_forward_length", [layer.wide for layer in every]),
        uint(f"{arch}.attention.head_count", config["num_attention_heads"]),
        per_layer("attention.head_count_kv", [layer.kv_heads for layer in every]),
        real(f"{arch}.rope.freq_base", ropes[FULL]["rope_theta"]),
        real(f"{arch}.rope.freq_base_swa", ropes[WINDOW]["rope_theta"]),
        real(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"]),
        uint(f"{arch}.attention.key_length", full_dim),
        uint(f"{arch}.attention.value_length", full_dim),
        uint(f"{arch}.attention.key_length_swa", config["head_dim"]),
        uint(f"{arch}.attention.value_length_swa", config["head_dim"]),
        uint(f"{arch}.attention.sliding_window", config["sliding_window"]),
        array(f"{arch}.attention.sliding_window_pattern", [not layer.full for layer in every], GGUFValueType.BOOL),
        uint(f"{arch}.attention.shared_kv_layers", config["num_kv_shared_layers"]),
        uint(f"{arch}.embedding_length_per_layer_input", config["hidden_size_per_layer_input"]),
        uint(f"{arch}.rope.dimension_count", full_dim),
        uint(f"{arch}.rope.dimension_count_swa", config["head_dim"]),
    ]
    # Without the key llama.cpp caps at 30; 0 is how it is told not to.
    fields.append(real(f"{arch}.final_logit_softcapping", config.get("final_logit_softcapping") or 0.0))
    if config["enable_moe_block"]:
        fields += [
            uint(f"{arch}.expert_count", config["num_experts"]),
            uint(f"{arch}.expert_used_count", config["top_k_experts"]),
            uint(f"{arch}.expert_feed_forward_length", config["moe_intermediate_size"]),
        ]
    return fields
