"""Coverage-guided fuzzing of every reader with atheris: ``make fuzz``, or

    python tests/fuzz/run.py [--cases N] [--reader NAME ...] [--corpus DIR]

Each reader runs in processes of its own for its share of the cases (default: a million over all), on top of the corpus
that earlier runs left. A case that breaks the contract (see ``fuzzing/readers.py``) ends its process and is printed as
hex; everything else goes on. The exit code is 1 where there was one. ``--case HEX`` with one ``--reader`` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROUND = 20_000  # cases a process: tracemalloc and the instrumentation keep some kilobytes of each
MEMORY_EVERY = 32  # cases: counting allocations is slow
LONGEST = 96  # bytes of a case
SEEDS = 256
ROOM = 1 << 30  # bytes of address space that a reader may take beyond what the start took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="N", type=int, default=1_000_000)
    parser.add_argument("--reader", metavar="NAME", action="append", help="only this one; may be given again")
    parser.add_argument("--corpus", metavar="DIR", type=Path, default=Path(".fuzz"))
    parser.add_argument("--case", metavar="HEX", help="repeat one case of one --reader")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        fuzz(args.reader[0], args.cases, args.corpus)
    from fuzzing.readers import READERS, SHARES, Place, run_case

    readers = args.reader or list(READERS)
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(readers[0], bytes.fromhex(args.case), Place(Path(folder)), memory=True))
        return 0
    total = sum(SHARES[reader] for reader in readers)
    broken = 0
    for reader in readers:
        left = -(-args.cases * SHARES[reader] // total)
        while left > 0:
            words = ["--child", "--reader", reader, "--cases", str(min(left, ROUND)), "--corpus", str(args.corpus)]
            broken += subprocess.run([sys.executable, __file__, *words], check=False).returncode != 0
            left -= ROUND
    return 1 if broken else 0


def fuzz(reader: str, cases: int, corpus: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with (
        contextlib.redirect_stderr(io.StringIO()),  # a line for each module
        atheris.instrument_imports(include=["lowbit"], enable_loader_override=False),
    ):
        from fuzzing.readers import Place, run_case

        from lowbit import grid
        from lowbit.checkpoint import families

        _ = families.names(), grid.names()  # loaded by name, and only now instrumented

    from lowbit import console

    console.set_quiet(True)
    kept = corpus / reader
    _seed(kept)
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    place = Place(Path(folder.name))
    _limit_memory()
    ends: Counter[str] = Counter()
    begin = time.monotonic()

    def report() -> None:
        counts = ", ".join(f"{n:,} {end}" for end, n in ends.most_common())
        print(f"{reader}: {ends.total():,} cases in {time.monotonic() - begin:.0f} s: {counts}", flush=True)

    def case(data: bytes) -> None:
        try:
            ends[run_case(reader, data, place, memory=ends.total() % MEMORY_EVERY == 0)] += 1
        except BaseException:
            report()
            print(f"{reader}: --reader {reader} --case {data.hex()}", flush=True)
            raise
        if ends.total() == cases:
            report()

    options = [
        f"-runs={cases}",
        f"-max_len={LONGEST}",
        "-len_control=0",
        "-timeout=30",
        "-rss_limit_mb=4096",
        "-verbosity=0",
    ]
    # libFuzzer runs one case of its own (the empty one) before it counts.
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=0", f"-artifact_prefix={kept}-", str(kept)], case)
    atheris.Fuzz()


def _seed(kept: Path) -> None:
    """Random bytes to begin with: on an empty corpus libFuzzer tries short inputs for long, whose every decision but
    the first few is the same."""
    kept.mkdir(parents=True, exist_ok=True)
    if not any(kept.iterdir()):
        rng = random.Random(0)
        for i in range(SEEDS):
            (kept / f"seed-{i}").write_bytes(rng.randbytes(LONGEST))


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
