"""What training takes of memory: bytes a weight of each thing that a step holds, measured, and what that is for larger
models.

    python benchmarks/train_memory.py [MODEL] [--layers N] [--precision P] [--json FILE | --measured FILE]

Trains MODEL (default: SmolLM2-135M), a cut of N of its layers (default: 6) and a random model of Gemma 3's shapes for
two steps each, by one process and by two and four that share it (gloo, on this machine), with the reference in the
process and taken from a file. Of each process, in the second step: the bytes of what it holds, by kind, from the
tensors themselves; two lengths of sequences tell what grows with tokens; and the peak of the process's own memory
(VmHWM, without mapped files, by a malloc that gives back at once what is freed) tells what the list leaves out.

From that: what Gemma 3 12B and Gemma 4 31B take of 1, 2 and 8 GPUs of 80 GB. Their weights are counted from the
catalogue's configs; none of that was run, and no GPU was.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHORT, LONG = 64, 192
GB, CAPACITY = 1e9, 80.0
TOKENS = 512  # a sequence, one on each GPU at a time
LARGER, GPUS = ("gemma-3-12b", "gemma-4-31b"), (1, 2, 8)
# A decoder layer while FSDP2 has it whole: the values of it and of the next, which is fetched meanwhile, and its
# gradient as the products give it (bfloat16) and as it is summed (float32). By design, not measured apart.
LAYER_BYTES = 2 * 2 + 2 + 4
# master: float32 weights that are trained; frozen: those that are not; adam: two moments; scales: of the grids;
# rounded: values on the grid, of weights that are trained and of others; head: the output head in the products' dtype,
# the student's and the reference's; saved: what autograd keeps from the forward to the backward pass
KINDS = (
    "master", "gradient", "adam", "scales", "rounded", "frozen", "rounded frozen", "head", "reference head", "saved",
)  # fmt: skip
# What is freed goes back to the system, so that the peak is of what was in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m")
    parser.add_argument("--layers", metavar="N", type=int, default=6)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="as GPUs have it")
    parser.add_argument("--processes", metavar="N", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument("--measured", metavar="FILE", help="a file of --json: only print")
    args = parser.parse_args()
    if args.measured:
        found = json.loads(Path(args.measured).read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), args)
    print_measured(found)
    print_larger(found)
    return 0


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each process of each run."""
    import lowbit
    from lowbit.checkpoint import open_checkpoint

    text = folder / "text.txt"
    text.write_text("Of block and group, of scale and zero point, of what is rounded and what is not. " * 400, "utf-8")
    with open_checkpoint(args.model) as checkpoint:
        whole = checkpoint.path
    some = cut(args.model, args.layers, folder / "cut")
    several = [(n, kind, SHORT) for n in args.processes if n > 1 for kind in ("own", "file")]
    runs = [(1, "own", LONG), (1, "own", SHORT), (1, "file", SHORT), *several]
    rows = []
    for name, path, of_model in (
        (f"{args.layers} of its layers", some, runs),
        ("random gemma3", gemma(some, args.layers, folder / "gemma"), runs[:2]),
        (args.model, whole, runs),
    ):  # fmt: skip
        file = folder / f"{len(rows)}.reference"
        lowbit.reference(
            path, file, data=str(text), sequences=8, sequence_length=SHORT, precision=args.precision, threads=1
        )
        for n, kind, length in of_model:
            options = {
                "steps": 2, "threads": 1, "sequence_length": length, "precision": args.precision, "batch_size": n,
                "start": "nearest", "data": str(text), "reference": str(file) if kind == "file" else None,
            }  # fmt: skip
            for found in trained(n, str(path), folder / f"out-{len(rows)}", options):
                rows.append({"model": name, "processes": n, "reference": kind, "tokens": length, **found})
                if args.json:
                    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def gemma(tokenizer: Path, layers: int, folder: Path) -> Path:
    """Gemma 3's architecture with the widths of its smallest model, another's tokenizer and random weights."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from lowbit.checkpoint import open_checkpoint
    from lowbit.plan.model import open_model
    from lowbit.train import load_tokenizer

    config = dict(open_model("gemma-3-270m").config)
    with open_checkpoint(tokenizer) as checkpoint:
        words = load_tokenizer(checkpoint)
    more = {"num_hidden_layers": layers, "vocab_size": 49_152, "bos_token_id": words.bos_token_id}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**config | more)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def cut(model: str, layers: int, folder: Path) -> Path:
    from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
    from lowbit.train.cut import Cut

    with open_checkpoint(model) as source, Cut(source, layers) as some:
        write_checkpoint(folder, some, (Tensor(name=name, values=some.read(name)) for name in some.names))
    return folder


def trained(n: int, model: str, out: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of n processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if n > 1 else {}
    each = []
    for rank in range(n):
        place = (
            {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()} if n > 1 else {}
        )
        words = [sys.executable, __file__, "--as-one", model, str(out), json.dumps(options)]
        each.append(subprocess.Popen(words, env=os.environ | place | _MALLOC, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in each]


def as_one(model: str, out: str, options: dict[str, Any]) -> None:
    """One process of a training: prints what it holds in its second step."""
    import lowbit
    from lowbit import console
    from lowbit.train import TrainOptions
    from lowbit.train.loop import DistillationTrainer

    console.set_quiet(True)
    before, seen = resident(), {}
    plain_init, plain_loss = DistillationTrainer.__init__, DistillationTrainer.compute_loss

    def init(self: Any, *positional: Any, **named: Any) -> None:
        plain_init(self, *positional, **named)
        self.add_callback(watcher(self, seen))

    def compute_loss(self: Any, *positional: Any, **named: Any) -> Any:
        loss, seen["saved"] = with_saved(self, lambda: plain_loss(self, *positional, **named))
        return loss

    DistillationTrainer.__init__ = init  # type: ignore[method-assign]
    DistillationTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    lowbit.train(model, out, options=TrainOptions(**options))
    print(json.dumps({**seen, "before": before}))


def with_saved(trainer: Any, forward: Callable[[], Any]) -> tuple[Any, int]:
    """What ``forward`` gives, and the bytes that autograd keeps for the backward pass and nobody else holds."""
    import torch

    held = {own.untyped_storage().data_ptr() for of_kind in holdings(trainer).values() for own in of_kind}
    storages: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = plain(tensor).untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # What was gathered and dropped again has no bytes left.
    held |= {own.untyped_storage().data_ptr() for of_kind in holdings(trainer).values() for own in of_kind}
    return result, sum(storage.nbytes() for at, storage in storages.items() if at not in held)


def plain(tensor: Any) -> Any:
    """What this process holds of it."""
    from torch.distributed.tensor import DTensor

    from lowbit.train.rounded_shard import RoundedShard

    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.rows if isinstance(tensor, RoundedShard) else tensor


def holdings(trainer: Any) -> dict[str, list[Any]]:
    """The tensors that a step needs, by kind, but for gradients and what autograd saves."""
    from lowbit.train.fake_quant import master, quantized

    kinds: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for name, parameter in trainer.model.named_parameters():
        is_frame = name.rpartition(".")[2] in ("scales", "mins", "sub_scales", "sub_mins")
        kind = "scales" if is_frame else "master" if parameter.requires_grad else "frozen"
        kinds[kind].append(plain(parameter.detach()))
    kinds["scales"] += [buffer for name, buffer in trainer.model.named_buffers() if "parametrizations" in name]
    for name, module, quantizer in quantized(trainer.model):
        moves = master(module, name.rpartition(".")[2]).requires_grad
        kinds["rounded" if moves else "rounded frozen"] += quantizer._values.values()
    kinds["head"] += trainer._heads.values()
    kinds["reference head"] += [] if trainer.reference_head is None else [trainer.reference_head]
    if trainer.optimizer is not None:
        states = [state for state in trainer.optimizer.state.values()]
        kinds["adam"] += [plain(value) for state in states for value in state.values() if value.numel() > 1]
    return kinds


def size(tensors: list[Any]) -> int:
    """Bytes of their memory, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def watcher(trainer: Any, seen: dict[str, Any]) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            seen["gradient"] = size([plain(grad) for grad in grads])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kinds = holdings(trainer)
            seen.update({kind: size(of) for kind, of in kinds.items() if kind not in ("gradient", "saved")})
            moved = [plain(p.detach()) for p in trainer.model.parameters() if p.requires_grad]
            seen["trained weights"] = sum(tensor.numel() for tensor in moved)
            seen["frozen weights"] = sum(tensor.numel() for tensor in kinds["frozen"])
            seen["peak"] = resident("VmHWM")
            seen["embedding weights"], seen["widths"] = shapes(trainer.model.config)

    return Watcher()


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process's own memory, now or at its peak."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return found[what] - found["RssFile"] - found["RssShmem"]


def shapes(config: Any) -> tuple[int, int]:
    """Weights of the embedding; and of all matrices of the layers, what a token brings in and takes out."""
    from lowbit.checkpoint import families

    family = families.by_config(config.to_dict(), "the model")
    specs = family.tensors(family.text_config(config.to_dict(), "the model"))
    layers = [spec.shape for spec in specs if len(spec.shape) == 2 and ".layers." in spec.name]
    return math.prod(specs[0].shape), sum(map(sum, layers))


def listed(row: dict[str, Any]) -> int:
    return sum(row[kind] for kind in KINDS)


def print_measured(rows: list[dict[str, Any]]) -> None:
    print("Bytes of a process, in millions; unlisted: its peak, less what it had before it began, less the rest")
    columns = ("model", "processes", "reference", "tokens", *KINDS, "unlisted")
    print(" | ".join(columns))
    for row in rows:
        unlisted = row["peak"] - row["before"] - listed(row)
        figures = [f"{value / 1e6:.1f}" for value in (*(row[kind] for kind in KINDS), unlisted)]
        print(" | ".join([*(str(row[name]) for name in columns[:4]), *figures]))


def coefficients(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes a weight, from one process that trains the first model; for activations, a token and unit of width."""
    alone = [row for row in rows if (row["processes"], row["reference"], row["tokens"]) == (1, "own", SHORT)]
    whole = max(alone, key=lambda row: row["trained weights"])
    trained, frozen, embedding = (whole[f"{name} weights"] for name in ("trained", "frozen", "embedding"))
    found = {kind: whole[kind] / trained for kind in ("master", "gradient", "adam", "rounded")}
    found["scales"] = whole["scales"] / (trained + frozen)
    found |= {"frozen": whole["frozen"] / frozen, "rounded frozen": whole["rounded frozen"] / frozen}
    found |= {kind: whole[kind] / embedding for kind in ("head", "reference head")}
    for model in dict.fromkeys(row["model"] for row in rows):
        short, long = (
            next(
                r
                for r in rows
                if (r["model"], r["processes"], r["reference"], r["tokens"]) == (model, 1, "own", tokens)
            )
            for tokens in (SHORT, LONG)
        )
        slope = (long["saved"] - short["saved"]) / (LONG - SHORT)
        found[f"activations, {model}"] = slope / short["widths"]
        found[f"saved whatever the tokens, {model}"] = (short["saved"] - slope * SHORT) / short["trained weights"]
    for several in (False, True):
        most = max(
            (row["peak"] - row["before"] - listed(row)) / row["embedding weights"]
            for row in rows
            if (row["processes"] > 1) == several
        )
        found["unlisted, several" if several else "unlisted, one"] = most
    return found


def print_larger(rows: list[dict[str, Any]]) -> None:
    each = coefficients(rows)
    print("\nBytes a weight (activations: a token, and a unit of width of the layers' matrices)")
    for name, value in each.items():
        print(f"{name} | {value:.3f}")
    print(f"\nGB of {CAPACITY:.0f} on each GPU, {TOKENS} tokens at a time on each, products in bfloat16; not run")
    columns = "state | embedding and heads | gathered | activations | unlisted | all | fits"
    print(f"model | weights | GPUs | reference | {columns}")
    for name, gpus, kind in ((name, gpus, kind) for name in LARGER for gpus in GPUS for kind in ("own", "file")):
        parts = on_paper(name, gpus, kind, each)
        whole = sum(parts.values())
        figures = " | ".join(f"{value / GB:.1f}" for value in (*parts.values(), whole))
        fits = "yes" if whole < CAPACITY * GB else "no"
        print(f"{name} | {weights(name)[0] / GB:.2f} | {gpus} | {kind} | {figures} | {fits}")
    for name in LARGER:
        least = next(n for n in range(1, 1 << 10) if sum(on_paper(name, n, "file", each).values()) < CAPACITY * GB)
        print(f"{name} fits from {least} GPUs on, with the reference in a file")


@functools.cache
def weights(name: str) -> tuple[int, int, int, int, int]:
    """Of a model of the catalogue: all weights, trained ones, the embedding's, the largest layer's; and its widths."""
    from lowbit import recipe
    from lowbit.plan.model import open_model

    model = open_model(name)
    grids = recipe.get("q4_0").assign_specs(model.specs)
    size = {spec.name: math.prod(spec.shape) for spec in model.specs}
    embedding = size["model.embed_tokens.weight"]
    layers: dict[str, int] = {}
    for tensor, n in size.items():
        if found := re.search(r"layers\.\d+\.", tensor):
            layers[found[0]] = layers.get(found[0], 0) + n
    frozen = sum(n for tensor, n in size.items() if grids[tensor] != "f32" and tensor == "model.embed_tokens.weight")
    total = sum(size.values())
    widths = sum(sum(spec.shape) for spec in model.specs if len(spec.shape) == 2 and ".layers." in spec.name)
    return total, total - frozen, embedding, max(layers.values()), widths


def on_paper(name: str, gpus: int, reference: str, each: dict[str, float]) -> dict[str, float]:
    """Bytes on one of several GPUs that share a training."""
    _, trained, embedding, layer, widths = weights(name)
    alone = gpus == 1
    state = trained * (each["master"] + each["gradient"] + each["adam"] + each["scales"]) / gpus
    state += trained * each["rounded"] if alone else 0
    ends = embedding * (each["frozen"] + each["scales"]) / gpus + embedding * each["head"]
    ends += embedding * each["rounded frozen"] if alone else 0
    ends += embedding * each["reference head"] if reference == "own" else 0
    activations = max(value for kind, value in each.items() if kind.startswith("activations")) * widths * TOKENS
    return {
        "state": state, "ends": ends, "gathered": 0.0 if alone else layer * LAYER_BYTES, "activations": activations,
        "unlisted": embedding * each["unlisted, one" if alone else "unlisted, several"],
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-one"]:
        as_one(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
        sys.exit(0)
    sys.exit(main())
