"""Training for what the runtime will do: a quantized KV cache, rounded activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts_to_train_on import sentences

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption, Unsupported
from lowbit.grid import _on_the_fly
from lowbit.run._products import Product
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.train import TrainOptions, load, prepare
from lowbit.train.activation_quant import round_activations
from lowbit.train.fake_quant import quantized

TOKENS = np.random.default_rng(0).integers(3, 300, 100).astype(np.int32)
FEW: dict[str, Any] = {"threads": 1, "sequence_length": 64, "precision": "float32", "batch_size": 4}


@pytest.fixture
def prose(tmp_path: Path) -> str:
    return str(sentences(tmp_path / "prose.txt", 300))


def test_a_model_trained_for_a_cache_suffers_less_from_it(
    tiny_llama: Callable[..., Path], prose: str, tmp_path: Path
) -> None:
    """In llama.cpp: what a q4_0 cache adds to the KLD, of the same model trained with and without it."""
    folder = tiny_llama(head_dim=64)
    reference = lowbit.pack(folder, "f32", tmp_path / "reference.gguf").path
    added = {}
    for kv in (None, "q4_0"):
        options = TrainOptions(data=prose, steps=60, learning_rate=2e-3, kv=kv, **FEW)
        out = tmp_path / f"trained-{kv}"
        record = lowbit.train(folder, out, options=options).record
        manifest = json.loads((out / "lowbit.json").read_text(encoding="utf-8"))
        said = {} if kv is None else {"kv": "q4_0"}
        assert record["trained_for"] == manifest.get("trained_for", {}) == said
        path = lowbit.pack(out, "q4_0", tmp_path / f"{kv}.gguf").path
        without, with_it = (divergence(reference, path, kv_type) for kv_type in ("f16", "q4_0"))
        added[kv] = with_it - without
        assert without < 0.4
    assert added["q4_0"] < 0.9 * added[None], added


def divergence(reference: Path, path: Path, kv_type: str) -> float:
    """Mean KL(reference || file with such a cache) in llama.cpp."""
    p, q = (log_softmax(file, kv) for file, kv in ((reference, "f16"), (path, kv_type)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def log_softmax(path: Path, kv_type: str) -> torch.Tensor:
    with LlamaCpp(path, context=256, threads=1, kv_type=kv_type, flash_attention=True) as model:
        tokens = model.tokenize(
            "".join(f"Sentence {i} says that {i * i} is the square of {i}. " for i in range(400, 404))
        )
        rows = np.concatenate([rows for _, rows in model.logits(tokens[:250])])
    return torch.log_softmax(torch.from_numpy(rows).double(), -1)


class Recorder:
    """Keeps copies of the products of one layer's matrices."""

    def __init__(self) -> None:
        self.seen: dict[str, Product] = {}

    def wants(self, weight: str) -> bool:
        return weight.startswith("blk.0.")

    def see(self, product: Product) -> bool:
        self.seen[product.weight] = Product(product.weight, product.x.copy(), None, product.y.copy(), product.source)
        return True


@pytest.mark.parametrize("recipe", ["q4_0", "q5_0"])
def test_rounded_activations_give_llama_cpps_products(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    """Each product of the packed file is that of the layer with rounding, to the last bits of a float32 sum; without
    rounding it is a hundred times further off."""
    folder = tiny_llama(hidden_size=256, intermediate_size=512)
    path = lowbit.pack(folder, recipe, tmp_path / "packed.gguf", naive=True).path
    recorder = Recorder()
    with LlamaCpp(path, context=256, threads=1, observer=recorder) as model:
        for _ in model.logits(TOKENS):
            pass
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        student = prepare(load(checkpoint), recipe)
        names = {spec.gguf_name: name for name, spec in checkpoint.specs.items()}
        rounded = round_activations(student)
        modules = {name: module for name, module, _ in quantized(student)}
        compared = 0
        for weight, product in recorder.seen.items():
            name = names[weight]
            if name not in rounded or checkpoint.specs[name].heads:
                continue  # what GGUF reorders is left to the others
            x = torch.from_numpy(product.x)
            found = modules[name](x).numpy()
            size = np.sqrt(np.square(product.y).mean())
            exact = np.abs(found - product.y).max() / size
            plain = np.abs((x @ modules[name].weight.T).numpy() - product.y).max() / size
            assert exact < 1e-5 and plain > 1e-3, (name, exact, plain)
            compared += 1
    assert compared == 5  # value, output, gate, up, down


def test_the_gradient_passes_rounded_activations(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        model = prepare(load(checkpoint), "q4_0")
    tokens = torch.from_numpy(TOKENS[:20].astype(np.int64))[None]
    plain = model(tokens).logits
    names = round_activations(model)
    assert len(names) == 7 * 3 + 1  # three layers, and the output head, which the loss computes itself
    rounded = model(tokens).logits
    assert 0 < float((rounded - plain).abs().max()) < 0.2 * float(plain.abs().max())
    rounded.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad)
    x = torch.randn(5, 64)
    layer = model.model.layers[0].self_attn.k_proj
    expected = _on_the_fly.activations("q8_0", x) @ layer.weight.T
    assert torch.equal(layer(x), expected)
    assert grids.get("q4_0").name in {quantizer.grid.name for _, _, quantizer in quantized(model)}


def test_both_together_go_on_after_a_stop(tiny_llama: Callable[..., Path], prose: str, tmp_path: Path) -> None:
    folder, out = tiny_llama(head_dim=64), tmp_path / "out"
    chosen = {"kv": "q8_0:q4_0", "kv_share": 0.5, "activations": "runtime"}
    options = TrainOptions(data=prose, steps=2, **chosen, **FEW)  # type: ignore[arg-type]
    first = lowbit.train(folder, out, options=options)
    assert first.record["trained_for"] == {"kv": "q8_0:q4_0", "activations": "runtime"}
    again = lowbit.train(folder, out, options=options)
    assert again.record == first.record


@pytest.mark.parametrize(
    "bad", [{"kv": "q3_0"}, {"kv_share": 0.0}, {"kv_share": 1.5}, {"activations": "int8"}], ids=str
)
def test_impossible_options(bad: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        TrainOptions(**bad)


def test_heads_that_are_not_whole_blocks_are_refused_at_once(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(head_dim=16)
    with pytest.raises(Unsupported, match="whole blocks of a q4_0 cache"):
        lowbit.train(folder, tmp_path / "out", options=TrainOptions(kv="q4_0", steps=1, **FEW))
    assert not (tmp_path / "out").exists()
