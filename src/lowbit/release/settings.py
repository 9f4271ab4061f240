"""What a model's file or folder says of its architecture, in one form: GGUF's keys without the architecture's name.

Of a family that lowbit knows, config.json and GGUF are read by the family, so that defaults and spellings are no
difference. Of another one the keys that both have are compared as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.errors import Unsupported
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet

# GGUF's key -> config.json's, of architectures that lowbit has no family for.
_PLAIN_KEYS = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "rope.freq_base": ("rope_theta",),
    "vocab_size": ("vocab_size",),
}
_BEHAVIOUR = ("context_length", "rope.")
_BEHAVIOUR_WORDS = ("sliding_window", "softcap", "scale", "temperature")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """architecture: GGUF's name of it. keys: value by GGUF's key. known: whether a family of lowbit's read them.
    computed: tensors that follow from them, as rotary frequencies do. problem: why a family refused."""

    architecture: str
    keys: Mapping[str, Any]
    known: bool
    computed: Mapping[str, np.ndarray] = field(default_factory=dict)
    problem: str | None = None


def settings_of(release: ReleaseSet, member: Member) -> Settings:
    """What a text model says. Raises BadFile, BadConfig."""
    try:
        with release.checkpoint(member) as opened:
            fields = opened.family.metadata(opened.config)
            prefix = f"{opened.family.arch}."
            keys = {f.key.removeprefix(prefix): f.value for f in fields}
            embedding = next((s for s in opened.specs.values() if s.role == "embedding"), None)
            if embedding is not None:
                keys["vocab_size"] = embedding.shape[0]
            keys["tied"] = opened.tied
            return Settings(
                architecture=opened.family.arch, keys=keys, known=True, computed=opened.family.computed(opened.config)
            )
    except Unsupported as error:
        return _as_written(release, member, str(error))


def _as_written(release: ReleaseSet, member: Member, problem: str) -> Settings:
    if member.container == "gguf":
        values = release.values(member)
        architecture = str(values.get("general.architecture"))
        keys = {key: values[f"{architecture}.{key}"] for key in _PLAIN_KEYS if f"{architecture}.{key}" in values}
        return Settings(architecture=architecture, keys=keys, known=False, problem=problem)
    config = release.config(member)
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    rope = config.get("rope_parameters")
    config = {**config, **rope} if isinstance(rope, dict) else config
    found = {ours: next((config[k] for k in theirs if config.get(k) is not None), None)
             for ours, theirs in _PLAIN_KEYS.items()}  # fmt: skip
    keys = {key: value for key, value in found.items() if value is not None}
    return Settings(architecture=str(config.get("model_type")), keys=keys, known=False, problem=problem)


def is_behaviour(key: str) -> bool:
    """Whether a key says how far and with which positions a model attends, rather than how large it is."""
    return key.startswith(_BEHAVIOUR) or any(word in key for word in _BEHAVIOUR_WORDS)


def differences(one: Settings, other: Settings, *, behaviour: bool) -> list[str]:
    """The keys that differ, as 'key: first, second'; those that only one has count where a family read both."""
    both_known = one.known and other.known
    keys = sorted(one.keys.keys() | other.keys.keys() if both_known else one.keys.keys() & other.keys.keys())
    found = [
        f"{key} {_said(one.keys.get(key))} and {_said(other.keys.get(key))}"
        for key in keys
        if is_behaviour(key) == behaviour and not _same(one.keys.get(key), other.keys.get(key))
    ]
    if behaviour and both_known:
        names = one.computed.keys() | other.computed.keys()
        found += [f"{name} differs" for name in sorted(names) if not _same_array(one.computed, other.computed, name)]
    return found


def _same_array(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str) -> bool:
    if name not in one or name not in other:
        return False
    return one[name].shape == other[name].shape and bool(np.allclose(one[name], other[name], rtol=1e-5))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) != isinstance(other, list):  # a value a layer, or one for all
        alone, several = (other, one) if isinstance(one, list) else (one, other)
        return bool(several) and all(_same(alone, value) for value in several)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _said(value: Any) -> str:
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)[:60]
