"""vLLM's pools against what its log said on real GPUs (vLLM does not run here)."""

from __future__ import annotations

import pytest

from lowbit.errors import BadOption
from lowbit.plan import PlanOptions, open_model, plan
from lowbit.plan.runtimes.vllm import BLOCK, Pool, pool

GIB = 1 << 30


def pool_of(name: str, kv_type: str = "bf16") -> Pool:
    with open_model(name) as model:
        return pool([layer for layer in model.cache if layer.owner is None], kv_type)


def test_gemma_3_1b_as_vllm_0_13_logged_it() -> None:
    """eole-nlp's benchmark of gemma-3-1b-it, max_model_len 2048, max_num_batched_tokens 8192, 2026-01-16:
    'Available KV cache memory: 25.39 GiB', 'Add 2 padding layers', 'GPU KV cache size: 950,864 tokens',
    'Maximum concurrency for 2,048 tokens per request: 461.21x'.

    That version printed blocks // groups * block size, and kept a window for the tokens of one step, not two."""
    shared = pool_of("gemma-3-1b")
    assert [(group.layers, group.window) for group in shared.groups].count((4, None)) == 1
    assert sorted(group.layers for group in shared.groups) == [2, 4, 4, 4, 4, 4, 4]  # 22 sliding layers, 2 of padding
    per_request = shared.blocks(2048, in_flight=8192)
    fitting = [
        blocks
        for blocks in range(int(25.385 * GIB) // shared.page_bytes, int(25.395 * GIB) // shared.page_bytes + 1)
        if blocks // len(shared.groups) * BLOCK == 950_864 and f"{blocks / per_request:.2f}" == "461.21"
    ]
    assert fitting, "no number of blocks in 25.39 GiB gives both of the log's figures"
    assert per_request == 128 + 6 * 129


def test_qwen_3_1_7b_as_vllm_logged_it() -> None:
    """vllm issue 33263, Qwen3-1.7B: 'Available KV cache memory: 18.78 GiB', 'GPU KV cache size: 175,856 tokens'."""
    shared = pool_of("qwen3-1.7b")
    assert len(shared.groups) == 1
    assert shared.page_bytes * (175_856 // BLOCK) / GIB == pytest.approx(18.78, abs=0.005)


def test_gemma_4_31b_before_and_after_0_21() -> None:
    """vllm issue 43308: of about 50 GB, about 55,000 tokens in 0.20, which charged sliding layers the whole context,
    and about 525,000 in 0.21 (262,144 a request). Rounded figures: a tenth is what they allow."""
    shared = pool_of("gemma-4-31b")
    assert [(group.layers, group.window, group.block) for group in shared.groups] == [
        *[(10, 1024, 16)] * 5, (10, None, 32)
    ]  # fmt: skip
    with open_model("gemma-4-31b") as model:
        before = sum(2 * 2 * layer.kv_heads * layer.k_dim for layer in model.cache)
    assert 55_000 * before == pytest.approx(50 * GIB, rel=0.1)
    tokens = 55_000 * before / shared.page_bytes / shared.blocks(262_144, in_flight=2 * 2048) * 262_144
    assert tokens == pytest.approx(525_000, rel=0.1)


def test_a_plan_charges_what_the_pool_hands_out() -> None:
    found = plan("gemma-4-12b", PlanOptions(runtime="vllm", context=4 * 8192, slots=4))
    shared = pool_of("gemma-4-12b")
    assert found.bytes_of("kv") == (4 * shared.blocks(8192, in_flight=4096) + 1) * shared.page_bytes
    # 8 global layers of 1 x 512 in pages of 64 tokens: as large as 16 tokens of 8 x 256.
    assert {(group.window, group.block) for group in shared.groups} == {(None, 64), (1024, 16)}
    halved = plan(
        "gemma-4-12b", PlanOptions(runtime="vllm", context=4 * 8192, slots=4, kv_type_k="fp8", kv_type_v="fp8")
    )
    assert halved.bytes_of("kv") * 2 == found.bytes_of("kv")


def test_weights_are_what_the_log_says() -> None:
    """The same log: 'Model loading took 1.9148 GiB memory', rotary tables included."""
    assert plan("gemma-3-1b", PlanOptions(runtime="vllm")).bytes_of("weights") / GIB == pytest.approx(1.9148, rel=0.03)


def test_what_vllm_does_not_have() -> None:
    for options in (
        PlanOptions(runtime="vllm", kv_type_k="q8_0", kv_type_v="q8_0"),
        PlanOptions(runtime="vllm", swa_full=True),
        PlanOptions(runtime="vllm", recipe="q4_0"),
    ):
        with pytest.raises(BadOption):
            plan("qwen3-0.6b", options)
