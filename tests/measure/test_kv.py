"""KV cache types: the figures are those of the definition, and what is said of them follows from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import write_tiny

import lowbit
from lowbit.errors import BadOption, BadText, Unsupported
from lowbit.measure import KvOptions, MeasureOptions, kv, measure
from lowbit.run.llama_cpp import LlamaCpp

TYPES = ("f16", "q8_0", "q8_0:q4_0")


def options(**changes: Any) -> MeasureOptions:
    asked = {"types": TYPES[1:], "contexts": (256, 512), "tokens": 1024, **changes}
    return MeasureOptions(chunk=64, chunks=2, threads=1, speed=False, memory=False, kv=KvOptions(**asked))


def logits(path: Path, tokens: np.ndarray, kv_type: str) -> np.ndarray:
    with LlamaCpp(path, context=512, threads=1, kv_type=kv_type) as model:
        rows = np.concatenate([rows for _, rows in model.logits(tokens)]).astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def test_spans_lie_evenly_and_end_where_the_text_is_known() -> None:
    for context in (256, 512, 777, 2048, 8192, 32768):
        spans = kv.spans_of(context)
        assert spans[-1][1] == context - 1 and spans[0][0] >= 0
        assert all(end - first == kv.SPAN for first, end in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert kv.spans_of(8192)[0] == (447, 511) and len(kv.spans_of(512)) == 4


def test_figures_are_those_of_the_definition(folder: Path) -> None:
    result = measure(
        folder / "bad.gguf", against=folder / "reference.gguf", text=folder / "text.txt", options=options()
    )
    [entry] = result["kv"]["artifacts"]
    assert result["kv"]["types"] == list(TYPES)
    cells = {(cell["type"], cell["context"]): cell for cell in entry["cells"]}
    assert {(t, c): cells[t, c]["sequences"] for t in TYPES for c in (256, 512)} == {
        (t, c): 1024 // c for t in TYPES for c in (256, 512)
    }
    with LlamaCpp(folder / "reference.gguf", context=64, threads=1) as model:
        ids = np.array(model.tokenize((folder / "text.txt").read_text(encoding="utf-8")), np.int32)
    at = np.concatenate([np.arange(*span) for span in kv.spans_of(512)[2:]])
    tops, klds, own, nll = [], [], [], []
    for tokens in ids[:1024].reshape(2, 512):
        p, base, q = (
            logits(folder / name, tokens, kind)[at]
            for name, kind in (("reference.gguf", "f16"), ("bad.gguf", "f16"), ("bad.gguf", "q8_0:q4_0"))
        )
        klds.append((np.exp(p) * (p - q)).sum(-1))
        own.append((np.exp(base) * (base - q)).sum(-1))
        tops.append(base.argmax(-1) == q.argmax(-1))
        nll.append(-q[np.arange(len(at)), tokens[at + 1]])
    found = cells["q8_0:q4_0", 512]
    assert found["kld"]["value"] == pytest.approx(np.mean(klds), rel=1e-4)
    # Decoded in other pieces than here, llama.cpp rounds otherwise in the last bits.
    assert found["kld_to_f16"]["value"] == pytest.approx(np.mean(own), rel=2e-2)
    assert found["top1_as_f16"]["value"] == pytest.approx(np.mean(tops), abs=0.01)
    assert found["perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-3)
    assert found["kld_added"]["value"] == pytest.approx(found["kld"]["value"] - cells["f16", 512]["kld"]["value"])
    assert cells["f16", 512]["kld_to_f16"]["value"] == 0 and cells["f16", 512]["top1_as_f16"]["value"] == 1
    assert 0 < cells["q8_0", 512]["kld_to_f16"]["value"] < found["kld_to_f16"]["value"]
    bands = found["by_position"]
    assert [(band["from"], band["to"]) for band in bands] == kv.spans_of(512)
    assert np.mean([band["kld"]["value"] for band in bands[2:]]) == pytest.approx(found["kld"]["value"])


def test_cache_bytes_are_what_llama_cpp_allocates(folder: Path) -> None:
    """2 layers, one head of 32, keys and values, 512 cells: 2 * 2 * 32 * 512 values of 2 bytes; 34 and 18 a 32."""
    result = measure(
        folder / "good.gguf", against=folder / "reference.gguf", text=folder / "text.txt", options=options()
    )
    sizes = {(c["type"], c["context"]): c["cache_bytes"] for c in result["kv"]["artifacts"][0]["cells"]}
    assert sizes["f16", 512] == 2 * sizes["f16", 256] == 2 * 2 * 32 * 512 * 2
    assert sizes["q8_0", 512] == 2 * 2 * 512 * 34
    assert sizes["q8_0:q4_0", 512] == 2 * 512 * (34 + 18)


def cell(kind: str, low: float, high: float, size: int, limit: float = 0.02) -> dict[str, Any]:
    figure = {"value": (low + high) / 2, "low": low, "high": high, "n": 9}
    return {
        "type": kind,
        "context": 512,
        "cache_bytes": size,
        "kld_to_f16": figure,
        "verdict": kv.verdict(figure, limit),
    }


def test_the_recommendation_follows_from_the_thresholds() -> None:
    f16, q8 = cell("f16", 0, 0, 100), cell("q8_0", 0.001, 0.004, 53)
    assert q8["verdict"] == "no measurable difference"
    q5, q4 = cell("q5_0", 0.006, 0.019, 34), cell("q4_0", 0.05, 0.09, 28)
    assert (q5["verdict"], q4["verdict"]) == ("within the limit", "above the limit")
    best = kv.recommend([f16, q8, q5, q4], 0.02)
    assert (best["type"], best["cache_bytes"], best["f16_bytes"]) == ("q5_0", 34, 100)
    assert best["why"][0].startswith("q8_0: no measurable difference")
    assert "0.07 nats [0.05, 0.09] at 512, above the limit of 0.02" in best["why"][2]
    straddling = cell("q5_0", 0.01, 0.03, 34)
    assert straddling["verdict"].startswith("undecided")
    assert kv.recommend([f16, q8, straddling, q4], 0.02)["type"] == "q8_0"
    assert kv.recommend([f16, q4], 0.02)["type"] == "f16"
    # One context above the limit is enough.
    assert kv.recommend([f16, q8, {**cell("q8_0", 0.1, 0.2, 99), "context": 2048}], 0.02)["type"] == "f16"


def test_impossible_options_are_refused(folder: Path) -> None:
    for bad in ({"types": ()}, {"contexts": (100,)}, {"tokens": 0}, {"limit": 0.0}, {"limit": float("nan")}):
        with pytest.raises(BadOption):
            KvOptions(**bad)  # type: ignore[arg-type]
    run = {"against": folder / "reference.gguf", "text": folder / "text.txt"}
    with pytest.raises(BadOption, match="unknown KV cache type"):
        measure(folder / "good.gguf", options=options(types=("q9",)), **run)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="longer than the model was trained for"):
        measure(folder / "good.gguf", options=options(contexts=(4096,)), **run)  # type: ignore[arg-type]
    (folder / "short.txt").write_text("the rain went on " * 40, encoding="utf-8")
    with pytest.raises(BadText, match="too short"):
        measure(
            folder / "good.gguf", against=folder / "reference.gguf", text=folder / "short.txt",
            options=options(contexts=(1024,)),
        )  # fmt: skip


def test_mlx_caches_of_its_own_kinds(tiny_llama: Callable[..., Path], tiny_gemma3: Any, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    source = tiny_llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    folder = lowbit.pack(source, "mlx_affine8_g32", tmp_path / "mlx").path
    (tmp_path / "text.txt").write_text("the thing in the rain, and nothing else at all. " * 60, encoding="utf-8")
    asked = options(types=("q8_g32", "q4_g32"), contexts=(256,), tokens=512)
    result = measure(folder, against=source, text=tmp_path / "text.txt", options=asked)
    cells = {cell["type"]: cell for cell in result["kv"]["artifacts"][0]["cells"]}
    own = {name: cells[name]["kld_to_f16"]["value"] for name in cells}
    assert own["f16"] == 0 < own["q8_g32"] < own["q4_g32"]
    assert cells["q4_g32"]["cache_bytes"] < cells["q8_g32"]["cache_bytes"] < cells["f16"]["cache_bytes"]
    with pytest.raises(BadOption, match="MLX has no such KV cache"):
        measure(folder, against=source, text=tmp_path / "text.txt", options=options(types=("q8_0",), contexts=(256,)))
    sliding = tiny_gemma3()
    with pytest.raises(Unsupported, match="sliding window"):
        measure(
            lowbit.pack(sliding, "mlx_affine8_g32", tmp_path / "gemma").path, against=sliding,
            text=tmp_path / "text.txt", options=asked,
        )  # fmt: skip


def test_llama_cpp_turns_quantized_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies keys and values by a Hadamard matrix where heads are multiples of 64, unless it is told not to."""
    tokens = np.random.default_rng(0).integers(3, 250, 200).astype(np.int32)
    for width, turned in ((128, True), (64, False)):
        path = write_tiny(tmp_path / f"{width}.gguf", width=width)
        monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE", raising=False)
        with_it = logits(path, tokens, "q4_0")
        plain = logits(path, tokens, "f16")
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        assert (not np.array_equal(logits(path, tokens, "q4_0"), with_it)) == turned
        assert np.array_equal(logits(path, tokens, "f16"), plain)
