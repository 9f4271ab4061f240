"""Kills a batch's runner, its model's server and its disk at random points; every OUT must be as if nothing happened.

    python benchmarks/batch_faults.py --points 200 --work DIR

Each trial is a job of 60 items with up to three faults, against a server whose answers depend on the request alone.
Half of them kill the runner with kill -9; the others kill the server, fill the disk (a tmpfs of 3 MB, which wants the
right to mount), or kill one of two runners. Interrupted, it goes on from the trials that are in DIR/done.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "batch"))

from kills import KINDS, Trial, run, small_disk

_OF_EACH = {"runner": 5, "server": 2, "disk": 2, "two": 1}  # in ten trials
_FAULTS = {"runner": 3, "server": 2, "disk": 2, "two": 1}  # of a trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    record = given.work / "done.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    order = [kind for kind, count in _OF_EACH.items() for _ in range(count)]
    while sum(entry["faults"] for entry in done) < given.points:
        seed = len(done)
        done.append(trial(given.work, seed, order[seed % len(order)]))
        with open(record, "a") as handle:
            handle.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    for kind in KINDS:
        of_kind = [entry for entry in done if entry["kind"] == kind]
        points, twice = sum(e["faults"] for e in of_kind), sum(e["twice"] for e in of_kind)
        print(
            f"{kind:7} {points:4} points in {len(of_kind)} jobs; {twice} requests were under way and were asked again"
        )
    points, failed = sum(e["faults"] for e in done), [e for e in done if e["failed"]]
    print(f"{points} points: {len(done) - len(failed)} of {len(done)} jobs identical to an undisturbed run")
    for entry in failed:
        print(f"  seed {entry['seed']} ({entry['kind']}): {entry['failed']}")
    sys.exit(1 if failed else 0)


def trial(work: Path, seed: int, kind: str) -> dict[str, object]:
    folder, begun, failed = work / f"trial-{seed}", time.monotonic(), ""
    with small_disk(folder) as disk:
        if disk is None and kind == "disk":
            sys.exit("filling a disk wants the right to mount one")
        with Trial(folder, seed) as running:
            try:
                run(running, kind, faults=_FAULTS[kind])
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:300]
            answered = running.answered()
            twice = len(answered) - len(set(answered))
            found = {"seed": seed, "kind": kind, "faults": running.faults, "twice": twice, "failed": failed}
    if not failed:
        running.log.unlink()
        shutil.rmtree(folder, ignore_errors=True)
    return found | {"seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    main()
