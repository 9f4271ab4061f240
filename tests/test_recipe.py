"""Which tensor goes on which grid: the choice of llama-quantize."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from lowbit import grid, recipe
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption, Unsupported


@dataclass(frozen=True)
class Spec:
    name: str
    role: str
    shape: tuple[int, ...]


def _model(*, row: int = 576, tied: bool = True) -> list[Spec]:
    specs = [
        Spec("embed", "embedding", (1000, row)),
        Spec("q", "attn_q", (row, row)),
        Spec("down", "ffn_down", (row, 1536)),
        Spec("q.bias", "bias", (row,)),
        Spec("norm", "norm", (row,)),
    ]
    return specs if tied else [*specs, Spec("head", "output", (1000, row))]


LOW_BIT = ["q4_0", "q4_1", "q5_0", "q5_1"]


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_low_bit_recipe_keeps_a_tied_embedding_at_8_bits_and_vectors_at_f32(name: str) -> None:
    assigned = recipe.get(name).assign_specs(_model())
    assert assigned == {"embed": "q8_0", "q": name, "down": name, "q.bias": "f32", "norm": "f32"}


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_low_bit_recipe_of_an_untied_model_puts_the_embedding_on_its_grid(name: str) -> None:
    assigned = recipe.get(name).assign_specs(_model(tied=False))
    assert (assigned["embed"], assigned["head"]) == (name, "q8_0")


@pytest.mark.skipif("q6_k" not in grid.names(), reason="no q6_k grid")
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_whole_q6_k_blocks_put_the_head_on_q6_k(tied: bool) -> None:
    head = "embed" if tied else "head"
    for name in LOW_BIT:
        assert recipe.get(name).assign_specs(_model(row=512, tied=tied))[head] == "q6_k"
    assert recipe.get("q8_0").assign_specs(_model(row=512, tied=tied))[head] == "q8_0"


@pytest.mark.parametrize("name", ["q8_0", "f16", "bf16", "f32"])
def test_the_other_recipes_put_every_matrix_on_their_grid(name: str) -> None:
    assigned = recipe.get(name).assign_specs(_model(tied=False))
    assert {assigned[n] for n in ("embed", "q", "down", "head")} == {name}
    assert assigned["norm"] == "f32"


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_an_mlx_recipe_has_8_bits(group: int, tied: bool) -> None:
    assigned = recipe.get(f"mlx_affine4_g{group}").assign_specs(_model(tied=tied, row=576))
    assert assigned["embed" if tied else "head"] == f"mlx_affine8_g{group}"
    assert (assigned["q"], assigned["norm"]) == (f"mlx_affine4_g{group}", "f32")
    assert set(recipe.get(f"mlx_affine8_g{group}").assign_specs(_model()).values()) == {f"mlx_affine8_g{group}", "f32"}


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128"])
def test_an_int4_recipe_leaves_embedding_and_head(name: str) -> None:
    assigned = recipe.get(name).assign_specs(_model(tied=False, row=512))
    assert {n for n, grid_name in assigned.items() if grid_name == name} == {"q", "down"}
    assert {assigned[n] for n in ("embed", "head", "norm")} == {"f32"}


def _gemma4(tied: bool = True) -> list[Spec]:
    """Gemma 4's tensors that other models do not have."""
    head = [] if tied else [Spec("head", "output", (1000, 512))]
    return [
        Spec("embed", "embedding", (1000, 512)),
        Spec("per layer", "per_layer_embedding", (1000, 768)),
        Spec("model proj", "per_layer_model_proj", (768, 512)),
        Spec("gate", "per_layer_gate", (256, 512)),
        Spec("router", "router", (8, 512)),
        Spec("router scale", "scale", (512,)),
        Spec("gate up", "experts_gate_up", (8, 1024, 512)),
        Spec("down", "experts_down", (8, 512, 512)),
        *head,
    ]


def test_gemma_4_as_llama_quantize_makes_it() -> None:
    assigned = recipe.get("q4_0").assign_specs(_gemma4())
    assert assigned == {
        "embed": "q6_k", "per layer": "q6_k", "model proj": "f32", "gate": "q4_0", "router": "f32",
        "router scale": "f32", "gate up": "q4_0", "down": "q4_0",
    }  # fmt: skip
    untied = recipe.get("q4_0").assign_specs(_gemma4(tied=False))
    assert (untied["embed"], untied["per layer"], untied["head"]) == ("q4_0", "q4_0", "q6_k")
    assert recipe.get("f16").assign_specs(_gemma4())["model proj"] == "f16"
    assert recipe.get("f16").assign_specs(_gemma4())["router"] == "f32"


@pytest.mark.parametrize(("dtype", "kept"), [("BF16", "bf16"), ("F16", "f16"), ("F32", "f32"), ("Q8_0", "f32")])
def test_the_projection_of_all_layers_inputs_keeps_its_type(dtype: str, kept: str) -> None:
    @dataclass(frozen=True)
    class Stored(Spec):
        dtype: str

    tensor = Stored("model proj", "per_layer_model_proj", (768, 512), dtype)
    for name in (*LOW_BIT, "q8_0"):
        assert recipe.get(name).assign_specs([tensor]) == {"model proj": kept}


def test_rows_that_are_not_whole_blocks_name_the_tensor() -> None:
    with pytest.raises(Unsupported, match="down: the rows are not whole q4_0 blocks; found rows of 48; expected a mul"):
        recipe.get("q4_0").assign_specs([Spec("down", "ffn_down", (64, 48))])
    assert recipe.get("f16").assign_specs([Spec("down", "ffn_down", (64, 48))]) == {"down": "f16"}


FALLBACK = [("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0"), ("iq4_nl", "iq4_nl")]


@pytest.mark.parametrize(("name", "fallback"), FALLBACK)
def test_rows_that_are_not_blocks_of_256_fall_back_as_in_llama_quantize(name: str, fallback: str) -> None:
    assigned = recipe.get(name).assign_specs(_model(row=576, tied=False))
    assert assigned == {
        "embed": fallback, "q": fallback, "down": name, "q.bias": "f32", "norm": "f32", "head": "q8_0",
    }  # fmt: skip
    with pytest.raises(Unsupported, match="rows of 48"):
        recipe.get(name).assign_specs([Spec("down", "ffn_down", (64, 48))])


def _layers(n: int, *, experts: int = 0, query_rows: int = 512, dense_too: bool = False) -> list[Spec]:
    specs = [Spec("embed", "embedding", (1000, 512))]
    for i in range(n):
        shapes = {"attn_q": (query_rows, 512), "attn_k": (256, 512), "attn_v": (256, 512), "attn_o": (512, 512)}
        shapes |= {"ffn_up": (768, 512), "ffn_down": (512, 768)} if not experts or dense_too else {}
        shapes |= {"experts_down": (experts, 512, 256)} if experts else {}
        specs += [Spec(f"model.layers.{i}.{role}", role, shape) for role, shape in shapes.items()]
    return specs


def _on(assigned: dict[str, str], role: str) -> list[str]:
    return [grid for name, grid in assigned.items() if name.endswith(f".{role}")]


def test_q4_k_m_gives_values_and_down_projections_of_some_layers_more_bits() -> None:
    """use_more_bits of llama-quant.cpp by hand: of 16 layers the first 2, the last 2, and every third between."""
    assigned = recipe.get("q4_k_m").assign_specs(_layers(16))
    more = {0, 1, 4, 7, 10, 13, 14, 15}
    for role in ("attn_v", "ffn_down"):
        assert _on(assigned, role) == ["q6_k" if i in more else "q4_k" for i in range(16)]
    assert {*_on(assigned, "attn_q"), *_on(assigned, "attn_k"), *_on(assigned, "attn_o"), *_on(assigned, "ffn_up")} == {
        "q4_k"
    }
    assert assigned["embed"] == "q6_k"


def test_q4_k_m_of_a_model_whose_layers_lack_values_counts_the_values_there_are() -> None:
    specs = [s for s in _layers(16) if s.role != "attn_v" or int(s.name.split(".")[2]) % 2]
    assigned = recipe.get("q4_k_m").assign_specs(specs)
    assert _on(assigned, "attn_v") == ["q6_k" if i in {0, 3, 6, 7} else "q4_k" for i in range(8)]


@pytest.mark.parametrize("experts", [4, 8])
def test_q4_k_m_of_experts(experts: int) -> None:
    """Eight of them, as Mixtral has, give attention more bits; both kinds of down projection go by the layer."""
    assigned = recipe.get("q4_k_m").assign_specs(_layers(8, experts=experts, dense_too=True))
    more = ["q6_k" if i in {0, 3, 6, 7} else "q4_k" for i in range(8)]
    assert _on(assigned, "experts_down") == more
    assert _on(assigned, "ffn_down") == more  # their rows are 768 long
    eight = experts == 8
    assert _on(assigned, "attn_v") == (["q8_0"] * 8 if eight else more)
    assert set(_on(assigned, "attn_k")) == {"q8_0" if eight else "q4_k"}
    assert set(_on(assigned, "attn_o")) == {"q5_k" if eight else "q4_k"}


@pytest.mark.parametrize(("rows", "grid"), [(512, "q5_k"), (256, "q4_k")])
def test_q4_k_m_of_80_layers_with_grouped_queries(rows: int, grid: str) -> None:
    values = _on(recipe.get("q4_k_m").assign_specs(_layers(80, query_rows=rows)), "attn_v")
    assert set(values) == {"q6_k", grid}


def test_q4_k_m_of_the_real_model_as_llama_quantize_makes_it(packaged_gguf) -> None:
    """Counted in a file that llama-quantize made: 576 columns fall back, 1536 do not."""
    with open_checkpoint(packaged_gguf("smollm2-135m")) as checkpoint:
        assigned = recipe.get("q4_k_m").assign(checkpoint)
    more = {0, 1, 2, *range(5, 26, 3), 26, 27, 28, 29}
    assert Counter(assigned.values()) == {"q5_0": 166, "f32": 61, "q4_k": 16, "q8_0": 15, "q6_k": 14}
    for i in range(30):
        assert assigned[f"model.layers.{i}.mlp.down_proj.weight"] == ("q6_k" if i in more else "q4_k")
        assert assigned[f"model.layers.{i}.self_attn.v_proj.weight"] == ("q8_0" if i in more else "q5_0")


def test_an_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(BadOption, match=r"'q5'; expected one of q4_0, .*, q4_k, .*, q4_k_m, f16, bf16, f32"):
        recipe.get("q5")


def test_the_real_model_as_llama_quantize_makes_it(packaged_gguf) -> None:
    with open_checkpoint(packaged_gguf("smollm2-135m")) as checkpoint:
        chosen = recipe.get("q4_0")
        assigned, trained = chosen.assign(checkpoint), chosen.trained(checkpoint)
    assert set(assigned) == set(checkpoint.names)
    assert assigned["model.embed_tokens.weight"] == "q8_0"
    assert len(trained) == 30 * 7
    assert "model.embed_tokens.weight" not in trained
    assert {assigned[name] for name in trained} == {"q4_0"}


@pytest.mark.parametrize(("name", "n_trained"), [
    ("q5_0", 30 * 7), ("q4_1", 30 * 7), ("q6_k", 30), ("mxfp4", 30 * 7), ("mobile_mlp2", 30 * 7 + 1), ("q8_0", 0),
    ("mobile_w8", 0),
])  # fmt: skip
def test_what_lies_below_8_bits_is_trained_and_the_head_below_6(packaged_gguf, name: str, n_trained: int) -> None:
    with open_checkpoint(packaged_gguf("smollm2-135m")) as checkpoint:
        assert len(recipe.get(name).trained(checkpoint)) == n_trained
