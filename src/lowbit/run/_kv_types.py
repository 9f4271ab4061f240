"""The types that a KV cache can have in llama.cpp, and how a pair of them is written.

Keys and values may differ: ``q8_0`` is both, ``q8_0:q4_0`` is keys in Q8_0 and values in Q4_0.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.errors import BadOption

# Name -> ggml_type of the KV cache types that llama.cpp's own --cache-type-k takes.
KV_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "iq4_nl": 20,
}
UNQUANTIZED = ("f32", "f16", "bf16")


@dataclass(frozen=True, kw_only=True)
class KvTypes:
    """Type names of the keys and of the values, each one of KV_TYPES."""

    k: str
    v: str

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}:{self.v}"

    @property
    def quantized(self) -> bool:
        """Whether either is: llama.cpp then wants flash attention, for the values at least."""
        return self.k not in UNQUANTIZED or self.v not in UNQUANTIZED


def parse(kv_type: str) -> KvTypes:
    """``TYPE`` or ``K:V`` as a pair of names. Raises BadOption."""
    k, _, v = kv_type.partition(":")
    found = KvTypes(k=k, v=v if ":" in kv_type else k)
    for name in (found.k, found.v):
        if name not in KV_TYPES:
            raise BadOption(
                "unknown KV cache type", found=name or kv_type, expected=f"{', '.join(KV_TYPES)}; or two of them as K:V"
            )
    return found
