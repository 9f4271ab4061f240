"""A training on a Ray cluster: Ray Train starts its processes, as torchrun would, and each runs ``lowbit.train``.

``lowbit train MODEL -o OUT --launcher ray --processes N``. All of it is the training of ``docs/beyond-one-machine.md``:
the same steps, the same files, on a disk that all nodes see. Ray Train's own checkpoints and retries are not used: what
a training goes on from is its run folder, and the same call goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from lowbit import console, ray_cluster
from lowbit.errors import BadOption, LowbitError, RuntimeFailed
from lowbit.train.options import TrainOptions
from lowbit.train.pipeline import TrainResult, train, work_folder

_WHERE = "--launcher ray"


def train_on_ray(
    model: str | Path,
    out: str | Path,
    *,
    processes: int,
    address: str | None = None,
    options: TrainOptions | None = None,
    work: str | Path | None = None,
) -> TrainResult:
    """``lowbit.train(model, out, options=options, work=work)`` in several processes of a Ray cluster.

    processes: of the training, each with a GPU where the cluster has as many, else with ``options.threads`` CPUs
    (default: one). address: the cluster's head, HOST:PORT; None: RAY_ADDRESS, or the cluster that runs on this machine.
    Raises what a training raises, BadOption where there is no such cluster or too small a one, and RuntimeFailed where
    a process is gone; the same call goes on then.
    """
    ray = ray_cluster.library(_WHERE, "ray-train")
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        hint = "Run: pip install 'lowbit[ray-train]'"
        raise BadOption("Ray Train is not installed", where=_WHERE, found=str(error)[:100], hint=hint) from None
    options = options or TrainOptions()
    out = Path(out).absolute()
    folder = work_folder(out, work).absolute()
    joined = ray_cluster.connect(ray_cluster.address_of(address), shows=not console.is_quiet(), tells=True)
    try:
        each = _resources(processes, options)
        backend = "cuda:nccl,cpu:gloo" if "GPU" in each else "gloo"  # as ``lowbit.train.world`` has it
        trainer = TorchTrainer(
            _as_one,
            train_loop_config={
                "model": _absolute(str(model)), "out": str(out), "work": str(folder),
                "options": _everywhere(options), "quiet": console.is_quiet(),
            },
            torch_config=TorchConfig(backend=backend),
            scaling_config=ScalingConfig(num_workers=processes, use_gpu="GPU" in each, resources_per_worker=each),
            run_config=RunConfig(name="ray", storage_path=str(folder)),
        )  # fmt: skip
        try:
            trainer.fit()
        except Exception as error:
            raise _cause(error) from error
    finally:
        if joined:
            with contextlib.suppress(Exception):
                ray.shutdown()
    record = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["facts"]["record"]
    return TrainResult(out, folder / "start", record)


def _as_one(config: dict[str, Any]) -> None:
    """One process, on some node. Ray Train has named its place among the others, and made them a group."""
    console.set_quiet(config["quiet"])
    train(config["model"], config["out"], options=TrainOptions(**config["options"]), work=config["work"])


def _resources(processes: int, options: TrainOptions) -> dict[str, float]:
    """What each process asks of the cluster. Raises BadOption where there is less: Ray would wait for it for ever."""
    nodes = ray_cluster.nodes()
    if sum(node.gpus for node in nodes) >= processes:
        return {"GPU": 1.0, "CPU": 1.0}
    threads = float(options.threads or 1)
    fit = sum(int(node.cpus // threads) for node in nodes)
    if fit < processes:
        found = f"{sum(node.cpus for node in nodes):.0f} CPUs on {len(nodes)} nodes: {fit} processes of {threads:.0f}"
        raise BadOption("the Ray cluster is too small", where=f"--processes {processes}", found=found)
    return {"CPU": threads}


def _everywhere(options: TrainOptions) -> dict[str, Any]:
    """Its fields, with paths that mean the same in any folder."""
    fields = dataclasses.asdict(options)
    return fields | {name: _absolute(fields[name]) for name in ("data", "reference") if fields[name] is not None}


def _absolute(name: str) -> str:
    """A path that is there, from the root; a name of something else as it is."""
    with contextlib.suppress(OSError):
        if Path(name).exists():
            return str(Path(name).absolute())
    return name


def _cause(error: BaseException) -> LowbitError:
    """What ended the training, of all that Ray wraps it in."""
    failures = list(getattr(error, "worker_failures", {}).values())
    # A process that ends because another did says so; what that one said comes first.
    found = [each for failure in failures for each in _within(failure) if isinstance(each, LowbitError)]
    own = [each for each in found if "another of its processes has gone" not in each.what]
    if own or found:
        return (own or found)[0]
    hint = "The same command goes on from here"
    return RuntimeFailed("the training was ended", where=_WHERE, found=ray_cluster.said(error), hint=hint)


def _within(error: BaseException) -> list[BaseException]:
    """An error and what caused it, down to the first."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        at = getattr(at, "cause", None) or getattr(at, "_base_exc", None) or at.__cause__
    return seen
