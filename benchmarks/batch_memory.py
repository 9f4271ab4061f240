"""How much memory a batch's runner takes: the peak resident set of its process, with many items queued.

    python benchmarks/batch_memory.py --items 100000                          # to the end, against a fast server
    python benchmarks/batch_memory.py --items 100000 --model smollm2-135m --minutes 1

The runner takes all of IN into its journal, works on it (for so many minutes, or to the end), and writes OUT. With
--model it starts llama.cpp's server, a process of its own, whose memory `lowbit plan` tells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "batch"))

from batch_server import BatchServer
from jobs import command, read, write

from lowbit.units import MIB, format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--model")
    parser.add_argument("--slots", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, BatchServer() as server:
        source, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write(source, (f"word {i}: is this good or bad? " + "and so on " * 50 for i in range(given.items)))
        where = ["--model", given.model, "--ctx", "4096"] if given.model else ["--endpoint", server.url]
        words = command("run", source, "-o", out, "--slots", given.slots, "--quiet", *where)
        words += ["--minutes", str(given.minutes)] if given.minutes else []
        begun = time.monotonic()
        process = subprocess.Popen(words)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the runner ended with {status}")
        taken = time.monotonic() - begun
        found = json.loads(subprocess.run(command("status", source, "--json", "-"), capture_output=True).stdout)
        whole = f", OUT of {len(read(out)):,} lines" if out.exists() else ""
        print(
            f"{found['total']:,} items ({format_bytes(source.stat().st_size)}), {found['completed']:,} done in "
            f"{taken:.0f} s{whole}: peak {usage.ru_maxrss * 1024 / MIB:.0f} MiB"
        )


if __name__ == "__main__":
    main()
