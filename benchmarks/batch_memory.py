"""How much memory a batch's runner takes: the peak resident set of its process, with many items queued.

    python benchmarks/batch_memory.py --items 100000                          # to the end, against a fast server
    python benchmarks/batch_memory.py --items 100000 --model smollm2-135m --minutes 1

The runner takes all of IN into its journal, works on it (for so many minutes, or to the end), and writes OUT. With
--model it starts llama.cpp's server, a process of its own, whose memory `lowbit plan` tells.
"""

from __future__ import annotations

import argparse
import json
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
        process, peak = subprocess.Popen(words), 0
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.05)
        if process.returncode:
            sys.exit(f"the runner ended with {process.returncode}")
        taken = time.monotonic() - begun
        found = json.loads(subprocess.run(command("status", source, "--json", "-"), capture_output=True).stdout)
        whole = f", OUT of {len(read(out)):,} lines" if out.exists() else ""
        print(
            f"{found['total']:,} items ({format_bytes(source.stat().st_size)}), {found['completed']:,} done in "
            f"{taken:.0f} s{whole}: peak {peak / MIB:.0f} MiB"
        )


def resident_peak(pid: int) -> int:
    """Bytes, of this process alone: what wait4() tells counts the model's server, its child, too."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
