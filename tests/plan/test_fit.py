"""The longest context is exact: it fits, and the next one does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.errors import BadOption, Unsupported
from lowbit.plan import FitOptions, PlanOptions, fit, open_model, plan, plan_open, runtimes
from lowbit.plan.fit import longest
from lowbit.units import GIB, MIB

KV = {"mlx": "f16", "vllm": "bf16", "litert-lm": "f32", "llama.cpp": "q8_0"}
ROOMS = {
    "llama.cpp": ("qwen3-4b", 4 * GIB + 123_456), "mlx": ("gemma-3-4b", 4 * GIB + 7), "vllm": ("qwen3-4b", 10 * GIB),
    "litert-lm": ("gemma-3-1b", 2 * GIB),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROOMS))
@pytest.mark.parametrize("slots", [1, 2])
def test_one_token_more_does_not_fit(name: str, slots: int) -> None:
    runtime, (model_name, room) = runtimes.get(name), ROOMS[name]
    options = PlanOptions(runtime=name, slots=slots, kv_type_k=KV[name], kv_type_v=KV[name])
    asked = FitOptions(room=room, margin=256 * MIB)
    with open_model(model_name) as model:
        if name == "litert-lm" and slots > 1:
            with pytest.raises(BadOption, match="one sequence at a time"):
                longest(model, options, asked)
            return
        best = longest(model, options, asked)
        assert best.limit == "memory" and 256 < best.context_per_slot < model.trained_context

        def takes(per_slot: int) -> int:
            made = plan_open(model, replace(options, context=per_slot * slots))
            return sum(row.bytes for row in runtime.resident(made, gpu=False))

        assert takes(best.context_per_slot) == best.total_bytes <= room - 256 * MIB
        assert takes(best.context_per_slot + 1) > room - 256 * MIB


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_longer_context_never_takes_less(name: str) -> None:
    """What the search by halves stands on."""
    runtime = runtimes.get(name)
    options = PlanOptions(runtime=name, kv_type_k=KV[name], kv_type_v=KV[name])
    with open_model(ROOMS[name][0]) as model:
        sizes = []
        for context in sorted({*range(256, 6000, 331), 2048, 2049, 2050, 4096, 4097, 4098, 5000, 5001, 5002, 5003}):
            made = plan_open(model, replace(options, context=context))
            sizes.append(sum(row.bytes for row in runtime.resident(made, gpu=False)))
    assert sizes == sorted(sizes)


def test_all_of_the_trained_context() -> None:
    found = fit("smollm2-360m", PlanOptions(), FitOptions(room=64 * GIB))
    assert {best.context_per_slot for best in found.best} == {8192}
    assert {best.limit for best in found.best} == {"training"}
    assert (found.margin_bytes, found.usable_bytes) == (GIB, 63 * GIB)
    assert {(best.kv_type, best.slots) for best in found.best} == {
        (kv_type, slots) for kv_type in ("f16", "q8_0", "q4_0") for slots in (1, 2, 4, 8)
    }


def test_a_family_has_every_size_and_format() -> None:
    found = fit("gemma-4", PlanOptions(runtime="mlx"), FitOptions(room=24 * GIB, kv_types=("f16",)))
    assert found.is_family and len(found.best) == 5 * 3
    fitting = {(best.model, best.recipe) for best in found.best if best.context_per_slot}
    assert ("gemma-4-12b", "mlx_affine4_g64") in fitting and ("gemma-4-31b", "bf16") not in fitting
    assert found.to_json()["best"][0]["model"] == "gemma-4-e2b"


def test_nothing_fits_and_the_error_says_what_would() -> None:
    with pytest.raises(
        Unsupported, match=r"nothing fits; found 8\.0 GiB.*expected 1\d\.\d GiB for gemma-4-31b in q4_0"
    ):
        fit("gemma-4-31b", PlanOptions(), FitOptions(room=8 * GIB))
    with pytest.raises(Unsupported, match="nothing fits"):
        fit("gemma-4", PlanOptions(runtime="mlx"), FitOptions(room=GIB + MIB))


def test_the_room_that_an_error_asks_for_is_enough() -> None:
    """Also where the margin is a part of it."""
    for name, model in (("mlx", "qwen3-8b"), ("vllm", "qwen3-8b"), ("llama.cpp", "qwen3-8b")):
        with pytest.raises(Unsupported) as refused:
            fit(model, PlanOptions(runtime=name), FitOptions(room=2 * GIB, slots=(1,)))
        needs = float(str(refused.value.expected).split(" GiB")[0])
        kv_types = (str(refused.value.expected).split(" in ")[-1].partition(",")[0],)
        for room, fits in ((needs + 0.06, True), (needs - 0.06, False)):
            asked = FitOptions(room=int(room * GIB), slots=(1,), kv_types=kv_types)
            if fits:
                assert fit(model, PlanOptions(runtime=name), asked).best[0].context_per_slot >= 256
            else:
                with pytest.raises(Unsupported, match="nothing fits"):
                    fit(model, PlanOptions(runtime=name), asked)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama.cpp", "mlx_affine4_g64"), ("llama.cpp", "int4_g32"), ("mlx", "q4_k_m"), ("vllm", "q4_0")],
)
def test_a_format_that_the_runtime_does_not_run(name: str, recipe: str) -> None:
    with pytest.raises(BadOption, match=recipe):
        plan("qwen3-0.6b", PlanOptions(runtime=name, recipe=recipe, context=512))


def test_a_gpu_holds_neither_the_program_nor_repacked_weights() -> None:
    options = PlanOptions(slots=1, context=4096)
    made = plan("smollm2-360m", options)
    kept = runtimes.get("llama.cpp").resident(made, gpu=True)
    assert {row.part for row in kept} == {"weights", "kv", "scratch"} and len(
        [r for r in kept if r.part == "weights"]
    ) == 1


def test_bad_memory() -> None:
    for room, margin in ((0, None), (-1, None), (GIB, GIB), (GIB, -1)):
        with pytest.raises(BadOption):
            FitOptions(room=room, margin=margin)


def test_a_file_keeps_its_own_types(packaged_gguf: object) -> None:
    path = packaged_gguf("smollm2-135m")  # type: ignore[operator]
    found = fit(Path(path), PlanOptions(), FitOptions(room=2 * GIB, kv_types=("f16",), slots=(1,)))
    assert [best.recipe for best in found.best] == [None]
