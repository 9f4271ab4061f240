"""Tasks on real models: probabilities by the definition, pairs, flips, and a journal that survives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import write_tiny

from lowbit.errors import BadOption
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.tasks import TaskOptions, _journal
from lowbit.measure.tasks._engine import InProcess
from lowbit.measure.tasks._journal import Journal
from lowbit.run.llama_cpp import LlamaCpp

OPTIONS = MeasureOptions(threads=1, speed=False, memory=False)
CONTEXT = "The history of the county begins with the river. " * 3 + "The river"
ENDS = [" flows to the sea", " flows", " sleeps under a table", "", " flows to the sea and back"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model and a worse copy of it."""
    folder = tmp_path_factory.mktemp("models")
    return {"good": write_tiny(folder / "good.gguf"), "bad": write_tiny(folder / "bad.gguf", noise=0.2)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def plainly(model: LlamaCpp, context: str, continuation: str) -> tuple[float, bool]:
    """log p of a continuation from the definition: one pass over the whole text, float64."""
    before = len(model.tokenize(context))
    ids = model.tokenize(context + continuation)
    rows = np.concatenate([rows for _, rows in model.logits(ids)]).astype(np.float64)
    total, greedy = 0.0, True
    for at in range(before, len(ids)):
        row = rows[at - 1]
        total += row[ids[at]] - row.max() - np.log(np.exp(row - row.max()).sum())
        greedy = greedy and row.argmax() == ids[at]
    return total, greedy


def test_likelihoods_are_those_of_the_definition(smollm2: Path) -> None:
    with LlamaCpp(smollm2, context=256, threads=1) as model:
        engine = InProcess(model)
        found = engine.loglikelihoods(CONTEXT, ENDS)
        for end, likelihood in zip(ENDS, found, strict=True):
            expected, greedy = plainly(model, CONTEXT, end)
            assert likelihood.logprob == pytest.approx(expected, abs=2e-3)
            assert likelihood.greedy == greedy
        # What contexts share is kept, and changes nothing; nor does the order, nor a runtime that cannot go back.
        engine.share([CONTEXT, CONTEXT + " is long", CONTEXT[:-3]])
        assert len(engine._shared) > 16
        for _ in range(2):
            again = engine.loglikelihoods(CONTEXT, ENDS[::-1])[::-1]
            assert [x.logprob for x in again] == pytest.approx([x.logprob for x in found], abs=2e-3)
        engine.model.rewinds = False  # type: ignore[misc]
        afresh = engine.loglikelihoods(CONTEXT, ENDS)
        assert [x.logprob for x in afresh] == pytest.approx([x.logprob for x in found], abs=2e-3)


def test_a_long_text_is_cut_into_windows_that_predict_each_token_once(models: dict[str, Path]) -> None:
    text = "Once upon a time there was a king who had three daughters, and the youngest of them was clever. " * 2
    with (
        LlamaCpp(models["good"], context=32, threads=1) as small,
        LlamaCpp(models["good"], context=256, threads=1) as large,
    ):
        ids = large.tokenize(text)
        few, whole = InProcess(small).rolling(text), InProcess(large).rolling(text)
        assert few.tokens == whole.tokens == len(ids)
        assert few.logprob != whole.logprob
        rows = np.concatenate([rows for _, rows in large.logits([large.bos, *ids[:-1]])]).astype(np.float64)
        chosen = rows[np.arange(len(ids)), ids] - rows.max(-1)
        expected = (chosen - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1))).sum()
        assert whole.logprob == pytest.approx(expected, abs=0.01)


def test_an_answer_longer_than_the_context_is_one_line(models: dict[str, Path]) -> None:
    with (
        LlamaCpp(models["good"], context=16, threads=1) as model,
        pytest.raises(BadOption, match="longer than the context"),
    ):
        InProcess(model).loglikelihoods("x", [" word" * 40])


def test_two_files_on_the_same_questions(models: dict[str, Path], tmp_path: Path, own_cache: Path) -> None:
    tasks = TaskOptions(tasks=["facts"], limit=24)
    result = measure(models["bad"], against=models["good"], tasks=tasks, options=OPTIONS, json=tmp_path / "r.json")
    entry = json.loads((tmp_path / "r.json").read_text())["tasks"][0]
    assert entry == result["tasks"][0]
    reference, artifact = entry["results"]
    assert [Path(r["path"]).name for r in (reference, artifact)] == ["good.gguf", "bad.gguf"]
    pair = entry["pairs"][0]
    right = [[o["scores"]["acc"] for o in r["outcomes"]] for r in (reference, artifact)]
    assert len(right[0]) == entry["items"] == 24 and entry["total"] > 100
    assert artifact["scores"]["acc"]["value"] == pytest.approx(np.mean(right[1]))
    assert pair["metrics"]["acc"]["value"] == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    turned = [(a, b) for a, b in zip(*right, strict=True) if a != b]
    assert (pair["won"], pair["lost"]) == (turned.count((0, 1)), turned.count((1, 0)))
    assert len(pair["flips"]) == len(turned)
    assert {f["turned"] for f in pair["flips"]} <= {"right", "wrong"}
    assert pair["metrics"]["margin"]["verdict"]
    assert not list(own_cache.rglob("*.jsonl"))  # the journals are gone: the result is there
    again = measure(models["bad"], against=models["good"], tasks=tasks, options=OPTIONS)
    assert again["tasks"] == result["tasks"]


def test_the_file_itself_shows_no_difference(models: dict[str, Path]) -> None:
    again = measure(
        [models["good"]], against=models["good"], tasks=TaskOptions(tasks=["facts"], limit=12), options=OPTIONS
    )
    pair = again["tasks"][0]["pairs"][0]
    assert pair["changed"] == pair["won"] == pair["lost"] == 0
    assert all(m["verdict"] == "no measurable difference" for m in pair["metrics"].values())


def test_generation_is_cut_at_the_stop(smollm2: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "em.jsonl",
        {"settings": {"max_tokens": 8}},
        {"prompt": "The capital of Italy is", "answers": ["Rome"]},
        {"prompt": "The capital of Italy is", "answers": ["Paris"]},
    )
    entry = measure(smollm2, tasks=TaskOptions(tasks=[str(path)]), options=OPTIONS)["tasks"][0]
    outcomes = entry["results"][0]["outcomes"]
    assert outcomes[0]["answer"] == outcomes[1]["answer"] and "\n" not in outcomes[0]["answer"]
    assert [o["scores"]["contains"] for o in outcomes] == [1.0, 0.0]
    assert entry["pairs"] == []


def test_a_killed_run_goes_on(models: dict[str, Path], tmp_path: Path, own_cache: Path) -> None:
    n = 1000
    lines = ({"true": f"The count is {i} now.", "false": f"The count is {i} never."} for i in range(n))
    path = write(tmp_path / "many.jsonl", *lines)
    command = [
        sys.executable, "-m", "lowbit", "measure", str(models["bad"]), "--tasks", str(path), "--threads", "1",
        "--json", str(tmp_path / "r.json"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and sum(len(p.read_bytes()) for p in own_cache.rglob("*.jsonl")) < 2000:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    journal = next(own_cache.rglob("*.jsonl"))
    kept = journal.read_bytes().splitlines()
    assert 5 < len(kept) < n and not (tmp_path / "r.json").exists()
    # What is there is not asked again: an outcome that only the journal has comes out in the result.
    item, outcome = json.loads(kept[0])
    kept[0] = json.dumps([item, {**outcome, "answer": "from the journal"}]).encode()
    journal.write_bytes(b"\n".join(kept) + b'\n["torn", {"sco')
    subprocess.run(command, env=environment, check=True, capture_output=True)
    outcomes = json.loads((tmp_path / "r.json").read_text())["tasks"][0]["results"][0]["outcomes"]
    assert len(outcomes) == n and outcomes[0]["answer"] == "from the journal"
    fresh = measure(models["bad"], tasks=TaskOptions(tasks=[str(path)]), options=OPTIONS)
    expected = fresh["tasks"][0]["results"][0]["outcomes"]
    assert outcomes[1:] == expected[1:]  # to the last bit, though the run was cut in two
    assert not journal.exists()


def test_a_journal_of_another_run_is_left_alone(tmp_path: Path) -> None:
    with Journal("a", folder=tmp_path) as first:
        first.add("1", {"scores": {}})
        with Journal("a", folder=tmp_path) as second:
            assert second.done == {}
            second.add("2", {"scores": {}})
        with Journal("b", folder=tmp_path) as other:
            assert other.done == {} and other.path != first.path
    with Journal("a", folder=tmp_path) as third:
        assert list(third.done) == ["1"]


@pytest.mark.parametrize("line", [b"[]", b"null", b'["x", 1]', b'["x", {"scores": 3}]', b"\xff", b"[" * 100_000, b"1"])
def test_a_damaged_journal_is_cut_where_it_ends_to_make_sense(tmp_path: Path, line: bytes) -> None:
    with Journal("a", folder=tmp_path) as journal:
        journal.add("1", {"scores": {"acc": 1.0}})
    with open(journal.path, "ab") as handle:
        handle.write(line + b'\n["2", {"scores": {}}]\n')
    with Journal("a", folder=tmp_path) as again:
        assert list(again.done) == ["1"]
    assert journal.path.read_bytes().count(b"\n") == 1


def test_without_a_place_for_it_there_is_no_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _journal.cache_folder().is_relative_to(tmp_path)
    with Journal("a") as journal:
        journal.add("1", {"scores": {}})
        assert journal.done == {"1": {"scores": {}}}


@pytest.mark.parametrize(
    ("options", "says"), [({}, "nothing to measure"), ({"text": "x.txt"}, "a text needs a reference")]
)
def test_something_must_be_asked(models: dict[str, Path], options: Any, says: str) -> None:
    with pytest.raises(BadOption, match=says):
        measure(models["good"], options=OPTIONS, **options)
