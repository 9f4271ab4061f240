"""pydantic-ai and the llm command, unchanged, against a real model behind lowbit serve."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import served as scripted_served
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from scripted import Scripted, call
from served_model import Served


class Weather(BaseModel):
    city: str
    sunny: bool


def agent(url: str, kind: type = OpenAIChatModel, **options: object) -> Agent:
    return Agent(kind("m", provider=OpenAIProvider(base_url=url, api_key="-")), **options)  # type: ignore[call-overload]


def test_an_agent_talks(served: Served) -> None:
    found = agent(served.url).run_sync("Say hello.", model_settings={"max_tokens": 12, "temperature": 0})
    assert found.output and found.usage.output_tokens <= 12


def test_an_agent_gets_a_value(served: Served) -> None:
    """Its output type is a tool that must be called: what SmolLM2 alone does not do."""
    found = agent(served.url, output_type=Weather).run_sync(
        "It is sunny in Rome.", model_settings={"max_tokens": 80, "temperature": 0}
    )
    assert isinstance(found.output, Weather)


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_an_agent_uses_a_tool(kind: type) -> None:
    """A right model, scripted, so that the whole way of a call and its result is seen."""
    replies = [
        {"content": None, "tool_calls": [call("weather", "{'City': 'Rome'}")]},
        {"content": None, "tool_calls": [call("final_result", '{"city": "Rome", "sunny": "true"}')]},
    ]
    upstream, seen = Scripted(*replies), []

    async def go() -> Weather:
        async with scripted_served(upstream) as endpoint:
            own = agent(endpoint.url, kind, output_type=Weather)

            @own.tool_plain
            def weather(city: str) -> str:
                """The weather in a city."""
                seen.append(city)
                return "sunny"

            return (await own.run("Rome?")).output  # type: ignore[return-value]

    assert asyncio.run(go()) == Weather(city="Rome", sunny=True) and seen == ["Rome"]
    assert upstream.sent[1]["messages"][-1]["content"] == "sunny"


def test_the_llm_command(served: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: m\n  api_base: {served.url}\n", encoding="utf-8"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "-"}
    for words in (["-o", "max_tokens", "8"], ["--no-stream", "-o", "max_tokens", "8"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "local", "Say hello.", *words],
            capture_output=True, text=True, env=environment, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
