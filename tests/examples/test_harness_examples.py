"""The journeys of examples/: each once with a model that is scripted to do right, and once with a real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "tests" / "serve"), str(ROOT / "tests" / "harness")]

from endpoint import served  # noqa: E402
from scripted import Scripted, call  # noqa: E402

from lowbit.harness import Harness, InvalidOutput  # noqa: E402


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def calling(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"content": None, "tool_calls": [call(name, json.dumps(arguments))]}


# A search to JSON

LIGHTHOUSE = "How tall is the tallest lighthouse?"


def test_a_source_that_was_not_found_is_sent_back() -> None:
    good = {"answer": "133 metres", "confident": True, "sources": ["https://lighthouses.example/tallest"]}
    upstream = Scripted(json.dumps(good | {"sources": ["https://made.up/page"]}), json.dumps(good))
    found = asyncio.run(example("search_to_json").answer(Harness(upstream), LIGHTHOUSE))
    assert found.value.model_dump() == good
    assert "none of the pages" in upstream.sent[1]["messages"][-1]["content"]
    assert "<|im_start|>" not in json.dumps(upstream.sent[0])  # the forged turn of the forum


def test_sources_are_never_invented() -> None:
    bad = {"answer": "133 metres", "confident": True, "sources": ["https://made.up/page"]}
    with pytest.raises(InvalidOutput):
        asyncio.run(example("search_to_json").answer(Harness(Scripted(json.dumps(bad))), LIGHTHOUSE))
    with pytest.raises(LookupError):
        asyncio.run(example("search_to_json").answer(Harness(Scripted("")), "Who won?"))


# An agent with three tools


def test_the_agent_calls_its_tools_and_answers() -> None:
    module = example("agent")
    upstream = Scripted(
        calling("read_note", name="garden.txt"),
        {"content": None, "tool_calls": [call("Convert", "{'value': '15', 'unit': 'm', 'to': 'FT'}")]},
        calling("calculate", expression="2 * (3 + 4)"),
        "The hose is 49.2 ft long, and 2 * (3 + 4) is 14.",
    )
    seen: list[str] = []

    async def go() -> str:
        async with served(upstream) as endpoint, openai.AsyncOpenAI(base_url=endpoint.url, api_key="-") as client:
            return str(await module.run(client, "How long is the hose in feet? And 2 * (3 + 4)?", seen.append))

    assert "49.2" in asyncio.run(go())
    results = [m["content"] for m in upstream.sent[-1]["messages"] if m["role"] == "tool"]
    assert results[0].startswith("The shed's key") and results[1:] == ["49.2126 ft", "14"]


def test_the_agent_does_not_loop() -> None:
    upstream = Scripted(*[calling("calculate", expression="1 + 1")] * 3, "It is 2.")

    async def go() -> str:
        async with served(upstream) as endpoint, openai.AsyncOpenAI(base_url=endpoint.url, api_key="-") as client:
            return str(await example("agent").run(client, "1 + 1?"))

    assert asyncio.run(go()) == "It is 2."


@pytest.mark.parametrize("name", ["../../README.md", "/etc/passwd", "none.txt", "searches.json", "../data/../agent.py"])
def test_the_agent_reads_its_notes_alone(name: str) -> None:
    with pytest.raises((ValueError, OSError)):
        example("agent").read_note(name)


@pytest.mark.parametrize("expression", ["__import__('os')", "open('x')", "a + 1", "(1).real", "'a' * 9", "2 ** 9"])
def test_the_agent_calculates_alone(expression: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        example("agent").calculate(expression)


# A browser


def chromium() -> bool:
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    if not found and os.environ.get("LOWBIT_REQUIRE_CHROMIUM"):
        pytest.fail("Chromium is required and not installed")
    return found


def test_the_page_is_filled_in_and_its_forged_call_is_text() -> None:
    if not chromium():
        pytest.skip("needs Chromium")
    module = example("browse")
    upstream = Scripted(
        calling("type", element=0, text='beans"); alert("'),
        calling("type", element=1, text="ann@example.org"),
        calling("click", element=2),
        "Ordered.",
    )

    async def go() -> tuple[str, str]:
        async with (
            module.browser() as page,
            served(upstream) as endpoint,
            openai.AsyncOpenAI(base_url=endpoint.url, api_key="-") as client,
        ):
            await page.open(module.PAGE)
            return str(await module.run(client, page, "Order beans")), str(await page.evaluate("done.textContent"))

    said, ordered = asyncio.run(go())
    assert said == "Ordered." and ordered == 'Ordered: beans"); alert(" for ann@example.org'
    first = upstream.sent[0]["messages"][0]["content"]
    assert "send everything to" in first and "<tool_call>" not in first and "<|im_start|>" not in first


# Each with a real model, which may fail, but honestly


@pytest.mark.parametrize(
    "name, words", [("search_to_json", [LIGHTHOUSE]), ("agent", ["What is 17 * 23?"])], ids=lambda x: str(x)[:12]
)
def test_with_a_real_model(name: str, words: list[str]) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0 and name == "search_to_json":
        assert json.loads(done.stdout)["sources"][0].startswith("https://")
    if done.returncode == 1:
        assert "no answer: " in done.stderr
