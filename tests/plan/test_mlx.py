"""What a plan says of MLX against mlx-lm's caches, to the byte, while a prompt is read and after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.checkpoint import families
from lowbit.errors import BadOption, Unsupported
from lowbit.plan import PlanOptions, plan_open
from lowbit.plan.catalogue import Listed
from lowbit.plan.model import PlanModel, open_listed
from lowbit.plan.runtimes import mlx as mlx_plan

sys.path.insert(0, str(Path(__file__).parent))

from miniature import small

mx = pytest.importorskip("mlx.core")
cache_module = pytest.importorskip("mlx_lm.models.cache")

# How many of the layers: their order repeats, and a quarter of those of E2B share.
LAYERS = {
    "llama-3.2-1b": 2, "qwen3-0.6b": 2, "gemma-3-1b": 7, "gemma-3-4b": 7, "gemma-4-e2b": 20, "gemma-4-12b": 6,
    "gemma-4-26b-a4b": 6, "gemma-3n-e2b": 25,
}  # fmt: skip
READS = ((2, 256), (40, 16), (257, 256), (310, 100))


@pytest.fixture(autouse=True)
def no_compiler() -> None:
    mx.disable_compile()


def models(config: dict[str, Any]) -> tuple[PlanModel, Any]:
    """The same config as a plan's model and as mlx-lm's, with random weights."""
    from mlx_lm.utils import _get_classes

    listed = Listed(
        name="small", family="x", hub_id="x/y", parameters=1, counted="", config=config, path=Path("config.json")
    )  # fmt: skip
    model = open_listed(listed)
    if config["model_type"] == "gemma3n_text":  # mlx-lm has it as a part of the multimodal model alone
        left_out = {"altup_coef_clip": 120.0, "altup_correct_scale": True, "final_logit_softcapping": 30.0}
        text = {**model.config, **left_out, "intermediate_size": model.config["intermediate_size"][0]}
        written: dict[str, Any] = {"model_type": "gemma3n", "text_config": text}
    else:
        family = families.by_config(config, "test")
        written = {**family.mlx_config(model.config), "tie_word_embeddings": True}
    kind, arguments = _get_classes(written)
    return model, kind(arguments.from_dict(written))


def cached(model: Any, tokens: int, prefill: int, **settings: Any) -> int:
    """Bytes of mlx-lm's caches at their largest, while it reads ``tokens``."""
    from mlx_lm.generate import generate_step

    cache = cache_module.make_prompt_cache(model)
    sizes = []

    def look(*_: int) -> None:
        sizes.append(sum(layer.nbytes for layer in cache if not layer.empty()))

    steps = generate_step(
        mx.array([1] * tokens), model, max_tokens=0, prompt_cache=cache, prefill_step_size=prefill,
        prompt_progress_callback=look, **settings,
    )  # fmt: skip
    list(steps)
    look()
    return max(sizes)


def miniature(name: str, window: int | None) -> dict[str, Any]:
    shared = {"num_kv_shared_layers": 5, "laurel_rank": 64, "hidden_size_per_layer_input": 256}
    return small(name, window=window, layers=LAYERS[name], **(shared if name.startswith("gemma-3n") else {}))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("window", [24, 280])
def test_caches_are_of_the_size_that_was_planned(name: str, window: int) -> None:
    config = miniature(name, window)
    if window == 280 and "sliding_window" not in config:
        pytest.skip("no window")
    model, real = models(config)
    with model:
        for tokens, prefill in READS:
            options = PlanOptions(
                runtime="mlx", recipe="bf16", context=tokens, batch=prefill, kv_type_k="f32", kv_type_v="f32"
            )
            planned = plan_open(model, options).bytes_of("kv")
            assert planned == cached(real, tokens, prefill), (tokens, prefill)


@pytest.mark.parametrize("bits", [8, 4, 6])
def test_quantized_caches(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the start they stay as they are; from there on they are codes, scales and biases."""
    monkeypatch.setattr(mlx_plan, "QUANTIZED_FROM", 44)
    model, real = models(
        small("llama-3.2-1b", num_hidden_layers=1, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    )
    real.set_dtype(mx.float16)
    kv_type = f"q{bits}_g32"
    with model:
        for tokens, prefill in ((20, 8), (45, 8), (46, 8), (49, 16), (300, 300)):
            options = PlanOptions(
                runtime="mlx", recipe="bf16", context=tokens, batch=prefill, kv_type_k=kv_type, kv_type_v=kv_type
            )
            planned = plan_open(model, options).bytes_of("kv")
            got = cached(real, tokens, prefill, kv_bits=bits, kv_group_size=32, quantized_kv_start=44)
            assert planned == got, (tokens, prefill)


def test_a_batch_is_as_many_caches() -> None:
    from mlx_lm.generate import PromptProcessingBatch

    model, real = models(small("gemma-3-1b", window=24, layers=7))
    with model:
        for slots, tokens, prefill in ((3, 40, 16), (2, 300, 64)):
            batch = PromptProcessingBatch(
                real, list(range(slots)), [cache_module.make_prompt_cache(real) for _ in range(slots)],
                prefill_step_size=prefill,
            )  # fmt: skip
            sizes = []
            step = type(real).__call__

            def watched(self: Any, *args: Any, _step: Any = step, _sizes: Any = sizes, **kwargs: Any) -> Any:
                result = _step(self, *args, **kwargs)
                _sizes.append(sum(layer.nbytes for layer in kwargs["cache"] if layer.keys is not None))
                return result

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(real), "__call__", watched)
                batch.generate([[1] * tokens for _ in range(slots)])
            options = PlanOptions(
                runtime="mlx", recipe="bf16", context=slots * tokens, slots=slots, batch=prefill, kv_type_k="f32",
                kv_type_v="f32",
            )  # fmt: skip
            assert plan_open(model, options).bytes_of("kv") == max(sizes)


def test_what_mlx_lm_cannot_do() -> None:
    """A plan refuses what mlx-lm refuses: a quantized cache beside sliding layers."""
    model, real = models(small("gemma-3-1b", window=24, layers=7))
    with pytest.raises(NotImplementedError, match="RotatingKVCache Quantization"):
        cached(real, 40, 16, kv_bits=8, quantized_kv_start=0)
    with model, pytest.raises(BadOption, match="sliding layers"):
        plan_open(model, PlanOptions(runtime="mlx", kv_type_k="q8_g64", kv_type_v="q8_g64"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_type_k": "q8_0", "kv_type_v": "q8_0"}, "mlx has no such KV type; found q8_0; expected f16, bf16"),
        ({"kv_type_k": "f16", "kv_type_v": "f32"}, "one type"),
        ({"kv_type_k": "q8_g64", "kv_type_v": "q8_g64"}, "whole groups"),
        ({"kv_type_k": "q8_g32", "kv_type_v": "q8_g32", "slots": 2}, "one sequence at a time"),
        ({"swa_full": True}, "mlx has no such setting; found swa_full=True"),
        ({"ubatch": 64}, "no such setting"),
        ({"slots": 9000}, "shorter than one token a slot"),
    ],
)
def test_settings_that_mlx_lm_does_not_have(settings: dict[str, Any], message: str) -> None:
    model, _ = models(small("llama-3.2-1b", head_dim=32, num_attention_heads=2, num_key_value_heads=1))
    with model, pytest.raises((BadOption, Unsupported), match=message):
        plan_open(model, PlanOptions(runtime="mlx", **settings))


def test_weights_are_those_of_the_folder(tiny_gemma3: Any, tmp_path: Path) -> None:
    """Of a folder that MLX loads, and of a recipe before it is packed, as the arrays in memory."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    import lowbit

    folder = tiny_gemma3()
    packed = lowbit.pack(folder, "mlx_affine4_g32", tmp_path / "mlx").path
    loaded, _ = load_model(packed)
    held = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    assert lowbit.plan(packed, PlanOptions(runtime="mlx")).bytes_of("weights") == held
    before = lowbit.plan(folder, PlanOptions(runtime="mlx", recipe="mlx_affine4_g32")).bytes_of("weights")
    assert before == pytest.approx(held, rel=0.02)


@given(
    tokens=st.integers(1, 1500), step=st.integers(1, 700), window=st.none() | st.integers(1, 600),
)  # fmt: skip
def test_room_by_any_steps(tokens: int, step: int, window: int | None) -> None:
    """mlx-lm's cache classes fed with steps of any size; a prompt's last token goes by itself."""
    cache = cache_module.KVCache() if window is None else cache_module.RotatingKVCache(max_size=window)
    read = 0
    for planned_read, room in mlx_plan.lengths(tokens, window, step):
        keys = mx.zeros((1, 1, planned_read - read, 1))
        cache.update_and_fetch(keys, keys)
        read = planned_read
        assert cache.keys.shape[2] == room
    assert read == tokens
