"""What a run leaves in its journal about time and tokens, the check against a reference, and the estimate."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jobs
import pytest
from batch_server import BatchServer, value_of
from jobs import SCHEMA

from lowbit import batch
from lowbit.batch import checking, meter
from lowbit.batch.checking import CheckOptions
from lowbit.batch.costs import Machine
from lowbit.batch.job import Job
from lowbit.errors import BadFile, BadOption, NotFound, RuntimeFailed
from lowbit.harness import Price

ONE = Price(prompt=1, completion=1)
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def done(tmp_path: Path, count: int = 40, **body: Any) -> Path:
    """A batch of so many items, run."""
    source = jobs.write(tmp_path / "in.jsonl", [f"item {i}" for i in range(count)], **body)
    with BatchServer(delay=0.005) as server:
        batch.run(source, tmp_path / "out.jsonl", endpoint=server.url)
    return source


def test_time_and_tokens_of_a_run(tmp_path: Path) -> None:
    found, agreement = batch.cost(done(tmp_path), Machine(price=3.6))
    work = found.work
    assert work.items == 40 and work.failed == 0 and agreement is None
    lines = jobs.read(tmp_path / "out.jsonl").values()
    usages = [line["response"]["body"]["usage"] for line in lines]
    assert work.prompt_tokens == sum(usage["prompt_tokens"] for usage in usages) > 0
    assert work.completion_tokens == sum(usage["completion_tokens"] for usage in usages) > 0
    assert 0.05 <= work.seconds < 30 and 0 <= work.loading < work.seconds
    assert work.per_item is not None and work.per_item.n == 8
    assert 40 * work.per_item.value == pytest.approx(work.seconds - work.loading, abs=1.5)
    assert found.dollars == pytest.approx(work.seconds * 0.001)
    json.dumps(found.as_json())


def test_going_on_adds_time_and_a_pause_does_not(tmp_path: Path) -> None:
    source = done(tmp_path)
    with Job.existing(source) as job:
        before = meter.work(job.journal)
        job.journal.set("span.x", {"begun": 1000.0, "seconds": 50.0, "joules": None})  # another day's
        job.journal.set("span.y", {"begun": 1040.0, "seconds": 20.0, "joules": None})  # beside it, 10 s longer
        after = meter.work(job.journal)
        assert after.seconds == pytest.approx(before.seconds + 60.0)
        clock = meter.Meter(job.journal)
        clock.tick(working=False)
        clock.tick()
        assert meter.work(job.journal).seconds == pytest.approx(after.seconds, abs=0.5)


def test_tries_that_failed_are_paid_here_and_not_there(tmp_path: Path) -> None:
    source = jobs.write(tmp_path / "in.jsonl", [f"{'bad json' if i < 3 else 'fine'} {i}" for i in range(9)],
                        response_format=FORM)  # fmt: skip
    with BatchServer() as server:
        batch.run(source, tmp_path / "out.jsonl", endpoint=server.url)
    work = batch.cost(source, Machine())[0].work
    assert (work.items, work.failed) == (6, 3)
    assert work.spent_completion_tokens > work.completion_tokens > 0


def test_a_check_that_agrees_and_goes_on(tmp_path: Path) -> None:
    source = done(tmp_path)
    with BatchServer() as server:
        options = CheckOptions(n=10, endpoint=server.url)
        found = batch.check(source, options)
        assert found is not None and found.exact.value == 1 and found.exact.n == 10 and len(server.asked) == 10
        assert found.exact.low < 1 and found.population == 40
        batch.check(source, options)
        assert len(server.asked) == 10  # nothing is asked twice
        more = batch.check(source, CheckOptions(n=25, endpoint=server.url))
        assert more is not None and more.exact.n == 25
        assert len(server.asked) == len(set(server.asked)) == 25  # a larger one asks for what is new
        assert batch.check(source, CheckOptions(n=99, endpoint=server.url, seed=3)) is not None
        assert len(set(server.asked)) == 40
    assert (again := batch.cost(source, Machine())[1]) is not None and again.exact.n == 40


def test_where_the_two_differ_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = done(tmp_path, response_format=FORM)
    monkeypatch.setattr("batch_server.value_of", lambda said: value_of(said) | {"score": -1})
    with BatchServer() as server:
        found = batch.check(source, CheckOptions(n=12, endpoint=server.url, endpoint_model="big"))
        assert {body["model"] for body in server.bodies} == {"big"}
    assert found is not None and found.exact.value == 0 and found.fields["label"].value == 1
    assert found.fields["score"].value == 0 and len(found.samples) == 12
    assert found.samples[0].fields == ("score",) and found.samples[0].question.startswith("item ")
    assert found.reference.startswith("big at http")


def test_a_cap_holds_and_the_check_goes_on_with_more(tmp_path: Path) -> None:
    source, ledger = done(tmp_path, max_tokens=100), tmp_path / "spend.sqlite"
    price = Price(prompt=0.0, completion=1000.0)  # 100 tokens are at most $0.10
    with BatchServer() as server:

        def checked(cap: float) -> Any:
            return batch.check(
                source, CheckOptions(n=20, endpoint=server.url, price=price, cap=cap, ledger=ledger, slots=1)
            )

        first = checked(0.12)
        assert first is not None and 1 <= first.exact.n < 20
        with Job.existing(source) as job:
            assert "spend cap" in job.journal.get("check")["stopped"]
        asked = len(server.asked)
        whole = checked(10.0)
        assert whole is not None and whole.exact.n == 20 and len(server.asked) == 20 > asked


def test_a_reference_that_is_not_there(tmp_path: Path) -> None:
    source = done(tmp_path, 5)
    assert batch.check(source, CheckOptions(n=3, endpoint="http://127.0.0.1:9/v1")) is None
    with Job.existing(source) as job:
        assert "unreachable" in job.journal.get("check")["stopped"] or job.journal.get("check")["stopped"]


@pytest.mark.parametrize(
    "values", [{"n": 0, "model": "a"}, {"n": 1}, {"n": 1, "model": "a", "endpoint": "http://b"},
               {"n": 1, "endpoint": "http://b", "cap": 1.0}, {"n": 1, "model": "a", "cap": 1.0, "price": ONE}],
)  # fmt: skip
def test_impossible_checks(values: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        CheckOptions(**values)


def test_a_check_before_anything_is_answered(tmp_path: Path) -> None:
    source = jobs.write(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(NotFound):
        batch.check(source, CheckOptions(n=1, endpoint="http://127.0.0.1:9/v1"))
    with pytest.raises(NotFound):
        batch.cost(source, Machine())


def test_what_answers_of_each_url_say() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    assert checking.said("/v1/chat/completions", {"choices": [{"message": {"content": "a"}}]}) == "a"
    assert json.loads(checking.said("/v1/chat/completions", {"choices": [{"message": {"tool_calls": [call]}}]})) == [
        {"name": "f", "arguments": "{}"}
    ]
    assert checking.said("/v1/completions", {"choices": [{"text": "b"}]}) == "b"
    output = [{"type": "message", "content": [{"type": "output_text", "text": "c"}]}]
    assert checking.said("/v1/responses", {"output": output}) == "c"


def test_a_check_and_an_estimate_of_a_table(tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("text\n" + "".join(f"row {i}\n" for i in range(30)))
    words = (source, "--template", "Is it good? {{ text }}")
    with BatchServer() as server:
        check = ("--check", 6, "--check-endpoint", server.url)
        ran = jobs.lowbit("run", *words, "-o", out, "--endpoint", server.url, *check, "--json", "-")
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        assert found["agreement"]["checked"] == 6 and found["agreement"]["exact"]["value"] == 1
        assert len(server.asked) == 36 and set(server.asked) == {f"Is it good? row {i}" for i in range(30)}
        estimated = jobs.lowbit("estimate", *words, "--json", "-")
        assert json.loads(estimated.stdout)["estimate"]["items"] == 30, estimated.stderr
        piping = jobs.command("run", "-", "-o", tmp_path / "piped.jsonl", "--endpoint", server.url, *check)
        line = json.dumps(jobs.request("a", "b"))
        piped = subprocess.run(piping, input=line, capture_output=True, text=True, timeout=60)
        assert piped.returncode == 0 and "Agreement with" in piped.stdout, piped.stderr


# The estimate


def test_items_and_limits_without_a_model(tmp_path: Path) -> None:
    source = jobs.write(tmp_path / "in.jsonl", [f"item {i}" for i in range(50)], max_tokens=7)
    with open(source, "a") as handle:
        handle.write("no json\n")
    found = batch.estimate(source)
    assert (found.items, found.bad, found.limit) == (50, 1, 7.0) and found.prompt is None
    assert found.first_problem is not None and found.first_problem.startswith("line 51")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("no\n")
    with pytest.raises(BadFile, match="no request"):
        batch.estimate(empty)


def test_a_probe_measures(tmp_path: Path) -> None:
    source = jobs.write(tmp_path / "in.jsonl", [f"item {i}" for i in range(600)])
    with BatchServer(delay=0.02) as server:
        found = batch.estimate(source, endpoint=server.url, probe=40)
        assert len(server.asked) == 40
    assert found.seconds is not None and 0.004 < found.seconds.value < 0.3 and found.seconds.n == 8
    work = found.work()
    assert work is not None and work.items == 600 and work.per_item == found.seconds
    assert work.seconds == pytest.approx(found.loading + 600 * found.seconds.value)
    json.dumps(found.as_json())
    with pytest.raises(RuntimeFailed):
        batch.estimate(source, endpoint="http://127.0.0.1:9/v1", probe=1)
    with pytest.raises(BadOption):
        batch.estimate(source, probe=3)


def test_prompt_tokens_are_those_that_the_model_s_server_counts(tmp_path: Path) -> None:
    """With a real model: counted without its weights, and counted by llama.cpp's server as it answers."""
    texts = ["Is this good? It is.", "Ünïcode <|im_end|> and 1 + 1 = 2", "a\n\nb" * 40]
    source = jobs.write(tmp_path / "in.jsonl", texts, max_tokens=2)
    found = batch.estimate(source, model="smollm2-135m")
    batch.run(source, tmp_path / "out.jsonl", model="smollm2-135m")
    lines = jobs.read(tmp_path / "out.jsonl").values()
    counted = [line["response"]["body"]["usage"]["prompt_tokens"] for line in lines]
    assert found.prompt is not None and found.prompt.n == 3
    assert found.prompt.value == pytest.approx(sum(counted) / 3)


def test_a_sample_s_interval_holds_the_truth(tmp_path: Path) -> None:
    """3,000 items of two lengths, of which 400 are counted."""
    texts = ["word " * (5 if i % 3 else 50) for i in range(3000)]
    source = jobs.write(tmp_path / "in.jsonl", texts)
    found = batch.estimate(source, model="smollm2-135m").prompt
    short, long = (
        batch.estimate(jobs.write(tmp_path / f"{n}.jsonl", ["word " * n]), model="smollm2-135m").prompt for n in (5, 50)
    )
    assert found is not None and short is not None and long is not None
    truth = (2 * short.value + long.value) / 3
    assert found.n == 400 and found.low < truth < found.high and found.high - found.low < 0.3 * truth


# The command


def test_the_command_line(tmp_path: Path) -> None:
    source = jobs.write(tmp_path / "in.jsonl", [f"item {i}" for i in range(30)])
    with BatchServer() as server:
        ran = jobs.lowbit(
            "run", source, "-o", tmp_path / "out.jsonl", "--endpoint", server.url, "--machine-price", "0.5", "--check",
            "10", "--check-endpoint", server.url, "--html", tmp_path / "page.html",
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert "a thousand items" in ran.stdout and "Agreement with" in ran.stdout
        page = (tmp_path / "page.html").read_text()
        assert "Agreement with" in page and "gpt-5-nano" in page
        probed = jobs.lowbit("estimate", source, "--endpoint", server.url, "--probe", 20, "--json", "-")
        assert json.loads(probed.stdout)["estimate"]["items"] == 30, probed.stderr
    again = jobs.lowbit("cost", source, "--kwh-price", "0.3", "--watts", "50", "--hosted", "gpt-5-nano", "--json", "-")
    found = json.loads(again.stdout)
    assert [entry["model"] for entry in found["cost"]["hosted"]] == ["gpt-5-nano"] and found["agreement"][
        "checked"
    ] == 10
    assert found["machine"]["cores"] and found["cost"]["prices"]["dated"]
    for words, said in (
        (("cost", source, "--watts", "5"), "--kwh-price"),
        (("cost", source, "--hosted", "huge"), "huge"),
        (("run", source, "--endpoint", "http://127.0.0.1:9/v1", "--check-slots", "3"), "--check N"),
        (("cost", tmp_path / "none.jsonl"), "no batch"),
    ):
        refused = jobs.lowbit(*words)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
