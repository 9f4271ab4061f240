"""Damaged JSON: how often it is mended to what it was, refused, or taken for something else; beside json-repair alone.

``python benchmarks/repair.py [--documents 400] [--seed 1]``

Random documents, each damaged in the ways of tests/harness/damage.py. What is valid JSON in spite of its damage is left
out. Ends with 1 where anything was mended to something else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import json_repair

from lowbit.harness import repair

sys.path.append(str(Path(__file__).parent.parent / "tests" / "harness"))
from damage import DAMAGE, closed_schema, is_json, same

WORDS = ("Ann", "it's", "a, b", "x: y", "größe", 'said "no"', "line\nend", "[1]", "", "C:\\d")
KEYS = ("name", "age", "tags", "a b", "größe", "x")


def value(r: random.Random, depth: int = -1) -> Any:
    """A list or object, of four levels at most."""
    draw = r.random() if depth >= 0 else r.uniform(0.5, 1.0)
    if depth > 2 or draw < 0.5:
        return r.choice([r.choice(WORDS), r.randint(-9, 999), r.random(), True, None])
    if draw < 0.75:
        return [value(r, depth + 1) for _ in range(r.randint(depth < 0, 4))]
    return {key: value(r, depth + 1) for key in r.sample(KEYS, r.randint(depth < 0, 4))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    r, total = random.Random(given.seed), Counter[str]()
    documents = [value(r) for _ in range(given.documents)]
    print(f"{'damage':33} {'n':>5} {'mended':>7} {'refused':>8} {'wrong':>6}   json-repair alone: wrong")
    for kind, damage in DAMAGE.items():
        counts = Counter[str]()
        for document in documents:
            text = damage(json.dumps(document, ensure_ascii=False, indent=r.choice((None, 2))), r)
            if is_json(text):
                continue
            counts["n"] += 1
            found, how = repair.mended(text, closed_schema(document))
            counts["refused" if how is None else "mended" if same(found, document) else "wrong"] += 1
            counts["alone"] += not same(json_repair.loads(text, skip_json_loads=True), document)
        total += counts
        print(_line(kind, counts))
    print(_line("all", total))
    sys.exit(bool(total["wrong"]))


def _line(kind: str, counts: Counter[str]) -> str:
    c = counts
    return f"{kind:33} {c['n']:5} {c['mended']:7} {c['refused']:8} {c['wrong']:6}   {c['alone']:6}"


if __name__ == "__main__":
    main()
