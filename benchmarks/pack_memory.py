"""How much memory packing takes, on a checkpoint larger than that of many machines, and through a kill -9 half-way.

    python benchmarks/pack_memory.py [--gigabytes N] [--threads N] [--cap MIB] [--naive] [--twice] [--folder DIR]

Makes a sharded BF16 checkpoint of Gemma 3 27B's shapes with as many layers as N GB hold (random weights on an absmax/7
lattice), runs `lowbit pack`, certificate included, in a child process, kills it with SIGKILL once half of the tensors
are in the journal, and runs it again. --cap limits the child's private writable memory (RLIMIT_DATA); by default it is
the goal: 1.5 x the largest tensor, in its source bytes, plus 500 MiB. --twice packs once more undisturbed and compares.

Sampled 20 times a second from /proc/PID: anonymous memory, which is the process's own, and resident memory, which has
also the pages of libraries and files that it looks at. The peak of resident memory is the kernel's (VmHWM).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import synthetic
from lowbit.files import sha256
from lowbit.partial import journal_of

GIB, MIB = 1 << 30, 1 << 20
CONFIG = synthetic.CONFIGS["gemma3-27b"]


@dataclass
class Peak:
    """The largest seen, in bytes."""

    anonymous: int = 0
    resident: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", metavar="N", type=float, default=20)
    parser.add_argument("--threads", metavar="N", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cap", metavar="MIB", type=int, help="of the child's private writable memory")
    parser.add_argument("--naive", action="store_true", help="llama-quantize's rounding: quicker")
    parser.add_argument("--twice", action="store_true", help="pack again without a kill, and compare the files")
    parser.add_argument("--folder", metavar="DIR", help="where the files go for the time of the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run(Path(folder), args)
    return 0


def run(folder: Path, args: argparse.Namespace) -> None:
    layer, rest = sizes()
    layers = max(1, int((args.gigabytes * 1e9 - rest) / layer))
    wanted = (layers * layer + rest) * 1.35
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise SystemExit(f"{folder}: {free / 1e9:.0f} GB free, {wanted / 1e9:.0f} wanted")
    model = folder / "model"
    largest = synthetic.make(model, CONFIG | {"num_hidden_layers": layers}, rule="absmax/7")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    shards = len(list(model.glob("*.safetensors")))
    goal = int(1.5 * largest) + 500 * MIB
    cap = args.cap * MIB if args.cap else goal
    print(f"{size / 1e9:.1f} GB in {shards} shards, {layers} layers, largest tensor {largest / MIB:,.0f} MiB")
    print(f"goal {goal / MIB:,.0f} MiB; private writable memory capped at {cap / MIB:,.0f} MiB; {args.threads} threads")
    out = folder / "out.gguf"
    command = [sys.executable, "-m", "lowbit", "pack", str(model), "-o", str(out), "--threads", str(args.threads)]
    command += ["--naive"] * args.naive
    for name, kill in (("killed half-way", True), ("resumed", False)):
        pack(name, command, out, goal, cap, kill_at=layers * 13 // 2 if kill else None)
    if args.twice:
        found = sha256(out)
        out.unlink()
        pack("undisturbed", command, out, goal, cap, kill_at=None)
        print("the resumed file and the undisturbed one:", "equal" if sha256(out) == found else "DIFFERENT")


def sizes() -> tuple[int, int]:
    """Bytes of BF16 of a layer, and of the embedding."""
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    heads = CONFIG["num_attention_heads"] + CONFIG["num_key_value_heads"]
    return 2 * hidden * (3 * inner + 2 * heads * head), 2 * CONFIG["vocab_size"] * hidden


def pack(name: str, command: list[str], out: Path, goal: int, cap: int, *, kill_at: int | None) -> None:
    """Runs the command to its end, or kills it once ``kill_at`` tensors are whole, and prints what it took."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

    journal = journal_of(out.with_name(out.name + ".partial"))
    peak, begin = Peak(), time.perf_counter()
    with open(out.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(command, preexec_fn=limit, stdout=subprocess.DEVNULL, stderr=log)
        while process.poll() is None:
            sample(process.pid, peak)
            if kill_at is not None and journal.exists() and journal.read_bytes().count(b"\n") > kill_at:
                process.send_signal(signal.SIGKILL)
                kill_at = None
            time.sleep(0.05)
        log.seek(0)
        said = log.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{name}: exit code {process.returncode}\n{said[-1000:]}")
    for line in said.splitlines():
        if "going on" in line or "weights a second" in line:
            print(f"    {line}")
    print(
        f"{name}: {time.perf_counter() - begin:.0f} s; peak anonymous {peak.anonymous / MIB:,.0f} MiB,"
        f" resident {peak.resident / MIB:,.0f} MiB; {peak.resident / goal:.3f} of the goal",
        flush=True,
    )


def sample(pid: int, peak: Peak) -> None:
    with contextlib.suppress(OSError):  # it may be gone by now
        values = {}
        for path in (f"/proc/{pid}/smaps_rollup", f"/proc/{pid}/status"):
            for line in Path(path).read_text().splitlines():
                words = line.split()
                if len(words) == 3 and words[2] == "kB":
                    values[words[0]] = int(words[1]) * 1024
        peak.anonymous = max(peak.anonymous, values.get("Anonymous:", 0))
        peak.resident = max(peak.resident, values.get("VmHWM:", 0))


if __name__ == "__main__":
    sys.exit(main())
