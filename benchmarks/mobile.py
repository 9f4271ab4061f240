"""What training leaves of the damage that the mobile schema does, with the weights it computes with, in llama.cpp.

    lowbit train MODEL --recipe mobile_mlp2 --train both -o TRAINED
    python benchmarks/mobile.py MODEL TRAINED --recipe mobile_mlp2 --text benchmarks/texts/*-prose.txt

No runtime here but transformers knows a scale a channel. Its values are float numbers, so four F32 files hold exactly
what is compared: MODEL; rounded by compressed-tensors' rule (naive); the start of training, rounded under what flows
in; and TRAINED. Printed for each text: the mean KLD of TRAINED over that of naive, and over that of the start, with
paired 95% intervals, then each file's figures. Where TRAINED has static activations, their KLD too, in torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import lowbit
from fidelity import interval
from lowbit import console
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.model import ACTIVATIONS
from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions
from lowbit.measure.record import machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("trained", metavar="TRAINED", type=Path, help="the folder of lowbit train")
    parser.add_argument("--recipe", default="mobile_mlp2")
    parser.add_argument("--text", metavar="FILE", nargs="+", required=True, type=Path, help="held-out texts")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=Path("mobile"), help="for the files made")
    parser.add_argument("--chunks", metavar="N", type=int, help="chunks of each text (default: all)")
    parser.add_argument("--threads", metavar="N", type=int)
    parser.add_argument("--make", action="store_true", help="make the files and stop")
    args = parser.parse_args()
    console.set_quiet(True)
    try:
        files = make(args)
        if not args.make:
            measure(args, files)
            activations(args)
    except LowbitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def make(args: argparse.Namespace) -> dict[str, Path]:
    """The files that are not there yet: F32, by what they are."""
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {name: args.folder / f"{name}-f32.gguf" for name in ("reference", "naive", "start", "trained")}
    start = args.trained.with_name(args.trained.name + ".work") / "start"
    sources = {"reference": args.model, "start": start, "trained": args.trained}
    for name, source in sources.items():
        if not files[name].exists() and (name == "reference" or Path(source).exists()):
            lowbit.pack(source, "f32", files[name], threads=args.threads)
    if not files["naive"].exists():
        lowbit.pack(naive(args), "f32", files["naive"], threads=args.threads)
    return {name: path for name, path in files.items() if path.exists()}


def naive(args: argparse.Namespace) -> Path:
    """The schema without training: every matrix by the library's own rule."""
    from lowbit.train import load, prepare, save

    folder = args.folder / "naive"
    with open_checkpoint(args.model) as checkpoint:
        save(prepare(load(checkpoint), args.recipe), folder, like=checkpoint)
    return Path(folder)


def measure(args: argparse.Namespace, files: dict[str, Path]) -> None:
    exactness(args.trained, files["trained"])
    options = MeasureOptions(chunks=args.chunks, threads=args.threads, speed=False, memory=False)
    compared = [files[name] for name in ("naive", "start", "trained") if name in files]
    print(f"{machine()}")
    for text in args.text:
        result = lowbit.measure(compared, against=files["reference"], text=text, options=options)
        for pair in result["pairs"]:
            if Path(pair["artifact"]).name.startswith("trained"):
                ratio = pair["kld_mean_ratio"]
                base = Path(pair["baseline"]).name.partition("-")[0]
                print(f"{text.name}: mean KLD of the trained weights x {interval(ratio)} of {base}")
        for entry in result["artifacts"]:
            found = entry["fidelity"]
            print(
                f"  {Path(entry['path']).name:20} mean KLD {interval(found['kld_mean'])}, top-1"
                f" {interval(found['top1'])}, {found['tokens']['value']} tokens"
            )
        sys.stdout.flush()


def exactness(trained: Path, packed: Path) -> None:
    """How exactly the F32 file holds the schema's numbers, and whether float16 would."""
    differing = beyond = total = 0
    with open_checkpoint(trained) as checkpoint, open_checkpoint(packed) as file:
        for name in checkpoint.names:
            coded = checkpoint.coded_rows(name, 0, checkpoint.specs[name].n_rows)
            if coded is None:
                continue
            values = grids.get(coded[0]).dequantize(coded[1])
            total += values.size
            differing += int((values.view(np.uint32) != file.read(name).reshape(values.shape).view(np.uint32)).sum())
            with np.errstate(over="ignore"):
                beyond += int((values.astype(np.float16).astype(np.float32) != values).sum())
    print(f"{total:,} weights, {differing} of the F32 file differ from code x scale, {beyond} are no float16 numbers")


def activations(args: argparse.Namespace) -> None:
    """KLD with and without static activations of the trained weights, on the same chunks, in torch in float32."""
    if not (args.trained / ACTIVATIONS).exists():
        return
    import safetensors.torch
    import torch

    from lowbit.train import load, load_tokenizer, static_ranges

    torch.set_num_threads(args.threads or torch.get_num_threads())
    with open_checkpoint(args.model) as source, open_checkpoint(args.trained) as checkpoint:
        reference, trained, tokenizer = load(source), load(checkpoint), load_tokenizer(source)
        rounded = tuple(
            name.removesuffix(".weight")
            for name in checkpoint.names
            if (grid := checkpoint.info(name).grid) is not None and grid.startswith("channelwise")
        )
    scales = safetensors.torch.load_file(args.trained / ACTIVATIONS)
    for text in args.text:
        tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
        rows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)[: args.chunks]
        plain = np.array([_kld(reference, trained, row) for row in rows])
        static_ranges.attach(trained, rounded, scales)
        static = np.array([_kld(reference, trained, row) for row in rows])
        static_ranges.detach(trained)
        draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
        ratios = static[draws].mean(1) / plain[draws].mean(1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        print(
            f"{text.name}: static int8 activations and cache: mean KLD {static.mean():.4f}, of float ones"
            f" {plain.mean():.4f}, x {static.mean() / plain.mean():.3f} [{low:.3f}, {high:.3f}], {len(rows)} chunks"
        )


def _kld(reference: object, student: object, row: object) -> float:
    import torch
    from torch.nn.functional import log_softmax

    with torch.no_grad():
        p, q = (log_softmax(model(row[None]).logits[0].float(), -1) for model in (reference, student))  # type: ignore[operator, index]
        return float((p.exp() * (p - q)).sum(-1).mean())


if __name__ == "__main__":
    sys.exit(main())
