"""LiteRT-LM's caches by the converter's rule, and what it does not have."""

from __future__ import annotations

import pytest

from lowbit.errors import BadOption
from lowbit.plan import PlanOptions, open_model, plan


@pytest.mark.parametrize(("kv_type", "size"), [("", 4), ("f32", 4), ("f16", 2)])
def test_every_layer_has_the_whole_context(kv_type: str, size: int) -> None:
    """Gemma 4 E2B: 12 sliding layers of 1 x 256 and 3 global ones of 1 x 512; the other 20 of 35 share theirs."""
    options = PlanOptions(runtime="litert-lm", context=4096, kv_type_k=kv_type, kv_type_v=kv_type)
    assert plan("gemma-4-e2b", options).bytes_of("kv") == 4096 * size * 2 * (12 * 256 + 3 * 512)


def test_weights_are_codes_and_a_scale_for_each_row() -> None:
    with open_model("qwen3-0.6b") as model:
        matrices = [spec for spec in model.specs if len(spec.shape) == 2]
        vectors = [spec for spec in model.specs if len(spec.shape) == 1]
    expected = sum(rows * wide + 4 * rows for rows, wide in (spec.shape for spec in matrices))
    expected += sum(4 * spec.shape[0] for spec in vectors)
    assert plan("qwen3-0.6b", PlanOptions(runtime="litert-lm", context=512)).bytes_of("weights") == expected


def test_what_it_does_not_have() -> None:
    for options in (
        PlanOptions(runtime="litert-lm", slots=2),
        PlanOptions(runtime="litert-lm", kv_type_k="q8_0", kv_type_v="q8_0"),
        PlanOptions(runtime="litert-lm", recipe="q4_0"),
        PlanOptions(runtime="litert-lm", kv_unified=True),
    ):
        with pytest.raises(BadOption):
            plan("qwen3-0.6b", options)
