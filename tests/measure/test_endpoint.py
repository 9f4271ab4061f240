"""Endpoints: what a served file's few log-probabilities tell is checked against the file's own logits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "run"))

from bad_server import events, serving

from lowbit.errors import BadFile, BadOption, RuntimeFailed, Unsupported
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.endpoint import _lower_bound, agreement, places
from lowbit.report import terminal, view
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.run.llama_server import LlamaServer
from lowbit.run.openai import OpenAi

OPTIONS = MeasureOptions(
    chunk=64, chunks=3, threads=1, speed=False, memory=False, endpoint_places=8, top_logprobs=20, resamples=200
)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LlamaServer]:
    with LlamaServer(folder / "bad.gguf", context=256, threads=1) as server:
        yield server


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_a_lower_bound_is_one(folder: Path) -> None:
    """For random pairs of rows, however few tokens are named, also where q is given too large by what may be lost."""
    rng = np.random.default_rng(0)
    for n in (5, 300, 5000):
        for _ in range(40):
            row = (rng.standard_normal(n) * rng.uniform(0.1, 6)).astype(np.float32)
            p, q = log_softmax(row), log_softmax(row + rng.standard_normal(n) * rng.uniform(0.001, 3))
            true = float((np.exp(p) * (p - q)).sum())
            order = np.argsort(-q)
            last = 0.0
            for k in (1, 2, n // 3 + 1, n - 1):
                ids = order[:k]
                bound, covered = _lower_bound(row, ids, q[ids])
                assert bound <= true + 2e-6 and covered == pytest.approx(np.exp(p[ids]).sum(), abs=1e-6)
                lost, _ = _lower_bound(row, ids, q[ids] + n * 2.0**-25)
                assert lost <= true + 2e-6
                rest_q = 1 - np.exp(q[ids]).sum()
                if rest_q < 1e-3:
                    continue  # of little that is left no digits are left
                merged = np.append(np.exp(p[ids]), max(0, -np.expm1(np.log(np.exp(p[ids]).sum()))))
                exact = float((merged[:-1] * (p[ids] - q[ids])).sum() + merged[-1] * np.log(merged[-1] / rest_q))
                assert bound == pytest.approx(max(0, exact), abs=merged[-1] * n * 2.0**-25 / rest_q * 1.01 + 3e-6)
                assert exact >= last - 2e-6  # more tokens, a better bound
                last = exact
            whole, covered = _lower_bound(row, order, q[order] + 1e-4)  # a common factor falls out
            assert whole == pytest.approx(true, abs=2e-6) and covered == 1


def test_places_are_those_that_are_scored() -> None:
    assert places(64, 100).tolist() == list(range(32, 63)) and places(64, 1).tolist() == [32]
    assert places(512, 8).tolist() == [256 + i * 255 // 8 for i in range(8)] and places(4, 9).tolist() == [2]


def test_agreement_is_that_of_the_files_own_logits(folder: Path, server: LlamaServer) -> None:
    at = places(64, 8)
    with (
        LlamaCpp(folder / "reference.gguf", context=64, ubatch=64, threads=1) as reference,
        LlamaCpp(folder / "bad.gguf", context=64, threads=1) as model,
    ):
        ids = np.array(model.tokenize((folder / "text.txt").read_text())[: 3 * 64], np.int32).reshape(3, 64)
        p, q = (np.stack([log_softmax(next(m.logits(c))[1])[at] for c in ids]) for m in (reference, model))
        true = (np.exp(p) * (p - q)).sum(-1)
        few = agreement(reference, server, ids, at=at, k=20)
        whole = agreement(reference, server, ids, at=at, k=reference.n_vocab)
    assert np.array_equal(few.same_top, p.argmax(-1) == q.argmax(-1)) and 0 < few.same_top.mean() < 1
    assert whole.whole and not few.whole
    np.testing.assert_allclose(whole.bound, true, atol=5e-3)  # other batches, other kernels of attention
    assert (few.bound <= true + 5e-3).all() and 0.5 * true.mean() < few.bound.mean() < true.mean()
    assert set(whole.figures(resamples=200, seed=0)) == {"tokens", "kld_mean", "top1", "covered"}
    assert (few.covered < 1).all() and (few.covered > 0.1).all()


def test_measure_takes_files_a_served_file_and_a_url(folder: Path, server: LlamaServer, tmp_path: Path) -> None:
    options = MeasureOptions(
        chunk=64, chunks=3, threads=1, endpoint_places=8, top_logprobs=20, prompt_tokens=24, generate_tokens=4,
        resamples=200,
    )  # fmt: skip
    reference, text = folder / "reference.gguf", folder / "text.txt"
    result = measure([folder / "bad.gguf", server.url], against=reference, text=text, options=options)
    file, url = result["artifacts"]
    assert url["path"] == server.url and url["model"] == "bad.gguf" and url["sha256"] is None
    assert url["runtime"]["name"] == "openai" and url["runtime"]["version"].startswith("llama-server")
    fidelity = url["fidelity"]
    assert set(fidelity) == {"tokens", "kld_lower_bound", "top1", "covered"} and fidelity["top1"]["n"] == 3 * 8
    assert 0 < fidelity["kld_lower_bound"]["value"] < file["fidelity"]["kld_mean"]["high"]
    for name in ("time_to_first_token", "prompt_tokens_per_second", "generation_tokens_per_second"):
        assert url["speed"][name]["n"] == 3 and url["speed"][name]["value"] > 0
    assert "memory" not in url and file["memory"] and result["pairs"] == []
    shown = {a.file: a for a in view.measured_artifacts(result)}
    assert f"bad.gguf at {server.url.split('/')[2]}" in shown and shown["bad.gguf"].runtime == "llama.cpp"
    with open(tmp_path / "table.txt", "w") as out:
        terminal.show_measurement(result, out)
    table = (tmp_path / "table.txt").read_text()
    assert "Mean KLD, at least" in table and "Runtime" in table and "Time to first token" in table

    named = MeasureOptions(**{**vars(options), "runtime": "llama-server", "speed": False})
    [entry] = measure(folder / "bad.gguf", against=reference, text=text, options=named)["artifacts"]
    assert entry["runtime"]["name"] == "llama-server" and len(entry["sha256"]) == 64
    assert entry["memory"]["peak_bytes"]["value"] > 1e7
    same = entry["fidelity"]["kld_lower_bound"]["value"]
    assert same == pytest.approx(fidelity["kld_lower_bound"]["value"], abs=2e-3)


def test_another_models_endpoint_is_refused(folder: Path, server: LlamaServer, tmp_path: Path) -> None:
    from tiny_gguf import write_tiny

    text = folder / "text.txt"
    write_tiny(tmp_path / "other.gguf", merges=("t h", "th e", "i n", "o n"))
    write_tiny(tmp_path / "wider.gguf", extra_tokens=5)
    for other, says in (("other.gguf", "tokenizer"), ("wider.gguf", "vocabulary")):
        with pytest.raises(BadFile, match=says):
            measure(server.url, against=tmp_path / other, text=text, options=OPTIONS)
    with pytest.raises(BadOption, match="does not fit the endpoint's context"):
        options = MeasureOptions(chunk=300, threads=1, speed=False, memory=False)
        measure(server.url, against=folder / "reference.gguf", text=text, options=options)
    for target, runtime in ((server.url, None), (folder / "reference.gguf", "llama-server")):
        options = MeasureOptions(chunk=64, reference_runtime=runtime, speed=False, memory=False)
        with pytest.raises(Unsupported, match="no logits"):
            measure(folder / "bad.gguf", against=target, text=text, options=options)


def test_an_endpoint_without_token_ids(folder: Path) -> None:
    """An Ollama: its speed is measured, its fidelity is not made up."""
    prompts: list[str] = []

    def answer(handler: Any, body: Any) -> None:
        prompts.append(body["prompt"])
        pieces = ['{"choices": [{"text": "a"}]}'] * 4
        usage = '{"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 4}}'
        events(handler, *pieces, usage, "[DONE]", pause=0.01)

    options = MeasureOptions(chunk=64, chunks=3, threads=1, prompt_tokens=24, generate_tokens=4, resamples=200)
    with serving({"/api/version": {"version": "0.12.1"}, "/v1/completions": answer}) as url:
        result = measure(url, against=folder / "reference.gguf", text=folder / "text.txt", options=options)
    [entry] = result["artifacts"]
    assert entry["fidelity"] == {} and "does not tokenize" in entry["not_measured"] and "memory" not in entry
    assert entry["speed"]["time_to_first_token"]["n"] == 3
    assert 20 < entry["speed"]["generation_tokens_per_second"]["value"] < 101
    assert len(set(prompts)) == 4 and all(isinstance(prompt, str) and prompt for prompt in prompts)
    [line] = view.not_measured(result)
    assert line.startswith("a-model at 127.0.0.1:") and "no fidelity" in line


def test_an_endpoint_that_dies_on_the_way(folder: Path) -> None:
    with (
        LlamaServer(folder / "bad.gguf", context=256, threads=1) as server,
        OpenAi(server.url) as endpoint,
        LlamaCpp(folder / "reference.gguf", context=64, threads=1) as reference,
    ):
        ids = np.full((50, 64), 5, np.int32)
        threading.Timer(0.3, server.close).start()
        with pytest.raises(RuntimeFailed) as error:
            for _ in range(100):
                agreement(reference, endpoint, ids, at=places(64, 31), k=5)
        assert "\n" not in str(error.value)
