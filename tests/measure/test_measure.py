from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import prose, write_tiny

import lowbit.measure
from lowbit import files
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.errors import BadFile, BadOption, BadText, NotFound, RuntimeFailed
from lowbit.measure import MeasureOptions, fidelity, measure
from lowbit.measure.speed import probe
from lowbit.measure.text import chunks_of, read_text
from lowbit.run.llama_cpp import LlamaCpp

FAST = MeasureOptions(chunk=64, threads=1, speed=False, memory=False)


def run(folder: Path, *names: str, options: MeasureOptions = FAST, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"against": folder / "reference.gguf", "text": folder / "text.txt", **changes}
    return measure([folder / name for name in names], options=options, **arguments)


def values(entry: dict[str, Any]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in entry["fidelity"].items()}


def plainly(folder: Path, name: str, chunk: int) -> tuple[dict[str, float], float]:
    """The same figures from the definition: all logits at once, probabilities in float64, no streaming."""

    def probabilities(path: Path) -> tuple[np.ndarray, np.ndarray]:
        with LlamaCpp(path, context=chunk, ubatch=chunk, threads=1) as model:
            ids = np.array(model.tokenize((folder / "text.txt").read_text(encoding="utf-8")))
            chunks = ids[: len(ids) // chunk * chunk].reshape(-1, chunk)
            logits = np.stack([np.concatenate([x for _, x in model.logits(c)]) for c in chunks]).astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        scored = slice(chunk // 2, chunk - 1)
        return (p / p.sum(-1, keepdims=True))[:, scored].reshape(-1, p.shape[-1]), chunks[:, chunk // 2 + 1 :].ravel()

    p, following = probabilities(folder / "reference.gguf")
    q, _ = probabilities(folder / name)
    at = (np.arange(len(following)), following)
    kld = (p * np.log(p / q)).sum(-1)
    return {
        "tokens": len(following),
        "perplexity": float(np.exp(-np.log(q[at]).mean())),
        "kld_mean": float(kld.mean()),
        "kld_median": float(np.median(kld)),
        "kld_p99": float(np.percentile(kld, 99)),
        "kld_mean_llama_cpp": float(np.where(p > np.exp(-16), p * np.log(p / q), 0).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "rms_delta_p": float(np.sqrt(((q[at] - p[at]) ** 2).mean())),
    }, float(np.exp(-np.log(p[at]).mean()))


def test_figures_are_those_of_the_definition(folder: Path) -> None:
    result = run(folder, "good.gguf", "bad.gguf")
    for entry, name in zip(result["artifacts"], ("good.gguf", "bad.gguf"), strict=True):
        expected, perplexity = plainly(folder, name, 64)
        assert values(entry) == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert result["reference"]["perplexity"]["value"] == pytest.approx(perplexity)
        for figure in entry["fidelity"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    good, bad = result["artifacts"]
    assert good["fidelity"]["kld_mean"]["high"] < bad["fidelity"]["kld_mean"]["low"]


def test_the_file_itself_has_no_distance(folder: Path) -> None:
    entry = run(folder, "reference.gguf")["artifacts"][0]
    for name in ("kld_mean", "kld_median", "kld_p99", "rms_delta_p"):
        assert [entry["fidelity"][name][k] for k in ("value", "low", "high")] == [0, 0, 0]
    assert entry["fidelity"]["top1"]["low"] == 1


def test_pairs_are_differences_of_what_is_listed(folder: Path) -> None:
    result = run(folder, "bad.gguf", "good.gguf", "reference.gguf")
    bad, good, _ = (values(entry) for entry in result["artifacts"])
    pairs = {(Path(p["baseline"]).stem, Path(p["artifact"]).stem): p for p in result["pairs"]}
    assert list(pairs) == [("bad", "good"), ("bad", "reference"), ("good", "reference")]
    pair = pairs["bad", "good"]
    assert pair["kld_mean_ratio"]["value"] == pytest.approx(good["kld_mean"] / bad["kld_mean"])
    assert pair["kld_mean_difference"]["value"] == pytest.approx(good["kld_mean"] - bad["kld_mean"])
    assert pair["top1_difference"]["value"] == pytest.approx(good["top1"] - bad["top1"])
    assert pair["log_perplexity_difference"]["value"] == pytest.approx(np.log(good["perplexity"] / bad["perplexity"]))
    # Pairing takes out what the two share: the ratio is known better than from two separate intervals.
    apart = [result["artifacts"][i]["fidelity"]["kld_mean"] for i in (0, 1)]
    width = pair["kld_mean_ratio"]["high"] - pair["kld_mean_ratio"]["low"]
    assert 0 < width < apart[1]["high"] / apart[0]["low"] - apart[1]["low"] / apart[0]["high"]
    swapped = run(folder, "reference.gguf", "good.gguf")["pairs"][0]
    assert swapped["kld_mean_ratio"] is None


def test_the_same_inputs_give_the_same_json(folder: Path, tmp_path: Path) -> None:
    first = run(folder, "good.gguf", json=tmp_path / "out.json")
    again = run(folder, "good.gguf")
    assert json.loads((tmp_path / "out.json").read_text()) == first == again
    other = run(folder, "good.gguf", options=MeasureOptions(chunk=64, threads=1, speed=False, memory=False, seed=1))
    assert other["artifacts"][0]["fidelity"]["kld_mean"]["low"] != first["artifacts"][0]["fidelity"]["kld_mean"]["low"]
    assert values(other["artifacts"][0]) == values(first["artifacts"][0])


def test_what_identifies_the_measurement_is_recorded(folder: Path) -> None:
    result = run(folder, "good.gguf", options=MeasureOptions(chunk=64, chunks=3, threads=1, speed=False, memory=False))
    entry = result["artifacts"][0]
    assert entry["sha256"] == files.sha256(folder / "good.gguf")
    assert entry["size_bytes"] == (folder / "good.gguf").stat().st_size
    assert entry["bits_per_weight"] == 32
    assert "speed" not in entry
    assert "memory" not in entry
    assert result["text"]["sha256"] == files.sha256(folder / "text.txt")
    assert result["text"]["chunks"] == 3
    assert entry["fidelity"]["tokens"]["value"] == 3 * 31
    assert result["options"]["chunk"] == 64
    assert result["machine"]["xllamacpp"].startswith("2026.10.")


def test_slices_of_other_sizes_give_the_same_scores(folder: Path) -> None:
    def scores(rows: int) -> fidelity.Scores:
        options: dict[str, Any] = {"context": 256, "ubatch": 256, "logits_rows": rows, "threads": 1}
        with LlamaCpp(folder / "reference.gguf", **options) as a, LlamaCpp(folder / "bad.gguf", **options) as b:
            chunks = chunks_of(read_text(folder / "text.txt", a), chunk=256, limit=4, bos=None)
            return fidelity.score(a, [b], chunks)[1][0]

    whole, sliced = scores(256), scores(64)
    np.testing.assert_allclose(sliced.kld, whole.kld, rtol=1e-3)
    np.testing.assert_allclose(sliced.nll, whole.nll, rtol=1e-3)
    assert whole.kld.min() > 0


def test_each_chunk_begins_with_bos_where_the_model_has_one(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "bos.gguf", add_bos=True)
    (tmp_path / "text.txt").write_text(prose(300), encoding="utf-8")
    with LlamaCpp(path, context=64, threads=1) as model:
        text = read_text(tmp_path / "text.txt", model)
        assert text.ids[0] == 1
        chunks = chunks_of(text, chunk=64, limit=None, bos=model.bos)
    assert (chunks[:, 0] == 1).all()
    assert np.array_equal(chunks[:, 1:].ravel(), text.ids[: chunks.size].reshape(-1, 64)[:, 1:].ravel())


@pytest.mark.parametrize("piece", [5_000, 5_001, 5_002, 5_003])
@pytest.mark.parametrize(
    "text", [prose(6_000), "a\n\nin\n\n\n\n" * 3_000, "\n" * 20_000], ids=["prose", "breaks", "one run"]
)
def test_a_long_text_is_tokenized_piecewise_as_it_is_whole(
    text: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    sizes = []
    monkeypatch.setattr("lowbit.measure.text._PIECE", piece)
    path = write_tiny(tmp_path / "breaks.gguf", merges=("t h", "th e", "Ċ Ċ", "ĊĊ ĊĊ"))
    with LlamaCpp(path, context=64, threads=1) as model:

        class Counting:
            def tokenize(self, text: str, **options: bool) -> list[int]:
                sizes.append(len(text))
                return model.tokenize(text, **options)

        found = read_text(tmp_path / "long.txt", Counting()).ids
        assert found.tolist() == model.tokenize(text)
    if "the" in text:
        assert max(sizes) < len(text) / 2


def test_memory_does_not_grow_with_the_text(folder: Path, tmp_path: Path) -> None:
    """Python's and numpy's own allocations; llama.cpp's are made when a model is opened."""

    def peak(n_words: int) -> int:
        (tmp_path / "text.txt").write_text(prose(n_words), encoding="utf-8")
        tracemalloc.start()
        try:
            run(folder, "good.gguf", text=tmp_path / "text.txt")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(500)
    with LlamaCpp(folder / "reference.gguf", context=64) as model:
        all_logits = 8000 * 5 * model.n_vocab * 4
    assert peak(8000) < peak(1000) + all_logits / 10


def test_bad_texts_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    cases: list[tuple[bytes, str]] = [
        (b"", "empty"),
        (b"the rain\0" * 100, "binary"),
        (b"the rain \xff\xfe" * 100, "not UTF-8"),
        ("café".encode()[:-1] * 1, "not UTF-8"),
        (b"the rain went on", "too short"),
    ]
    for raw, expected in cases:
        path.write_bytes(raw)
        with pytest.raises(BadText, match=expected) as error:
            run(folder, "good.gguf", text=path)
        assert "\n" not in str(error.value)
    assert "tokens; expected at least 64" in str(error.value)
    with pytest.raises(NotFound):
        run(folder, "good.gguf", text=tmp_path / "absent.txt")


def test_an_artifact_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "wider.gguf", extra_tokens=5)
    with pytest.raises(BadFile, match="vocabulary"):
        measure(tmp_path / "wider.gguf", against=folder / "reference.gguf", text=folder / "text.txt", options=FAST)
    write_tiny(tmp_path / "other.gguf", merges=("t h", "th e", "i n", "o n"))
    with pytest.raises(BadFile, match="tokenizer") as error:
        measure(tmp_path / "other.gguf", against=folder / "reference.gguf", text=folder / "text.txt", options=FAST)
    assert "made from" in str(error.value)


def test_the_reference_may_be_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """It is packed as F32 and gives what the GGUF it came from gives."""
    with open_checkpoint(folder / "reference.gguf") as source:
        tensors = (Tensor(name=name, values=source.read(name)) for name in source.names)
        write_checkpoint(tmp_path / "checkpoint", source, tensors)
    result = run(folder, "reference.gguf", "good.gguf", against=tmp_path / "checkpoint")
    assert result["artifacts"][0]["fidelity"]["kld_mean"]["value"] == 0
    assert result["artifacts"][1] == run(folder, "good.gguf")["artifacts"][0]
    assert result["reference"]["path"] == str(tmp_path / "checkpoint")


def test_nothing_half_written_is_left(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes((folder / "good.gguf").read_bytes()[:9000])
    with pytest.raises(BadFile):
        measure(
            tmp_path / "cut.gguf",
            against=folder / "reference.gguf",
            text=folder / "text.txt",
            json=tmp_path / "out.json",
            options=FAST,
        )
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("bad", [{"chunk": 3}, {"chunks": 0}, {"repeats": 1}, {"threads": 0}, {"resamples": 1}])
def test_impossible_options_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(BadOption):
        MeasureOptions(**bad)  # type: ignore[arg-type]


def test_no_artifacts_is_refused(folder: Path) -> None:
    with pytest.raises(BadOption):
        run(folder)


def test_speed_and_memory_come_from_a_process_of_their_own(folder: Path) -> None:
    ballast = np.ones(200 * 2**20 // 8)  # must not show up in the artifact's figure
    options = MeasureOptions(chunk=64, chunks=2, threads=1, prompt_tokens=32, generate_tokens=8)
    result = run(folder, "good.gguf", options=options)
    for entry in (result["reference"], result["artifacts"][0]):
        peak, baseline = entry["memory"]["peak_bytes"]["value"], entry["memory"]["baseline_bytes"]["value"]
        assert 10e6 < baseline < peak < ballast.nbytes
        for rate in entry["speed"].values():
            assert rate["n"] == 3
            assert 0 <= rate["low"] <= rate["value"] <= rate["high"]
            assert rate["value"] > 0


def test_a_process_that_fails_says_why(folder: Path) -> None:
    with pytest.raises(RuntimeFailed, match="memory and speed failed") as error:
        probe(folder / "absent.gguf", [1, 2, 3])
    assert "no such file" in str(error.value)


def test_the_verb_is_a_function(folder: Path) -> None:
    result = lowbit.measure(  # type: ignore[operator]
        folder / "good.gguf", against=folder / "reference.gguf", text=folder / "text.txt", options=FAST
    )
    assert len(result["artifacts"]) == 1


def test_the_real_model_against_itself_with_a_coarse_cache(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rain had stopped, and the road to the village was empty. " * 40)
    options = MeasureOptions(chunk=128, chunks=2, kv_type="q8_0", speed=False, memory=False)
    entry = measure(smollm2, against=smollm2, text=tmp_path / "text.txt", options=options)["artifacts"][0]
    assert 0 < entry["fidelity"]["kld_mean"]["value"] < 0.05
    assert entry["fidelity"]["top1"]["value"] > 0.9
    assert entry["bits_per_weight"] == pytest.approx(5.74, abs=0.01)
