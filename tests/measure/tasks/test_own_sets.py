"""The JSON Schema set and the tool-calling set: what counts as right, shown on answers of every sort."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_tiny

from lowbit.errors import BadOption, BadText, LowbitError
from lowbit.harness import dialects
from lowbit.harness.answer import Call as WrittenCall
from lowbit.measure.tasks import TaskOptions, _call_checker, open_tasks
from lowbit.measure.tasks._call_checker import Call
from lowbit.measure.tasks._engine import InProcess
from lowbit.measure.tasks.json_schema import follows, graded
from lowbit.measure.tasks.tool_calls import calls_in, tool_of
from lowbit.run.llama_cpp import LlamaCpp

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "dict",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "any"}},
        "required": ["city"],
    },
}
WANTED = [{"weather": {"city": ["Paris", "Paris, France"], "days": [3], "unit": ["celsius", ""]}}]


def opened(name: str, **options: Any) -> Any:
    return open_tasks(TaskOptions(tasks=[name], **options))[0]


# JSON


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ('{"name": "Ann", "age": 3}', (1, 1, 1)),
        ('```json\n{"name": "ann ", "age": 3.0}\n```', (1, 1, 1)),
        ('{"name": "Bob", "age": 3}', (1, 1, 0)),
        ('{"name": "Ann", "age": -1}', (1, 0, 0)),
        ('{"name": "Ann", "age": true}', (1, 0, 0)),
        ('{"name": "Ann", "age": 3, "x": 1}', (1, 0, 0)),
        ('Here you are: {"name": "Ann", "age": 3}', (0, 0, 0)),
        ('{"name": "Ann", "age": 3', (0, 0, 0)),
        ('{"name": "Ann", "age": NaN}', (0, 0, 0)),
        ("[" * 100_000, (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_json_answers(answer: str, scores: Any) -> None:
    assert tuple(graded(answer, SCHEMA, {"name": "Ann", "age": 3}).values()) == scores


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ('{"a": [1, 2], "b": {"c": null}}', {"a": [1, 2], "b": {"c": None}}, 1),
        ('{"a": [2, 1]}', {"a": [1, 2]}, 0),
        ('{"a": [1]}', {"a": [1, 2]}, 0),
        ('{"a": 1, "more": 2}', {"a": 1}, 1),
        ('{"a": 1}', {"a": True}, 0),
        ('{"a": false}', {"a": None}, 0),
        ('{"a": "1"}', {"a": 1}, 0),
    ],
)
def test_json_values(answer: str, expected: Any, right: float) -> None:
    assert graded(answer, {}, expected)["values"] == right


def test_a_reference_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert not follows({}, {"$ref": "https://example.com/schema.json"})


def test_every_case_of_the_json_set_can_be_right() -> None:
    """Its schema is one that generation can be kept within, and a right answer scores."""
    task = opened("json-schema")
    assert len(task.items) >= 60 and len({i.group for i in task.items}) >= 8
    assert len({i.question for i in task.items}) == len(task.items)
    llguidance = pytest.importorskip("llguidance")
    for item in task.items:
        schema, expected = item.fields["schema"], item.fields["expected"]
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        assert not llguidance.LLMatcher.validate_grammar(grammar), item.id
        filled = _filled(expected, schema)
        assert graded(json.dumps(filled), schema, expected) == {"json": 1, "schema": 1, "values": 1}, item.id


def _filled(expected: Any, schema: dict[str, Any]) -> Any:
    """The expected values, and "x" for strings that a schema wants and the set leaves open."""
    if isinstance(expected, dict):
        properties = schema.get("properties", {})
        made = {k: _filled(v, properties.get(k, {})) for k, v in expected.items()}
        return {k: "x" for k in schema.get("required", ()) if k not in made} | made
    if isinstance(expected, list):
        return [_filled(v, schema.get("items", {})) for v in expected]
    return expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "x", "schema": {"type": 3}, "expected": {}}, "line 1: no JSON Schema"),
        ({"prompt": "x", "schema": {}}, 'line 1: no "expected"'),
        ({"prompt": "x", "schema": []}, 'line 1: bad "schema"'),
        ({"question": "x", "function": [{"name": "f"}]}, 'line 1: bad "function"'),
        ({"question": [], "function": [WEATHER]}, 'line 1: bad "question"'),
        ({"question": "x", "function": [WEATHER], "ground_truth": [{"g": {}}]}, 'line 1: bad "ground_truth"'),
        ({"question": "x", "function": [WEATHER], "ground_truth": [{"weather": {"city": "P"}}]}, "ground_truth"),
    ],
)
def test_bad_lines(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BadText) as caught:
        opened(str(path))
    assert says in str(caught.value)


def test_generation_is_kept_within_the_schema(smollm2: Path) -> None:
    """What the model would rather say is not within the schema; what it says then is."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 5, "maximum": 7}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    with LlamaCpp(smollm2, context=256, threads=1) as model:
        engine = InProcess(model)
        messages = [{"role": "user", "content": "What is the capital of Italy?"}]
        assert graded(engine.chat(messages, max_tokens=8), schema, {})["json"] == 0
        kept = [engine.chat(messages, max_tokens=40, schema=schema) for _ in range(2)]
        assert kept[0] == kept[1] and graded(kept[0], schema, {})["schema"] == 1, kept
        with pytest.raises(BadOption, match="no grammar"):
            engine.chat(messages, max_tokens=4, schema={"type": "array", "uniqueItems": True})


# Tool calls


@pytest.mark.parametrize(
    ("name", "arguments", "right"),
    [
        ("weather", {"city": "Paris", "days": 3}, True),
        ("weather", {"city": "paris , FRANCE.", "days": 3, "unit": "Celsius"}, True),
        ("weather", {"city": "Rome", "days": 3}, False),
        ("weather", {"city": "Paris", "days": 3.0}, False),
        ("weather", {"city": "Paris", "days": True}, False),
        ("weather", {"city": "Paris"}, False),
        ("weather", {"days": 3}, False),
        ("weather", {"city": "Paris", "days": 3, "hour": 1}, False),
        ("forecast", {"city": "Paris", "days": 3}, False),
    ],
)
def test_a_call_is_right_or_wrong(name: str, arguments: dict[str, Any], right: bool) -> None:
    assert _call_checker.right([Call(name=name, arguments=arguments)], [WEATHER], WANTED) is right


def test_calls_in_any_order_and_no_call() -> None:
    two = [{"weather": {"city": [c], "days": [1]}} for c in ("Rome", "Oslo")]
    calls = [Call(name="weather", arguments={"city": c, "days": 1}) for c in ("Oslo", "Rome")]
    assert _call_checker.right(calls, [WEATHER], two)
    assert not _call_checker.right(calls[:1] * 2, [WEATHER], two)
    assert not _call_checker.right(calls[:1], [WEATHER], two)
    assert _call_checker.right([], [WEATHER], []) and not _call_checker.right(calls, [WEATHER], [])


@pytest.mark.parametrize("syntax", ["hermes"])
def test_calls_are_read_as_models_write_them(syntax: str) -> None:
    arguments = {"city": "Paris", "days": 3}
    text = dialects.get(syntax).call_text([WrittenCall("weather", json.dumps(arguments))] * 2)
    found = calls_in("Well: " + text, ["weather"])
    assert found is not None and [(c.name, c.arguments) for c in found] == [("weather", arguments)] * 2
    assert calls_in("It is sunny in Paris.", ["weather"]) == []
    assert not _call_checker.right(
        calls_in('<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call>', ["weather"]) or [],
        [WEATHER],
        WANTED,
    )


def test_tools_in_openais_form() -> None:
    made = tool_of(WEATHER)["function"]["parameters"]
    assert made["type"] == "object" and made["properties"]["unit"] == {}
    assert made["properties"]["days"] == {"type": "integer"}


def test_own_questions_in_bfcls_form(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "Weather in Paris?", "function": [WEATHER], "ground_truth": WANTED}) + "\n")
    item = opened(str(path)).items[0]
    assert item.fields["wrong"] and item.fields["wrong"][0][1] != {"city": "Paris", "days": 3}
    with LlamaCpp(write_tiny(tmp_path / "t.gguf"), context=2048, threads=1) as model:
        outcome = opened(str(path), max_tokens=8).outcome(item, InProcess(model))
    assert outcome["scores"]["calls"] == 0.0 and outcome["scores"]["argument"] in (0.0, 1.0)


needs_bfcl = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed (make install takes it)"
)


@needs_bfcl
def test_bfcls_questions() -> None:
    task = opened("tool-calls")
    groups = {g: sum(i.group == g for i in task.items) for g in {i.group for i in task.items}}
    assert groups == {
        "simple_python": 400,
        "multiple": 200,
        "parallel": 200,
        "parallel_multiple": 200,
        "irrelevance": 240,
    }
    assert sum(bool(i.fields["wrong"]) for i in task.items) > 800
    assert len(opened("bfcl:multiple", limit=7).items) == 7
    with pytest.raises(LowbitError, match="no such category"):
        opened("bfcl:nonsense")


@needs_bfcl
def test_the_verdicts_are_bfcls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On right answers and on ones spoiled in every way. Of bfcl-eval only its table of hosted models, which wants
    the libraries of them all, is left out."""
    table = types.ModuleType("bfcl_eval.constants.model_config")
    plain = types.SimpleNamespace(underscore_to_dot=False)
    table.MODEL_CONFIG_MAPPING = {"x": plain}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, table.__name__, table)
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    except ImportError as error:
        pytest.skip(f"bfcl-eval's checker does not load here: {error}")
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for item in opened("tool-calls", limit=700).items:
        functions, wanted = item.fields["function"], item.fields["ground_truth"]
        for spoiled in (False, True) if wanted else ():
            calls = _calls(wanted, rng, spoiled)
            theirs = ast_checker(
                copy.deepcopy(functions),
                [{n: a} for n, a in copy.deepcopy(calls)],
                wanted,
                Language.PYTHON,
                item.group,
                "x",
            )
            ours = _call_checker.right([Call(name=n, arguments=a) for n, a in calls], functions, wanted)
            assert theirs["valid"] == ours, (item.id, calls)
            verdicts[ours] += 1
    assert min(verdicts.values()) > 200


def _calls(wanted: list[Any], rng: random.Random, spoiled: bool) -> list[tuple[str, dict[str, Any]]]:
    calls = []
    for want in wanted:
        name, parameters = next(iter(want.items()))
        arguments = {k: _first(rng.choice(v)) for k, v in parameters.items()}
        arguments = {k: v for k, v in arguments.items() if v != ""}
        if spoiled and arguments:
            key = rng.choice(list(arguments))
            arguments[key] = _spoiled(arguments[key], rng)
            if rng.random() < 0.1:
                del arguments[rng.choice(list(arguments))]
            if rng.random() < 0.05:
                arguments["more"] = 1
        calls.append((name, arguments))
    rng.shuffle(calls)
    return calls


def _first(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _first(v[0]) if isinstance(v, list) and v else v for k, v in value.items()}
    return [_first(v) for v in value] if isinstance(value, list) else value


def _spoiled(value: Any, rng: random.Random) -> Any:
    others: list[Any] = [str(value), [value]]
    if isinstance(value, bool):
        others += [not value, int(value)]
    elif isinstance(value, int | float):
        others += [value + 1, float(value), int(value), -value]
    elif isinstance(value, str):
        others += [value.upper(), value.replace(" ", "-"), value + " x", value.lower() + "."]
    elif isinstance(value, list):
        others += [value[::-1], value + value[:1], value[:-1], [], [_spoiled(v, rng) for v in value]]
    elif value:
        key = rng.choice(list(value))
        others += [{**value, key: _spoiled(value[key], rng)}, {k: v for k, v in value.items() if k != key}]
    return rng.choice(others)
