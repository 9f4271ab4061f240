"""Random JSON Schemas through lowbit serve: every answer follows its schema, or is an honest error.

``python benchmarks/schemas.py --model smollm2-135m --out schemas-smollm2.jsonl [--schemas 2000] [--minutes 60]``

A line of the output is one schema and what came of it; the same command goes on where it was stopped. Prints how many
answers were valid, how many ended in an honest error and of which kind, and how many were neither, which must be none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from jsonschema import Draft202012Validator

from lowbit.harness import HarnessOptions
from lowbit.model_server import ModelOptions
from lowbit.serve import ServeOptions, running_model

WORDS = (
    "name",
    "age",
    "city",
    "tags",
    "größe",
    "価格",
    "is_open",
    "a b",
    "x-y",
    "note",
    "items",
    "id",
    "émoji🙂",
    "total",
)
FORMATS = ("date", "date-time", "email", "uuid", "ipv4", "uri")
PATTERNS = ("^[a-z]{2,5}$", "^[A-Z]\\d{3}$", "^(yes|no)$", "^\\d{4}-\\d{2}$", "^[^x]+$", "ab+c")


_PATIENT = aiohttp.ClientTimeout(total=None)  # the harness has its own limit, and a busy machine is no fault


class Schemas:
    """Schema number ``i`` is the same on every run."""

    def __init__(self, number: int) -> None:
        self.r = random.Random(number)
        self.defs: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        schema = self._object(0)
        if self.defs:
            schema["$defs"] = self.defs
        Draft202012Validator.check_schema(schema)
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        kinds = [self._string, self._integer, self._number, self._enum, self._flag, self._const]
        if depth < 3:
            kinds += [self._object, self._array, self._choice, self._reference]
        return self.r.choice(kinds)(depth)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.r.sample(WORDS, self.r.randint(1, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth + 1) for name in names}}
        schema["required"] = self.r.sample(names, self.r.randint(0 if depth else 1, len(names)))
        if self.r.random() < 0.6:
            schema["additionalProperties"] = False
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        low = self.r.randint(0, 2)
        schema: dict[str, Any] = {"type": "array", "items": self._any(depth + 1), "minItems": low}
        schema["maxItems"] = low + self.r.randint(0, 3)
        # A set of few values may have no room for so many different ones.
        if self.r.random() < 0.2 and schema["items"].get("type") in ("string", "integer") and low < 2:
            schema["uniqueItems"] = True
        return schema

    def _choice(self, depth: int) -> dict[str, Any]:
        return {self.r.choice(("anyOf", "oneOf")): [self._object(depth + 1), self._string(depth + 1)]}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self.defs)}"
        self.defs[name] = {}
        self.defs[name] = self._any(3)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        draw = self.r.random()
        if draw < 0.25:
            schema["minLength"] = self.r.randint(0, 5)
            schema["maxLength"] = schema["minLength"] + self.r.randint(0, 12)
        elif draw < 0.4:
            schema["pattern"] = self.r.choice(PATTERNS)
        elif draw < 0.5:
            schema["format"] = self.r.choice(FORMATS)
        return schema

    def _integer(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer"}
        if self.r.random() < 0.5:
            schema["minimum"] = self.r.randint(-50, 50)
            schema["maximum"] = schema["minimum"] + self.r.randint(0, 100)
        if self.r.random() < 0.1:
            schema = {"type": "integer", "multipleOf": self.r.choice((2, 5, 10))}
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        return {"type": "number"} | ({"exclusiveMinimum": 0} if self.r.random() < 0.3 else {})

    def _enum(self, depth: int) -> dict[str, Any]:
        return {"enum": self.r.sample(["red", "green", "no", 1, 2.5, None, True, 'x"y'], self.r.randint(1, 4))}

    def _flag(self, depth: int) -> dict[str, Any]:
        return {"type": self.r.choice(("boolean", ["boolean", "null"]))}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self.r.choice(("fixed", 7, None, ["a", 1]))}


async def outcome(session: aiohttp.ClientSession, url: str, number: int, max_tokens: int = 160) -> dict[str, Any]:
    """What came of one schema: "valid", "error" with its code, or "invalid", which must not be."""
    schema = Schemas(number).make()
    body = {
        "messages": [{"role": "user", "content": "Invent an example record."}], "max_tokens": max_tokens,
        "temperature": 0.8, "seed": number,
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}},
    }  # fmt: skip
    begun = time.monotonic()
    async with session.post(f"{url}/chat/completions", json=body) as response:
        found = await response.json()
    result: dict[str, Any] = {
        "number": number,
        "seconds": round(time.monotonic() - begun, 2),
        "status": response.status,
    }
    result["events"] = [event["what"] for event in found.get("lowbit", {}).get("events", [])]
    if response.status != 200:
        return result | {"outcome": "error", "code": found["error"]["code"], "message": found["error"]["message"][:200]}
    content = found["choices"][0]["message"]["content"]
    try:
        wrong = next(Draft202012Validator(schema).iter_errors(json.loads(content)), None)
    except ValueError as error:
        return result | {"outcome": "invalid", "message": f"no JSON: {error}", "content": content}
    if wrong is not None:
        return result | {"outcome": "invalid", "message": wrong.message[:200], "content": content, "schema": schema}
    return result | {"outcome": "valid"}


async def run(model: str, out: Path, first: int, schemas: int, minutes: float, slots: int) -> list[dict[str, Any]]:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    left = [n for n in range(first, schemas) if n not in {entry["number"] for entry in done}]
    deadline = time.monotonic() + 60 * minutes
    if not left:
        return done
    model_options = ModelOptions(context=1024 * slots, slots=slots, kv_unified=True, cache_ram=0)
    options = ServeOptions(port=0, harness=HarnessOptions(tries=3, seconds=600))
    async with running_model(model, options, model_options) as url, aiohttp.ClientSession(timeout=_PATIENT) as session:
        with out.open("a", encoding="utf-8") as file:

            async def work() -> None:
                while left and time.monotonic() < deadline:
                    entry = await outcome(session, url, left.pop(0))
                    done.append(entry)
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    file.flush()
                    if len(done) % 50 == 0:
                        print(f"{len(done)} of {schemas}", file=sys.stderr, flush=True)

            await asyncio.gather(*(work() for _ in range(slots)))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schemas", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin there: two runs can share the work")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--slots", type=int, default=8)
    given = parser.parse_args()
    found = asyncio.run(run(given.model, given.out, given.first, given.schemas, given.minutes, given.slots))
    counts = Counter(entry["outcome"] for entry in found)
    print(
        f"{given.model}: {len(found)} schemas; " + ", ".join(f"{counts[k]} {k}" for k in ("valid", "error", "invalid"))
    )
    print("errors: ", dict(Counter(e["code"] for e in found if e["outcome"] == "error")))
    print("events: ", dict(Counter(what for entry in found for what in entry["events"])))
    sys.exit(bool(counts["invalid"]))


if __name__ == "__main__":
    main()
