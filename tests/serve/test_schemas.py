"""Sixty random schemas through the real server: each answer follows its schema, or is an honest error."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from lowbit.harness import HarnessOptions
from lowbit.model_server import ModelOptions
from lowbit.serve import ServeOptions, running_model

_FILE = Path(__file__).parents[2] / "benchmarks" / "schemas.py"


def test_sixty_schemas() -> None:
    spec = importlib.util.spec_from_file_location("schemas", _FILE)
    assert spec is not None and spec.loader is not None
    schemas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schemas)

    async def ask() -> list[dict[str, Any]]:
        options = ServeOptions(port=0, harness=HarnessOptions(tries=1))
        model = ModelOptions(context=8192, slots=8, kv_unified=True)
        async with running_model("smollm2-135m", options, model) as url, aiohttp.ClientSession() as session:
            gate = asyncio.Semaphore(8)

            async def one(number: int) -> dict[str, Any]:
                async with gate:
                    found: dict[str, Any] = await schemas.outcome(session, url, number, 40)
                    return found

            return await asyncio.gather(*(one(number) for number in range(60)))

    counts = Counter(entry["outcome"] for entry in asyncio.run(ask()))
    assert counts["invalid"] == 0 and counts["valid"] + counts["error"] == 60
    assert counts["valid"] >= 10, counts  # and not by answering nothing
