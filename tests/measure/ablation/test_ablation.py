"""The ablation: what was damaged decides, outcomes are paired, it goes on after a stop, conversations are checked."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lowbit import cli
from lowbit.errors import BadOption, BadText
from lowbit.harness import HarnessOptions
from lowbit.harness.structured import Schema
from lowbit.measure import ablation
from lowbit.measure.ablation import noisy, questions, simulated
from lowbit.measure.ablation.noisy import NoisyModel
from lowbit.measure.ablation.playing import play
from lowbit.measure.ablation.questions import GROUPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed (make install takes it)"
)


def by_name(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variant["name"]: variant for variant in model["variants"]}


def test_a_model_without_damage_is_right_everywhere() -> None:
    """The right answers go through the harness and through bfcl-eval's checks unharmed, bare and whole."""
    found = ablation.harness(options=ablation.AblationOptions(noisy=0.0, limit=12, layers=()))["models"][0]
    forged = found["faults"].get("forged", {"n": 0})["n"]
    whole, bare = by_name(found)[ablation.WHOLE], by_name(found)[ablation.BARE]
    assert found["questions"] == 12 * len(GROUPS)
    assert whole["valid"]["value"] == whole["right"]["value"] == 1.0
    assert bare["right"]["value"] == pytest.approx(1 - forged / found["questions"])


def test_damage_costs_more_without_the_harness() -> None:
    groups = ("simple", "parallel", "as-json", "required")
    options = ablation.AblationOptions(noisy=0.6, limit=30, groups=groups, layers=("heal", "retry"))
    found = by_name(ablation.harness(options=options)["models"][0])
    whole, bare = found[ablation.WHOLE], found[ablation.BARE]
    assert whole["right"]["value"] > bare["right"]["value"] + 0.2
    assert bare["against"]["right"]["verdict"] == "worse" and bare["against"]["right"]["high"] < 0
    assert whole["unsafe"]["value"] == 0 < bare["unsafe"]["value"]
    assert whole["tries"]["value"] > found["without retry"]["tries"]["value"]
    assert whole["right"]["value"] > found["without heal"]["right"]["value"]
    assert whole["right"]["n"] == 120


def test_the_damage_does_not_depend_on_the_layers() -> None:
    model = NoisyModel(1.0, 3)
    question = questions.read(["simple"], 1)[0]
    first = [
        asyncio.run(play(question, model, "v", layers, max_tokens=64))["faults"][:1]
        for layers in (None, HarnessOptions(), HarnessOptions.without(["guard", "heal"]))
    ]
    assert first[0] and first[0] == first[1] == first[2]


@pytest.mark.parametrize("fault", [*noisy.OF_CALLS, "wrong"])
def test_every_damage_of_calls_is_one(fault: str) -> None:
    question = questions.read(["simple"], 1)[0]
    calls = [noisy._call(c.name, dict(c.arguments)) for c in question.right_calls()]
    good, _ = noisy.damaged_calls(calls, None, random.Random(0))
    for seed in range(6):
        message, _ = noisy.damaged_calls(calls, fault, random.Random(seed))
        assert message["content"] != good["content"] or _told(message) != _told(good)


def _told(message: dict[str, Any]) -> list[Any]:
    return [call["function"] for call in message.get("tool_calls", [])]


def test_every_schema_is_one() -> None:
    for question in questions.read(list(GROUPS), None):
        for tool in question.tools:
            Schema.read(tool["function"]["parameters"], question.id)


def test_right_calls_of_every_conversation_are_literals() -> None:
    entries = simulated.entries()
    assert len(entries) == 200
    for entry in entries:
        for turn in range(len(entry["question"])):
            simulated.written(entry, turn)
    with pytest.raises(BadText):
        simulated._call("__import__('os').system('true')", {"system": []}, "here")


def test_a_turn_is_checked_by_state_and_results() -> None:
    entry = simulated.entries()[0]
    checked = simulated.Checked(entry)
    for name, arguments in simulated.written(entry, 0):
        checked.call(name, arguments)
    assert checked.turn_is_right(0, 3)
    checked.call("mkdir", {"dir_name": "elsewhere"})
    assert not checked.turn_is_right(1, 1)
    assert "no function" in checked.call("_load_scenario", {"scenario": {}})
    assert "no function" in checked.call("cp", {"source": "a", "destination": "b"})  # left out for this conversation
    assert checked.call("cd", {"nonsense": 1}).startswith("Error during execution")


def test_it_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ablation.AblationOptions(noisy=0.5, limit=4, groups=("simple", "irrelevance"), layers=("heal",))
    whole = ablation.harness(options=options)
    played: list[str] = []

    async def counted(*args: Any, **more: Any) -> Any:
        if len(played) == 9:
            raise KeyboardInterrupt
        played.append(args[0].id)
        return await play(*args, **more)

    monkeypatch.setattr(ablation, "play", counted)
    with pytest.raises(KeyboardInterrupt):
        ablation.harness(options=options, json=tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
    monkeypatch.setattr(ablation, "play", play)
    again = ablation.harness(options=options, json=tmp_path / "x.json")
    assert again["models"] == whole["models"] == json.loads((tmp_path / "x.json").read_text())["models"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


@pytest.mark.parametrize("columns", ["80", "160"])
def test_the_command(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = [
        "measure",
        "--quiet",
        "--harness",
        "--noisy",
        "0.5",
        "--limit",
        "3",
        "--groups",
        "simple",
        "--without",
        "heal",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "whole harness" in said and "without heal" in said and "no harness" in said


@pytest.mark.parametrize(
    "words", [["--noisy"], ["--harness"], ["--harness", "--noisy", "2"], ["--harness", "--noisy", "--groups", "hard"],
              ["--harness", "--noisy", "--without", "luck"], ["--harness", "--noisy", "--text", "x"]]
)  # fmt: skip
def test_bad_options_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_layers_that_there_are_not() -> None:
    with pytest.raises(BadOption):
        ablation.AblationOptions(layers=("luck",), noisy=0.5)
