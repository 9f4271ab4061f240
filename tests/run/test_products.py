"""What an observer is shown of llama.cpp's products: the weight, what flows into it, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy_llama import numpy_llama
from tiny_gguf import write_tiny

from lowbit.run._products import Product
from lowbit.run.llama_cpp import LlamaCpp

TOKENS = np.random.default_rng(0).integers(3, 260, 40).astype(np.int32)


@dataclass
class Recorder:
    """Keeps copies of what it is shown; ends a decode after ``last``."""

    beginning: str = "blk."
    last: str = ""
    seen: list[Product] = field(default_factory=list)

    def wants(self, weight: str) -> bool:
        return weight.startswith(self.beginning)

    def see(self, product: Product) -> bool:
        experts = None if product.experts is None else product.experts.copy()
        self.seen.append(Product(product.weight, product.x.copy(), experts, product.y.copy(), product.source))
        return product.weight != self.last


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("experts") / "experts.gguf", experts=6, seed=3)


def watched(path: Path, recorder: object, tokens: np.ndarray = TOKENS) -> np.ndarray:
    options = {"threads": 1, "kv_type": "f32", "flash_attention": False}
    with LlamaCpp(path, context=256, observer=recorder, **options) as model:  # type: ignore[arg-type]
        return np.concatenate([rows for _, rows in model.logits(tokens)])


def test_every_product_of_a_weight_is_shown_once_with_its_inputs(tiny: Path) -> None:
    recorder, inputs = Recorder(), dict[str, np.ndarray]()
    watched(tiny, recorder)
    numpy_llama(tiny, TOKENS, inputs)
    assert sorted(p.weight for p in recorder.seen) == sorted(inputs)
    for product in recorder.seen:
        assert product.experts is None
        assert product.x.dtype == product.y.dtype == np.float32
        np.testing.assert_allclose(product.x, inputs[product.weight], atol=2e-4)


def test_the_result_is_the_weights_product_with_the_input(tiny: Path) -> None:
    import gguf

    recorder = Recorder()
    watched(tiny, recorder)
    weights = {t.name: np.array(t.data) for t in gguf.GGUFReader(tiny).tensors}
    for product in recorder.seen:
        np.testing.assert_allclose(product.y, product.x @ weights[product.weight].T, atol=1e-4)


def test_weights_that_are_given_the_same_have_the_same_source(tiny: Path) -> None:
    recorder = Recorder()
    watched(tiny, recorder)
    source = {product.weight: product.source for product in recorder.seen}
    for i in range(2):
        q, k, v = (source[f"blk.{i}.attn_{name}.weight"] for name in "qkv")
        assert q == k == v
        assert source[f"blk.{i}.ffn_gate.weight"] == source[f"blk.{i}.ffn_up.weight"]
    assert len(set(source.values())) == 2 * 4


def test_an_expert_is_shown_the_tokens_that_are_sent_to_it(experts: Path) -> None:
    recorder, inputs = Recorder(), dict[str, np.ndarray]()
    watched(experts, recorder)
    numpy_llama(experts, TOKENS, inputs)
    found = {product.weight: product for product in recorder.seen}
    assert found.keys() == inputs.keys()
    for name in ("gate", "up", "down"):
        product = found[f"blk.0.ffn_{name}_exps.weight"]
        slots = 2 if name == "down" else 1
        assert product.x.shape[:2] == (len(TOKENS), slots)
        assert product.experts is not None
        assert product.experts.shape == product.y.shape[:2] == (len(TOKENS), 2)
        for expert, wanted in enumerate(inputs[product.weight]):
            token, slot = np.nonzero(product.experts == expert)
            np.testing.assert_allclose(product.x[token, slot % slots], wanted, atol=2e-4)


def test_logits_do_not_change_by_looking(tiny: Path, experts: Path) -> None:
    for path in (tiny, experts):
        with LlamaCpp(path, context=256, threads=1, kv_type="f32", flash_attention=False) as model:
            plain = np.concatenate([rows for _, rows in model.logits(TOKENS)])
        np.testing.assert_array_equal(watched(path, Recorder()), plain)


def test_false_ends_the_decode_there_and_the_next_begins_anew(tiny: Path) -> None:
    recorder = Recorder(last="blk.0.attn_v.weight")
    with LlamaCpp(tiny, context=256, threads=1, observer=recorder) as model:
        for _ in range(2):
            list(model.logits(TOKENS))
    names = [product.weight for product in recorder.seen]
    half = names[: len(names) // 2]
    assert names == half + half
    assert names[-1] == "blk.0.attn_v.weight"
    assert {name.split(".")[2] for name in half} <= {"attn_q", "attn_k", "attn_v"}


@pytest.mark.parametrize("where", ["wants", "see"])
@pytest.mark.parametrize("error", [ValueError("no more"), KeyboardInterrupt()])
def test_an_error_of_the_observer_is_raised(tiny: Path, where: str, error: BaseException) -> None:
    def fail(*_: object) -> bool:
        raise error

    recorder = Recorder()
    setattr(recorder, where, fail)
    with pytest.raises(type(error)) as caught:
        watched(tiny, recorder)
    assert caught.value is error


def test_a_decode_in_parts_shows_all_tokens(tiny: Path) -> None:
    recorder = Recorder(beginning="blk.1.ffn_down")
    options = {"threads": 1, "kv_type": "f32", "flash_attention": False}
    with LlamaCpp(tiny, context=256, ubatch=16, observer=recorder, **options) as model:  # type: ignore[arg-type]
        list(model.logits(TOKENS))
    assert [len(product.x) for product in recorder.seen] == [16, 16, 8]
    inputs: dict[str, np.ndarray] = {}
    numpy_llama(tiny, TOKENS, inputs)
    x = np.concatenate([product.x for product in recorder.seen])
    np.testing.assert_allclose(x, inputs["blk.1.ffn_down.weight"], atol=2e-4)
