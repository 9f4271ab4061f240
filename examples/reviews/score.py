"""How often a batch's labels are those that people gave: ``python score.py OUT.jsonl``, with 95% intervals."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path

from lowbit.measure.statistics import wilson

LABELLED = Path(__file__).parent / "reviews.csv"
FIELDS = ("sentiment", "topic")


def score(out: Path) -> dict[str, dict[str, float | int]]:
    """field -> right, n, low, high; an item without an answer counts as wrong."""
    with open(LABELLED, newline="", encoding="utf-8") as rows:
        truth = {row["id"]: row for row in csv.DictReader(rows)}
    right: Counter[str] = Counter()
    with open(out, encoding="utf-8") as lines:
        for result in map(json.loads, lines):
            if result["error"] is None:
                said = json.loads(result["response"]["body"]["choices"][0]["message"]["content"])
                right.update(field for field in FIELDS if said[field] == truth[result["custom_id"]][field])
    found = {}
    for field in FIELDS:
        low, high = wilson(right[field], len(truth))
        found[field] = {"right": right[field], "n": len(truth), "low": low, "high": high}
    return found


if __name__ == "__main__":
    for field, found in score(Path(sys.argv[1])).items():
        print(f"{field}: {found['right']} of {found['n']} right, {found['low']:.0%} to {found['high']:.0%} (95%)")
