"""Gemma 3n (E2B, E4B), the text model: enough to plan for it; lowbit does not pack it.

Four streams of hidden states run side by side (AltUp), each layer has a low-rank residual (LAuReL) and an embedding of
its own for each token. The last layers have no keys and values of their own: they use those of the last full and the
last window layer before them. llama.cpp takes from nowhere but its code that these are layers 19 and 18, that there are
four streams, and the sizes of the extra parts, so a config must agree with it. Read from llama.cpp
(src/models/gemma3n.cpp, conversion/gemma.py) and transformers (models/gemma3n).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from gguf.constants import GGUFValueType

from lowbit.checkpoint.families.base import (
    Family,
    Gguf,
    Keys,
    LayerCache,
    TensorSpec,
    array,
    positive,
    real,
    uint,
)
from lowbit.checkpoint.gguf_file import Field
from lowbit.errors import BadConfig, BadFile, Unsupported

FULL, WINDOW = "full_attention", "sliding_attention"
_OWNERS = 20  # layers with keys and values of their own: n_layer_kv_from_start in llama.cpp
_PERIOD = 5
_FIXED = {
    "altup_num_inputs": 4, "altup_active_idx": 0, "laurel_rank": 64, "hidden_size_per_layer_input": 256,
}  # fmt: skip
# What Gemma3nTextConfig fills in; released configs leave some out.
_DEFAULTS = {
    "vocab_size": 262_400, "hidden_size": 2048, "num_hidden_layers": 35, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
    "sliding_window": 512, "vocab_size_per_layer_input": 262_144, **_FIXED,
}  # fmt: skip
_WIDE, _SHARED = 16_384, 15
_THETAS = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}


@dataclass(frozen=True, kw_only=True)
class _Spec(TensorSpec):
    """A tensor that GGUF stores in another shape: matrices stacked, or an embedding with rows for all tokens."""

    stored: tuple[int, ...]

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        return self.stored


class Gemma3n(Family):
    name = "gemma3n"
    arch = "gemma3n"
    packs = False
    model_types = ("gemma3n_text", "gemma3n")
    architectures = ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration")

    def text_config(self, config: Mapping[str, Any], where: object) -> dict[str, Any]:
        if config.get("model_type") == "gemma3n":
            nested = config.get("text_config")
            if not isinstance(nested, dict):
                raise BadConfig(
                    "missing key text_config", where=where, expected="an object with the text model's config"
                )
            config = {**nested, "model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"]}
        keys = Keys(config, where, _DEFAULTS)
        sizes: dict[str, Any] = {key: keys.size(key, least=0) for key in _FIXED}
        for key, value in sizes.items():
            if value != _FIXED[key]:
                raise Unsupported(f"{key} is not what llama.cpp runs", where=where, found=value, expected=_FIXED[key])
        for key in _DEFAULTS.keys() - _FIXED.keys() - {"rms_norm_eps"}:
            sizes[key] = keys.size(key, most=10_000 if key == "num_hidden_layers" else 1 << 31)
        n_layers = sizes["num_hidden_layers"]
        sizes["rms_norm_eps"] = keys.number("rms_norm_eps")
        sizes["num_kv_shared_layers"] = keys.size("num_kv_shared_layers", _SHARED, least=0, most=n_layers)
        sizes["intermediate_size"] = _each(keys, "intermediate_size", n_layers, _WIDE)
        sizes["layer_types"] = _layer_types(keys.get("layer_types"), sizes, where)
        sizes["activation_sparsity_pattern"] = _sparsity(keys, n_layers)
        for key, theta in _THETAS.items():
            sizes[key] = keys.number(key, theta)
        keys.only("hidden_activation", "gelu_pytorch_tanh")
        keys.only("attention_bias", False)
        keys.only("tie_word_embeddings", True)
        for key in ("rope_parameters", "rope_scaling", "final_logit_softcapping", "altup_coef_clip"):
            keys.get(key)
        for key in ("altup_correct_scale", "altup_lr_multiplier"):
            keys.get(key)
        keys.finish()
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            what = "head_dim must be even and num_attention_heads a multiple of num_key_value_heads"
            raise BadConfig(what, where=where, found=f"{sizes['head_dim']}, {sizes['num_key_value_heads']}")
        return {**config, **sizes}

    def tensors(self, config: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(_tensors(config))

    def cache(self, config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
        owners = {WINDOW: _OWNERS - 2, FULL: _OWNERS - 1}
        return tuple(
            LayerCache(
                kv_heads=config["num_key_value_heads"], k_dim=config["head_dim"], v_dim=config["head_dim"],
                window=config["sliding_window"] if kind == WINDOW else None,
                owner=owners[kind] if i >= _OWNERS else None,
            )
            for i, kind in enumerate(config["layer_types"])
        )  # fmt: skip

    def metadata(self, config: Mapping[str, Any]) -> list[Field]:
        sparsity = config["activation_sparsity_pattern"]
        scales = [NormalDist().inv_cdf(share) if share else float("-inf") for share in sparsity]
        return [
            uint("gemma3n.context_length", config["max_position_embeddings"]),
            uint("gemma3n.embedding_length", config["hidden_size"]),
            uint("gemma3n.block_count", config["num_hidden_layers"]),
            array("gemma3n.feed_forward_length", config["intermediate_size"], GGUFValueType.INT32),
            uint("gemma3n.attention.head_count", config["num_attention_heads"]),
            uint("gemma3n.attention.head_count_kv", config["num_key_value_heads"]),
            real("gemma3n.attention.layer_norm_rms_epsilon", config["rms_norm_eps"]),
            uint("gemma3n.attention.key_length", config["head_dim"]),
            uint("gemma3n.attention.value_length", config["head_dim"]),
            uint("gemma3n.attention.sliding_window", config["sliding_window"]),
            uint("gemma3n.attention.shared_kv_layers", config["num_kv_shared_layers"]),
            array(
                "gemma3n.attention.sliding_window_pattern", [kind == WINDOW for kind in config["layer_types"]],
                GGUFValueType.BOOL,
            ),
            real("gemma3n.rope.freq_base", config["rope_theta"]),
            uint("gemma3n.altup.active_idx", config["altup_active_idx"]),
            uint("gemma3n.altup.num_inputs", config["altup_num_inputs"]),
            uint("gemma3n.embedding_length_per_layer_input", config["hidden_size_per_layer_input"]),
            array("gemma3n.activation_sparsity_scale", scales, GGUFValueType.FLOAT32),
        ]  # fmt: skip

    def config_from_gguf(self, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict:
        keys = Gguf(values, self.arch, where)
        if "token_embd.weight" not in shapes:
            raise BadFile("the tensor token_embd.weight is missing", where=where)
        n_layers = keys.size("block_count")
        return {
            "architectures": ["Gemma3nForCausalLM"],
            "head_dim": keys.size("attention.key_length", 256),
            "hidden_size": keys.size("embedding_length"),
            "intermediate_size": keys.each("feed_forward_length", n_layers),
            "max_position_embeddings": keys.size("context_length"),
            "model_type": "gemma3n_text",
            "num_attention_heads": keys.size("attention.head_count"),
            "num_hidden_layers": n_layers,
            "num_key_value_heads": keys.size("attention.head_count_kv"),
            "num_kv_shared_layers": n_layers - _OWNERS,
            "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
            "sliding_window": keys.size("attention.sliding_window"),
            "vocab_size": shapes["token_embd.weight"][0],
            **keys.token_ids(),
        }


def _each(keys: Keys, key: str, n_layers: int, default: int) -> list[int]:
    """A size for each layer: a list, or one number for all."""
    value = keys.get(key)
    if not isinstance(value, list):
        return [keys.size(key, default)] * n_layers
    if len(value) != n_layers or not all(type(v) is int and 0 < v <= 1 << 31 for v in value):
        expected = f"{n_layers} positive whole numbers"
        raise BadConfig(f"bad value for {key}", where=keys.where, found=repr(value)[:60], expected=expected)
    return value


def _layer_types(given: Any, sizes: Mapping[str, Any], where: object) -> list[str]:
    n_layers, shared = sizes["num_hidden_layers"], sizes["num_kv_shared_layers"]
    expected = [WINDOW if (i + 1) % _PERIOD else FULL for i in range(n_layers)]
    if (expected if given is None else given) != expected:
        found = str(given)[:80]
        raise Unsupported("layer_types has a pattern that llama.cpp does not run for gemma3n", where=where, found=found)
    if n_layers - shared != _OWNERS:
        what = "num_kv_shared_layers is not what llama.cpp runs for gemma3n"
        raise Unsupported(what, where=where, found=f"{shared} of {n_layers}", expected=f"all but {_OWNERS}")
    return expected


def _sparsity(keys: Keys, n_layers: int) -> list[float]:
    """The share of each layer's activations that is zeroed."""
    value = keys.get("activation_sparsity_pattern")
    if value is None:
        return [0.95] * min(10, n_layers) + [0.0] * max(0, n_layers - 10)
    every = value if isinstance(value, list) else [value] * n_layers
    for share in every:
        if share != 0:
            positive("activation_sparsity_pattern", share, keys.where)
    if len(every) != n_layers or not all(share < 1 for share in every):
        expected = f"{n_layers} shares below 1"
        found = repr(value)[:60]
        raise BadConfig("bad value for activation_sparsity_pattern", where=keys.where, found=found, expected=expected)
    return [float(share) for share in every]


def _tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    hidden, vocab, n_layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    inputs, wide = config["altup_num_inputs"], config["hidden_size_per_layer_input"]

    def spec(name: str, gguf_name: str, role: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=f"model.{name}", gguf_name=f"{gguf_name}.weight", role=role, shape=shape)

    yield spec("embed_tokens.weight", "token_embd", "embedding", vocab, hidden)
    rows = config["vocab_size_per_layer_input"]
    yield _Spec(
        name="model.embed_tokens_per_layer.weight", gguf_name="per_layer_token_embd.weight", role="per_layer_embedding",
        shape=(rows, n_layers * wide), stored=(vocab, n_layers * wide),
    )  # fmt: skip
    yield spec(
        "per_layer_model_projection.weight", "per_layer_model_proj", "per_layer_model_proj", n_layers * wide, hidden
    )
    yield spec("per_layer_projection_norm.weight", "per_layer_proj_norm", "norm", wide)
    for part, theirs in (("projections", "altup_proj"), ("unembed_projections", "altup_unembd_proj")):
        # Hugging Face has a matrix for each stream but the first.
        yield spec(f"altup_{part}.weight", theirs, "per_layer_model_proj", inputs - 1, hidden, hidden)
    for i in range(n_layers):
        for ours, theirs, role, shape in _layer(config, config["intermediate_size"][i]):
            yield spec(f"layers.{i}.{ours}", f"blk.{i}.{theirs}", role, *shape)
    yield spec("norm.weight", "output_norm", "norm", hidden)


def _layer(config: Mapping[str, Any], wide: int) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Hugging Face's name, GGUF's, role and shape of each tensor of a layer. llama.cpp keeps AltUp's and LAuReL's
    matrices as they are, as it does the projection to all layers' inputs."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    inputs, rank, own = config["altup_num_inputs"], config["laurel_rank"], config["hidden_size_per_layer_input"]
    kept = "per_layer_model_proj"
    yield "self_attn.q_proj.weight", "attn_q", "attn_q", (heads * dim, hidden)
    yield "self_attn.k_proj.weight", "attn_k", "attn_k", (kv_heads * dim, hidden)
    yield "self_attn.v_proj.weight", "attn_v", "attn_v", (kv_heads * dim, hidden)
    yield "self_attn.o_proj.weight", "attn_output", "attn_o", (hidden, heads * dim)
    yield "self_attn.q_norm.weight", "attn_q_norm", "norm", (dim,)
    yield "self_attn.k_norm.weight", "attn_k_norm", "norm", (dim,)
    yield "mlp.gate_proj.weight", "ffn_gate", "ffn_gate", (wide, hidden)
    yield "mlp.up_proj.weight", "ffn_up", "ffn_up", (wide, hidden)
    yield "mlp.down_proj.weight", "ffn_down", "ffn_down", (hidden, wide)
    yield "per_layer_input_gate.weight", "inp_gate", "per_layer_gate", (own, hidden)
    yield "per_layer_projection.weight", "proj", "per_layer_proj", (hidden, own)
    yield "altup.correction_coefs.weight", "altup_correct_coef", kept, (inputs, inputs)
    yield "altup.prediction_coefs.weight", "altup_predict_coef", kept, (inputs * inputs, inputs)
    yield "altup.modality_router.weight", "altup_router", kept, (inputs, hidden)
    yield "altup.router_norm.weight", "altup_router_norm", "norm", (hidden,)
    yield "altup.correct_output_scale", "altup_correct_scale", "scale", (hidden,)
    yield "laurel.linear_left.weight", "laurel_l", kept, (rank, hidden)
    yield "laurel.linear_right.weight", "laurel_r", kept, (hidden, rank)
    yield "laurel.post_laurel_norm.weight", "laurel_post_norm", "norm", (hidden,)
    for ours, theirs in (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("post_per_layer_input_norm", "post_norm"),
    ):
        yield f"{ours}.weight", theirs, "norm", (hidden,)


FAMILY = Gemma3n()
