"""A question to checked JSON, by way of a search: ``python examples/search_to_json.py "The tallest lighthouse?"``.

The search is recorded (data/searches.json), so that it runs without a network; ``Search`` is the place for a live one.
The answer is a Pydantic model whose own rule is that every source is one of the pages that were found: an invented
address is sent back to the model with what is wrong about it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, field_validator

from lowbit.harness import Harness, HarnessError, HttpUpstream
from lowbit.harness.asking import Asked, ask_async
from lowbit.serve import ServeOptions, running_model

RECORDED = Path(__file__).parent / "data" / "searches.json"


@dataclass(frozen=True)
class Page:
    """One result of a search."""

    url: str
    title: str
    text: str


Search = Callable[[str], list[Page]]  # a live one asks a search service here


def recorded_search(question: str) -> list[Page]:
    """The recorded pages of the search that shares most words with the question."""
    searches = json.loads(RECORDED.read_text(encoding="utf-8"))["searches"]
    words = set(re.findall(r"\w+", question.lower()))
    best = max(searches, key=lambda name: len(words & set(name.split())))
    return [Page(**entry) for entry in searches[best]] if words & set(best.split()) else []


def answer_type(pages: list[Page]) -> type[BaseModel]:
    """What an answer must be, given what was found."""
    known = {page.url for page in pages}

    class Answer(BaseModel):
        answer: str = Field(min_length=1, max_length=300)
        confident: bool
        sources: list[str] = Field(min_length=1, max_length=3)

        @field_validator("sources")
        @classmethod
        def found(cls, sources: list[str]) -> list[str]:
            for url in sources:
                if url not in known:
                    raise ValueError(f"{url} is none of the pages; the pages are {', '.join(sorted(known))}")
            return sources

    return Answer


async def answer(harness: Harness, question: str, search: Search = recorded_search) -> Asked[BaseModel]:
    """Raises LookupError where nothing is found, HarnessError where no answer is valid."""
    pages = search(question)
    if not pages:
        raise LookupError("nothing was found")
    listed = "\n\n".join(f"{page.url}\n{page.title}\n{page.text}" for page in pages)
    messages = [
        {"role": "system", "content": "Answer from the pages alone, briefly. Name the address of each page you used."},
        {"role": "user", "content": f"Pages:\n\n{listed}\n\nQuestion: {question}"},
    ]
    return await ask_async(harness, messages, output=answer_type(pages), max_tokens=200, temperature=0)


async def main(question: str, model: str, url: str | None) -> int:
    async def go(at: str) -> int:
        async with HttpUpstream(at) as upstream:
            try:
                found = await answer(Harness(upstream), question)
            except (LookupError, HarnessError) as error:
                print(f"no answer: {error}", file=sys.stderr)
                return 1
        print(found.value.model_dump_json(indent=2))
        for event in found.trace["events"]:
            print(f"{event['layer']}: {event['what']} {event['detail']}", file=sys.stderr)
        return 0

    if url is not None:
        return await go(url)
    async with running_model(model, ServeOptions(port=0)) as at:
        return await go(at)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--model", default="smollm2-135m", help="served for this; default: %(default)s")
    parser.add_argument("--url", help="instead: a server that runs, up to /v1")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.question, given.model, given.url)))
