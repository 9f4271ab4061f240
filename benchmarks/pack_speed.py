"""How fast Q4_0 packing is against llama.cpp's own llama-quantize, whole commands in pairs.

    python benchmarks/pack_speed.py --llama-quantize PATH [--threads N ...] [--pairs N] [--rule R] [--model FOLDER]

The model is made for it: TinyLlama-1.1B's shapes, random BF16 weights (2.2 GB), once on no lattice and once on one; or
FOLDER, a Hugging Face folder or GGUF, then only rounding is timed. llama-quantize reads the same weights from a BF16
GGUF. Of each pair the commands follow one another, in an order that turns. A ratio is a command's seconds over
llama-quantize's in the same pair: the median with its 95% bootstrap interval, of wall time and of CPU time, which a
busy neighbour moves less. Interpreter start, imports and lowbit's fsync before the file takes its name are all in it;
llama-quantize does not sync.

    naive           lowbit.pack(..., naive=True): llama-quantize's own rounding; the tensors are compared byte by byte
    recovery        lowbit.pack(...) of a checkpoint on the lattice
    + certificate   the same with certificate=True, as `lowbit pack` always does

llama-quantize, from the source that llama-cpp-python vendors:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-quantize
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import lowbit
import synthetic
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import LowbitError

PACK = (
    "import sys, lowbit; a = sys.argv;"
    "lowbit.pack(a[1], 'q4_0', a[2], threads=int(a[3]), naive='naive' in a, certificate='certificate' in a)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", metavar="PATH", default=os.environ.get("LLAMA_QUANTIZE"))
    parser.add_argument("--threads", metavar="N", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", metavar="N", type=int, default=5)
    parser.add_argument("--rule", choices=synthetic.RULES, default="absmax/7", help="of the lattice")
    parser.add_argument("--model", metavar="FOLDER", help="a model of yours, on no lattice")
    parser.add_argument("--folder", metavar="DIR", help="where 8 GB of files go for the time of the run")
    args = parser.parse_args()
    if not args.llama_quantize or not Path(args.llama_quantize).is_file():
        parser.error("--llama-quantize PATH (or LLAMA_QUANTIZE) is needed; --help says how to build it")
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            run(Path(folder), args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run(folder: Path, args: argparse.Namespace) -> None:
    sources = {"naive": Path(args.model) if args.model else folder / "plain"}
    if not args.model:
        synthetic.make(folder / "plain", synthetic.CONFIGS["llama-1b"])
        sources["recovery"] = folder / "lattice"
        synthetic.make(folder / "lattice", synthetic.CONFIGS["llama-1b"], rule=args.rule)
    baseline = lowbit.pack(sources["naive"], "bf16", folder / "bf16.gguf")
    print(f"{args.model or 'synthetic'}: {baseline.n_weights:,} weights, {baseline.size_bytes:,} bytes of BF16 GGUF")
    print(f"{platform.machine()}, numpy {np.__version__}, lattice {args.rule}, {args.pairs} pairs", flush=True)
    for threads in args.threads:
        commands = {
            "llama-quantize": [args.llama_quantize, folder / "bf16.gguf", folder / "theirs.gguf", "q4_0", threads]
        }
        for name, source in sources.items():
            for more in ([], ["certificate"]):
                words = [sys.executable, "-c", PACK, source, folder / f"{name}.gguf", threads, name, *more]
                commands[f"{name} + certificate" if more else name] = words
        show(threads, commands, measure(commands, args.pairs))
        compare(folder / "theirs.gguf", folder / "naive.gguf")


def measure(commands: dict[str, list[object]], pairs: int) -> np.ndarray:
    """(pairs, commands, 2): wall and CPU seconds."""
    names = list(commands)
    seconds = np.empty((pairs, len(names), 2))
    for pair in range(-1, pairs):  # a first round fills the page cache
        turned = names[pair % len(names) :] + names[: pair % len(names)]
        for name in turned:
            begin = time.perf_counter()
            with subprocess.Popen(
                list(map(str, commands[name])), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as process:
                assert process.stderr
                errors = process.stderr.read()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{name}: {errors.decode(errors='replace')[-500:]}")
            if pair >= 0:
                seconds[pair, names.index(name)] = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    return seconds


def show(threads: int, commands: dict[str, list[object]], seconds: np.ndarray) -> None:
    print(f"\n{threads} thread{'s' * (threads > 1)}{'wall s':>24}{'ratio':>10}{'CPU s':>24}{'ratio':>10}")
    for i, name in enumerate(commands):
        cells = []
        for kind in (0, 1):
            ratio = seconds[:, i, kind] / seconds[:, 0, kind]
            resampled = np.random.default_rng(0).choice(ratio, (2000, len(ratio)))
            low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
            cells.append(f"{np.median(seconds[:, i, kind]):8.2f} {np.median(ratio):6.2f} [{low:.2f}, {high:.2f}]")
        print(f"{name:24}" + "   ".join(cells), flush=True)


def compare(theirs: Path, ours: Path) -> None:
    one, other = GgufFile(theirs), GgufFile(ours)
    same = sum(one.entries[name].dtype == other.entries[name].dtype for name in one.entries)
    equal = sum(np.array_equal(one.raw(name), other.raw(name)) for name in one.entries)
    print(
        f"naive against llama-quantize: {same} of {len(one.entries)} tensors of the same type, {equal} of equal bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
