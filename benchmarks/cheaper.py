"""What each phase of training leaves of naive Q4_0's KLD and in what time, and what others leave in the same time.

    python benchmarks/cheaper.py MODEL --minutes N --out DIR --text FILE... [--autoround PYTHON] [--torchao PYTHON]

Trains MODEL with one thread and counts time as CPU time, so that neighbours do not decide: ``--minutes N`` is N minutes
of one core, loading included. Made are naive Q4_0; the start of training (calibrated rounding alone); the whole of it,
the default; and distillation alone, from plain rounding. With a Python that has the package, and the same sequences:
AutoRound's gguf:q4_0 export (``--iters`` iterations a block; choose them so that it takes no less time) and torchao's
int4 quantization-aware training for as long as lowbit took, its weights converted by llama-quantize's rule. Each file
is measured in llama.cpp against the unquantized one on every text. What is in DIR already is not made again.

    python -m venv AR && AR/bin/pip install auto-round==0.16.1 torch==2.13.0 gguf
    python -m venv AO && AO/bin/pip install torchao==0.18.0 torch==2.13.0 transformers==5.23.0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lowbit
from _cpu_clock import cpu_clock
from fidelity import interval
from lowbit import console, files
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions

HERE = Path(__file__).parent
OURS = {"both": "calibrated", "distillation": "nearest"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="CPU minutes of one core (default: 10)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="held-out texts")
    parser.add_argument("--chunks", type=int, metavar="N", help="chunks of each text (default: all)")
    parser.add_argument("--only", nargs="+", choices=OURS, default=list(OURS), help="which of lowbit's own runs")
    parser.add_argument("--autoround", metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--iters", type=int, default=20, metavar="N", help="of AutoRound a block (default: 20)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="sequences AutoRound sees (default: 32)")
    parser.add_argument("--torchao", metavar="PYTHON", help="of an environment with torchao")
    parser.add_argument("--train", nargs=3, metavar=("FOLDER", "START", "MINUTES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.train:
            train_by_cpu_time(args.model, args.train[0], args.train[1], float(args.train[2]))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        made = make(args)
        for text in args.text:
            show(args.out, made, text, args.chunks)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def train_by_cpu_time(model: str, folder: str, start: str, minutes: float) -> None:
    """In a process of its own, with one thread."""
    from lowbit.train import TrainOptions

    with cpu_clock():
        lowbit.train(model, folder, options=TrainOptions(minutes=minutes, start=start, threads=1))


def make(args: argparse.Namespace) -> dict[str, tuple[Path, float, str]]:
    """File, CPU seconds and a word on each artifact, by name; in ``args.out``."""
    out, model = args.out, args.model
    made: dict[str, tuple[Path, float, str]] = {"naive": (out / "naive.gguf", 0.0, "llama-quantize's rule")}
    for name, recipe, naive in (("reference", "source", False), ("naive", "q4_0", True)):
        if not (out / f"{name}.gguf").exists():
            lowbit.pack(model, recipe, out / f"{name}.gguf", naive=naive)
    for name in args.only:
        folder = out / name
        if not (folder / "lowbit.json").exists():
            own = [sys.executable, __file__, model, "--out", str(out), "--train", str(folder), OURS[name]]
            subprocess.run([*own, str(args.minutes)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        record = json.loads((folder.with_name(f"{name}.work") / "ledger.json").read_text("utf-8"))
        stages, facts = record["stages"], record["facts"]["record"]
        if name == "both":
            before = sum(stages[stage] for stage in ("load", "data", "calibrate"))
            tokens = facts["phases"][1]["tokens"]
            made["calibrated"] = (
                packed(out / "both.work" / "start", out / "calibrated.gguf"),
                before,
                f"{tokens} tokens",
            )
        steps = facts["phases"][-1]["detail"]
        made[name] = packed(folder, out / f"{name}.gguf"), sum(stages.values()), steps
    budget = max(seconds for _, seconds, _ in made.values())
    for name, python in (("autoround", args.autoround), ("torchao", args.torchao)):
        if python is not None:
            made[name] = rival(name, python, args, budget)
    return made


def packed(checkpoint: Path, file: Path, *, naive: bool = False) -> Path:
    if not file.exists():
        lowbit.pack(checkpoint, "q4_0", file, naive=naive)
    return file


def rival(name: str, python: str, args: argparse.Namespace, seconds: float) -> tuple[Path, float, str]:
    out: Path = args.out
    file, told, folder = out / f"{name}.gguf", out / f"{name}.json", out / name
    if not file.exists():
        source, sequences = hugging_face(args.model, out / "source"), out / "both.work" / "sequences.npy"
        more = [str(args.iters), str(args.samples)] if name == "autoround" else [str(seconds)]
        command = [python, str(HERE / f"_rival_{name}.py"), str(source), str(sequences), str(folder), *more]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_bare_environment())
        told.write_text(done.stdout.strip().splitlines()[-1], "utf-8")
        if name == "torchao":
            packed(folder, file, naive=True)
        else:
            next(folder.rglob("*.gguf")).replace(file)
    said = json.loads(told.read_text("utf-8"))
    return file, said["seconds"], said["detail"]


def _bare_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def hugging_face(model: str, folder: Path) -> Path:
    """The model as a folder that transformers reads, float32."""
    from lowbit.train import load, load_tokenizer

    if not (folder / "tokenizer.json").exists():
        with open_checkpoint(model) as checkpoint:
            load(checkpoint).save_pretrained(folder)
            load_tokenizer(checkpoint).save_pretrained(folder)
    return folder


def show(out: Path, made: dict[str, tuple[Path, float, str]], text: Path, chunks: int | None) -> None:
    options = MeasureOptions(chunks=chunks, threads=1, speed=False, memory=False)
    key = files.sha256(text)[:12]
    path = out / f"measured-{key}-{chunks}-{'-'.join(made)}.json"
    if not path.exists():
        artifacts = [file for file, _, _ in made.values()]
        lowbit.measure(artifacts, against=out / "reference.gguf", text=text, options=options, json=path)
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    naive = result["artifacts"][0]["fidelity"]["kld_mean"]["value"]
    print(f"{text.name}, {result['text']['chunks']} chunks; times are CPU time of one core")
    for (name, (file, seconds, detail)), entry in zip(made.items(), result["artifacts"], strict=True):
        kld = entry["fidelity"]["kld_mean"]
        rate = (naive - kld["value"]) / (seconds / 60) if seconds else 0.0
        print(
            f"  {name:12} {seconds / 60:6.1f} min  KLD {interval(kld)}  x {kld['value'] / naive:.3f} of naive"
            f"  {rate:.4f} nats removed a minute  {file.stat().st_size:,} bytes  {detail}"
        )
    for pair in result["pairs"]:
        names = [Path(pair[side]).stem for side in ("baseline", "artifact")]
        if names[0] != "naive" and "both" in names and pair["kld_mean_ratio"]:
            print(f"  {names[1]} over {names[0]}: x {interval(pair['kld_mean_ratio'])}")
    sys.stdout.flush()


if __name__ == "__main__":
    console.set_quiet("--quiet" in sys.argv)
    sys.exit(main())
