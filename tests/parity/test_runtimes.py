"""One model in every runtime that is installed, through the contract: the same tokens, the same logits.

The weights are the same float32 values everywhere, the caches float32 and flash attention off: what is left is the
order of float32 sums. llama-server gives log-probabilities, of the whole vocabulary, from a cache in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit import run
from lowbit.run.llama_server import LlamaServer

TEXT = "In the beginning the Universe was created. This made people angry, 42 times: 你好 <|im_end|>\n" * 2


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gemma3"])
def test_every_runtime_computes_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Any, family: str
) -> None:
    folder = request.getfixturevalue(family)()
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    lowbit.pack(folder, "f32", tmp_path / "mlx", to="mlx")
    exact = {"kv_type": "f32", "flash_attention": False}
    opened: list[tuple[str, Path, dict[str, Any]]] = [
        ("llama.cpp", tmp_path / "f32.gguf", exact),
        ("mlx", tmp_path / "mlx", {"dtype": "float32"}),
        ("mlx", folder, {"dtype": "float32"}),
        ("transformers", folder, {"threads": 1}),
        ("transformers", tmp_path / "f32.gguf", {"threads": 1}),
    ]
    found: list[tuple[str, list[int], np.ndarray]] = []
    for name, target, options in opened:
        if run.get(name).installed() is None:
            continue
        with run.open_artifact(target, name, context=256, **options) as model:
            ids = model.tokenize(TEXT)
            rows = np.concatenate([part for _, part in model.logits(ids)])
            assert rows.shape == (len(ids), model.n_vocab) and model.detokenize(ids) == TEXT
            found.append((f"{name} on {target.name}", ids, log_softmax(rows)))
            assert model.n_weights and model.version
    assert len(found) >= 2, "no two runtimes are installed"
    _, ids, expected = found[0]
    for name, own_ids, rows in found[1:]:
        assert own_ids == ids
        kl = float((np.exp(expected) * (expected - rows)).sum(-1).max())
        record_property(name, kl)
        print(f"{family}: {name} against llama.cpp: largest KL {kl:.1e} nats")
        assert kl < 1e-5 and (expected.argmax(-1) == rows.argmax(-1)).mean() > 0.98

    with LlamaServer(tmp_path / "f32.gguf", context=256, threads=1, **exact) as server:
        assert server.tokenize(TEXT) == ids
        for at in (10, len(ids) - 1):
            given = dict(server.next_tokens(ids[: at + 1], len(expected[0])))
            log_q = log_softmax(np.array([given[token] for token in range(len(expected[0]))]))
            assert float((np.exp(expected[at]) * (expected[at] - log_q)).sum()) < 1e-5


@pytest.mark.parametrize(("recipe", "to"), [("mlx_affine4_g32", "mlx"), ("int4_g32", "compressed-tensors")])
def test_a_quantized_artifact_has_the_values_it_stores(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str, to: str
) -> None:
    """What runs in MLX or transformers is what a reader of the format finds in it, in llama.cpp as F32."""
    packed = lowbit.pack(tiny_llama(num_hidden_layers=2), recipe, tmp_path / "packed", to=to).path
    lowbit.pack(packed, "f32", tmp_path / "f32.gguf")
    ids = np.random.default_rng(0).integers(3, 263, 80).tolist()
    rows = []
    for target, options in ((packed, {"dtype": "float32"}), (tmp_path / "f32.gguf", {"kv_type": "f32"})):
        with run.open_artifact(target, context=128, **options) as model:
            rows.append(log_softmax(np.concatenate([part for _, part in model.logits(ids)])))
    assert float((np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1).max()) < 1e-4
