"""How many fields a batch read right, and what it made up: ``python score.py OUT.jsonl``, with 95% intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lowbit.measure.statistics import wilson

MAILS = Path(__file__).parent / "mails.jsonl"
FIELDS = ("customer", "article", "quantity")


def score(out: Path) -> dict[str, int]:
    """How many of each field are right, how many values stand nowhere in their mail (``invented``), and ``n``."""
    mails = {row["id"]: row for row in map(json.loads, MAILS.read_text(encoding="utf-8").splitlines())}
    found = dict.fromkeys((*FIELDS, "invented"), 0) | {"n": len(mails)}
    for result in map(json.loads, out.read_text(encoding="utf-8").splitlines()):
        if result["error"] is not None:
            continue
        mail = mails[result["custom_id"]]
        said = json.loads(result["response"]["body"]["choices"][0]["message"]["content"])
        for field in FIELDS:
            found[field] += said[field] == mail["truth"][field]
        # A name or a number that the mail does not have was made up, whatever the schema says of its form.
        found["invented"] += sum(str(said[field]) not in mail["mail"] for field in ("customer", "article"))
    return found


if __name__ == "__main__":
    found = score(Path(sys.argv[1]))
    for field in FIELDS:
        low, high = wilson(found[field], found["n"])
        print(f"{field}: {found[field]} of {found['n']} right, {low:.0%} to {high:.0%} (95%)")
    print(f"{found['invented']} values that stand nowhere in their mail")
