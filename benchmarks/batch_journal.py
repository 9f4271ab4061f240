"""What the journal costs: the share of a real run's wall time spent in it, and a run with it beside one without.

    python benchmarks/batch_journal.py --model smollm2-135m --items 100 --pairs 5

One llama.cpp server, one harness. With: the runner and its journal. Without: the same engine asked by as many tasks as
it has slots, and nothing kept. The two take turns, on items of their own (the same ones would be in the cache).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests" / "batch"))

from jobs import write

from lowbit import console
from lowbit.batch.engines import Engine, EngineOptions, open_engine
from lowbit.batch.items import BatchLines, Item, read_place
from lowbit.batch.job import Job
from lowbit.batch.options import BatchOptions
from lowbit.batch.runner import Runner
from lowbit.model_server import ModelOptions


class Open(Engine):
    """An engine that is entered already, and stays so."""

    name = "open"

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self._inner.slots

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return False

    async def deciding(self) -> dict[str, Any]:
        return await self._inner.deciding()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def ask(self, item: Item) -> dict[str, Any]:
        return await self._inner.ask(item)

    async def ready(self) -> bool:
        return await self._inner.ready()


async def journalled(engine: Engine, source: Path) -> tuple[float, float]:
    """(seconds, seconds in the journal), from the items being in the journal to the last result."""
    with Job(source, source.with_suffix(".job")) as job:
        job.begin({})
        runner, begun, before = Runner(job, Open(engine), BatchOptions()), time.perf_counter(), job.journal.seconds
        await runner.run()
        return time.perf_counter() - begun, job.journal.seconds - before


async def bare(engine: Engine, source: Path) -> float:
    reader = BatchLines(source)
    places = iter(list(reader.places()))

    async def work() -> None:
        for place in places:
            await engine.ask(reader.item(read_place(source, place.offset, place.length), place.custom_id or ""))

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(engine.slots)))
    return time.perf_counter() - begun


async def measure(given: argparse.Namespace, folder: Path) -> None:
    console.set_quiet(True)
    options = EngineOptions(model=given.model, slots=given.slots, server=ModelOptions(context=4096, threads=1))
    engine = open_engine(options)
    shares, ratios = [], []
    async with engine:
        for pair in range(-1, given.pairs):
            seconds: dict[str, float] = {}
            for leg in ("with", "without") if pair % 2 else ("without", "with"):
                said = [f"Is {17 * i + pair} {leg} a number? Answer yes or no." for i in range(given.items)]
                source = write(folder / f"{pair}-{leg}.jsonl", said, temperature=0)
                if leg == "with":
                    seconds[leg], spent = await journalled(engine, source)
                else:
                    seconds[leg] = await bare(engine, source)
            if pair < 0:
                continue  # a warm-up
            shares.append(spent / seconds["with"])
            ratios.append(seconds["with"] / seconds["without"])
            told = f"{spent:.3f} s of it in the journal; without {seconds['without']:.2f} s"
            print(f"  with {seconds['with']:.2f} s, {told}", file=sys.stderr)
    rng = np.random.default_rng(0)
    n = f"{given.pairs} pairs of {given.items} items, {given.slots} slots, {given.model}"
    for what, values in (("share of the wall time in the journal", shares), ("with / without", ratios)):
        drawn = np.array(values)[rng.integers(0, len(values), (2000, len(values)))].mean(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        print(f"{what}: {np.mean(values):.4f} [{low:.4f}, {high:.4f}], {n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--slots", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(given, Path(folder)))


if __name__ == "__main__":
    main()
