"""One set of weights for several files: each container holds, bit for bit, what training computed for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from texts_to_train_on import sentences

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.train import TrainOptions, load, loop, prepare, save
from lowbit.train.fake_quant import chosen, master, quantized
from lowbit.train.pipeline import choose_parameters

CONTAINERS = {"q4_0": "gguf", "q4_k": "gguf", "mlx_affine4_g64": "mlx", "int4_g32": "compressed-tensors"}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture
def prose(tmp_path: Path) -> str:
    return str(sentences(tmp_path / "prose.txt", 300))


@pytest.mark.parametrize("train", ["full", "both"])
@pytest.mark.parametrize("recipe", ["q4_0,mlx_affine4", "int4_g32,q4_k", "q4_0,int4_g32,mlx_affine4_g64"])
def test_no_bit_differs_in_any_of_the_files(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str, train: str
) -> None:
    with open_checkpoint(tiny_llama(**WIDE)) as checkpoint:
        model = prepare(load(checkpoint), recipe, train=train)
        names = {name for one in lowbit.recipe.several(recipe) for name in one.trained(checkpoint)}
        _alternate(model, choose_parameters(model, train, tuple(names)))
        save(model, tmp_path / "trained", like=checkpoint)
    turn, of_recipes = chosen(model), []
    assert turn.names == tuple(one.name for one in lowbit.recipe.several(recipe))
    for which, name in enumerate(turn.names):
        out = tmp_path / name
        packed = lowbit.pack(tmp_path / "trained", name, out, to=CONTAINERS[name], certificate=True)
        with open_checkpoint(packed.path) as back, torch.no_grad(), turn.use(which):
            values = {each: torch.from_numpy(back.read(each)) for each in back.names}
            for each, module, _ in quantized(model):
                assert torch.equal(values[each].view(torch.int32), module.weight.view(torch.int32)), (name, each)
            of_recipes.append(values["model.layers.1.mlp.up_proj.weight"])
            if name == "int4_g32":  # its head is a float whatever the other files make of it
                assert torch.equal(values["lm_head.weight"], master(model.get_output_embeddings()))
    assert not any(torch.equal(of_recipes[0], other) for other in of_recipes[1:])


def test_turns_are_taken_in_training_and_each_is_looked_at(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, bool]] = []
    whole = loop.DistillationTrainer._divergence

    def noting(self: Any, model: Any, *rest: Any) -> torch.Tensor:
        taken.append((chosen(model).index, torch.is_grad_enabled()))
        return whole(self, model, *rest)

    monkeypatch.setattr(loop.DistillationTrainer, "_divergence", noting)
    options = TrainOptions(
        recipe="q4_0,mlx_affine4_g32", data=prose, steps=4, threads=1, sequence_length=32, precision="float32"
    )
    result = lowbit.train(tiny_llama(), tmp_path / "out", options=options)
    assert [index for index, trains in taken if trains] == [0, 1, 0, 1]
    assert {index for index, trains in taken if not trains} == {0, 1}
    manifest = json.loads((result.path / "lowbit.json").read_text())
    assert list(manifest["also"]) == ["mlx_affine4_g32"]
    assert (result.path / manifest["also"]["mlx_affine4_g32"]["file"]).is_file()


def test_names_with_commas() -> None:
    assert [one.name for one in lowbit.recipe.several("q4_0, mlx_affine4,q4_0")] == ["q4_0", "mlx_affine4_g64"]
    assert TrainOptions(recipe="q4_0,mlx_affine4").recipe == "q4_0,mlx_affine4_g64"
    with pytest.raises(BadOption, match="no such recipe"):
        TrainOptions(recipe="q4_0,q9")


def test_shared_weights_have_no_scales_to_train_alone(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = load(checkpoint)
    with pytest.raises(BadOption, match="share"):
        prepare(model, "q4_0,int4_g32", train="scales")


def test_ship_makes_one_file(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="one file"):
        lowbit.ship(tiny_llama(), out=tmp_path / "run", recipe="q4_0,mlx_affine4")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["../blocks.safetensors", "..", "", 7, None, "nothing.safetensors"])
def test_files_from_strangers(tiny_llama: Callable[..., Path], tmp_path: Path, bad: object) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "q4_0,int4_g32")
        save(model, tmp_path / "trained", like=checkpoint)
    shutil.copy(tmp_path / "trained" / "blocks.safetensors", tmp_path / "blocks.safetensors")
    path = tmp_path / "trained" / "lowbit.json"
    manifest = json.loads(path.read_text())
    manifest["also"]["int4_g32"]["file"] = bad
    path.write_text(json.dumps(manifest))
    with pytest.raises(Exception) as caught:
        open_checkpoint(tmp_path / "trained")
    assert isinstance(caught.value, BadFile) or "no such" in str(caught.value).lower()


def _alternate(model: Any, trained: list[torch.nn.Parameter]) -> None:
    generator, turn = torch.Generator().manual_seed(9), chosen(model)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, fused=True)
    for step in range(2 * turn.n):
        tokens = torch.randint(3, 300, (2, 16), generator=generator)
        with turn.use(step % turn.n):
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
