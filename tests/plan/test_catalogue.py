"""The public models' configs give the parameters that were published, to half a percent."""

from __future__ import annotations

import math

import pytest

from lowbit.checkpoint import families
from lowbit.checkpoint.families import _gemma4
from lowbit.errors import BadOption, NotFound
from lowbit.plan import catalogue, open_model
from lowbit.plan.catalogue import Listed


@pytest.mark.parametrize("listed", catalogue.listed(), ids=lambda listed: listed.name)
def test_parameters_are_as_published(listed: Listed) -> None:
    family = families.by_config(dict(listed.config), listed.name, to_plan=True)
    config = family.text_config(dict(listed.config), listed.name)
    count = sum(math.prod(spec.shape) for spec in family.tensors(config))
    if listed.counted == "GGUF with unused tensors":
        sharing = [layer for layer in _gemma4.layers(config) if not layer.owns_kv]
        count += sum(2 * layer.kv_heads * layer.head_dim * config["hidden_size"] for layer in sharing)
    assert count == pytest.approx(listed.parameters, rel=0.005)


def test_families_that_the_issue_asks_for() -> None:
    sizes = {family: [m.name for m in catalogue.find(family)] for family in catalogue.families()}
    assert sizes["gemma-3"] == [f"gemma-3-{size}" for size in ("270m", "1b", "4b", "12b", "27b")]
    assert sizes["gemma-4"] == [f"gemma-4-{size}" for size in ("e2b", "e4b", "12b", "26b-a4b", "31b")]
    assert {"llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"} <= set(sizes["llama-3"])
    assert {f"qwen3-{size}b" for size in ("0.6", "1.7", "4", "8", "14", "32")} <= set(sizes["qwen-3"])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("gemma-4-e2b", ["gemma-4-e2b"]),
        ("Gemma 4 E2B", ["gemma-4-e2b"]),
        ("google/gemma-4-12B-it", ["gemma-4-12b"]),
        ("llama-3.2", ["llama-3.2-1b", "llama-3.2-3b"]),
        ("smollm2", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b"]),
        ("lla", []),
        ("", []),
        ("evil/gemma-4-12B-it", []),
    ],
)
def test_names(said: str, meant: list[str]) -> None:
    assert [listed.name for listed in catalogue.find(said)] == meant


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(NotFound, match="Did you mean gemma-4-e2b"):
        open_model("gema-4-e2b")
    with pytest.raises(BadOption, match=r"several models; expected one of gemma-4-e2b, .*--ram 8GiB"):
        open_model("gemma-4")


def test_a_hub_id_that_is_known_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with open_model("meta-llama/Llama-3.1-8B-Instruct") as model:
        assert model.architecture == "llama" and "own table" in model.remark
