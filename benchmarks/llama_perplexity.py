"""llama.cpp's own llama-perplexity, run and read: what benchmarks/perplexity.py and measure_speed.py compare with."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import lowbit

BUILD = """
llama-perplexity, from the source that llama-cpp-python vendors; the options make the kernels that xllamacpp's wheel
for x86-64 has, which was built for AVX2. Without them (GGML_NATIVE is on by default) cmake builds for the machine at
hand, and a CPU with AVX-512 then computes otherwise, and faster:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
        -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
    cmake --build build --target llama-perplexity
"""


@dataclass(frozen=True)
class Run:
    """output, and wall and CPU seconds of the whole process."""

    output: str
    wall: float
    cpu: float

    def number(self, pattern: str) -> float:
        """The last number that stands after ``pattern`` and a colon or an equals sign."""
        found = re.findall(pattern + r"\s*[:=]\s*(-?[\d.]+)", self.output)
        if not found:
            raise SystemExit(f"llama-perplexity did not print {pattern!r}: {self.output[-600:]}")
        return float(found[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llama-perplexity", metavar="PATH", default=os.environ.get("LLAMA_PERPLEXITY"))
    parser.add_argument("--libraries", metavar="DIR", help="look there first for the shared libraries it loads")
    parser.add_argument("--models", metavar="NAME", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--text", metavar="FILE", default=str(Path(__file__).parent / "texts" / "old-prose.txt"))
    parser.add_argument("--chunks", metavar="N", type=int, default=8, help="of 512 tokens (default: 8)")
    parser.add_argument("--threads", metavar="N", type=int, default=1)
    parser.add_argument("--folder", metavar="DIR", help="where the packed files go and stay (default: a temporary one)")
    parser.add_argument("--reference-runtime", metavar="NAME", help="lowbit runs the F16 there (default: llama.cpp)")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.llama_perplexity or not Path(args.llama_perplexity).is_file():
        parser.error("--llama-perplexity PATH (or LLAMA_PERPLEXITY) is needed; --help says how to build it")


def packed(model: str, recipe: str, folder: Path) -> Path:
    """The model as GGUF; q4_0 as llama-quantize rounds it."""
    path = folder / f"{model}-{recipe}.gguf"
    if not path.exists():
        lowbit.pack(model, recipe, path, naive=recipe == "q4_0", threads=1)  # type: ignore[operator]
    return path


def run(args: argparse.Namespace, file: Path, *more: object) -> Run:
    """llama-perplexity on a file, with the text, chunks and threads of ``args``."""
    words = [args.llama_perplexity, "-m", file, "-f", args.text, "-t", args.threads, "--chunks", args.chunks, *more]
    return timed([str(word) for word in words], {"LD_LIBRARY_PATH": args.libraries} if args.libraries else {})


def timed(words: list[str], environment: dict[str, str]) -> Run:
    begin = time.perf_counter()
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    ) as process:
        assert process.stdout
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]}: {output[-800:]}")
    return Run(output, time.perf_counter() - begin, usage.ru_utime + usage.ru_stime)
