"""``lowbit ship``: checkpoint to measured artifact, in one run folder, each stage whole on disk before the next begins.

The folder holds reference.gguf (the source's weights, unquantized), naive-RECIPE.gguf (what llama-quantize makes of
them), calibrated-RECIPE.gguf (the start of training), model-RECIPE.gguf (the product), lowbit.json and report.html;
checkpoint/ is the trained model as a Hugging Face folder, work/ what a killed run goes on from.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import lowbit
from lowbit import console, files, verbs
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.inspect import inspect
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.record import machine
from lowbit.measure.text import check_text
from lowbit.pack import pack
from lowbit.report import report

_FORMAT = "lowbit-run/1"
_HELD_OUT_CHUNKS = 12


def ship(
    model: str | Path,
    *,
    out: str | Path,
    text: str | Path | None = None,
    speed: bool = True,
    **training: Any,
) -> dict[str, Any]:
    """Trains ``model``, packs it, measures it in llama.cpp and writes the report; returns the record (lowbit.json).

    text: held-out text to measure on (default: one bundled with lowbit, which training never sees). speed: measure
    speed and memory too. training: fields of ``lowbit.train.TrainOptions`` (minutes, recipe, data, seed, ...).
    Killed at any moment, the same call goes on where it was. Raises LowbitError.
    """
    from lowbit.train import TrainOptions  # here, so that only the verbs that train import torch

    options = TrainOptions(**training)
    recipe = recipes.get(options.recipe)
    held_out = Path(text) if text is not None else Path(str(resources.files("lowbit").joinpath("data", "held-out.txt")))
    check_text(held_out)
    with open_checkpoint(model) as checkpoint:
        if not recipe.trained(checkpoint):
            hint = f"lowbit pack --recipe {recipe.name} makes the file"
            raise BadOption("this recipe has no low-bit weights to train", found=recipe.name, hint=hint)
        run = _Run(checkpoint, Path(out), options, str(model))
        run.claim()
        run.pack_baselines()
        run.train()
        run.pack_trained()
        run.measure(held_out, speed, None if text is not None else _HELD_OUT_CHUNKS)
        run.write_record()
    report(run.out)
    return run.record()


class _Run:
    """One run folder and its stages. A stage is done when its file is there: files are written whole or not at all."""

    def __init__(self, checkpoint: Checkpoint, out: Path, options: Any, model: str) -> None:
        self.checkpoint, self.out, self.options, self.model = checkpoint, out, options, model
        self.work = out / "work"
        self.reference = out / "reference.gguf"
        self.naive = out / f"naive-{options.recipe}.gguf"
        self.calibrated = out / f"calibrated-{options.recipe}.gguf"
        self.product = out / f"model-{options.recipe}.gguf"
        self.times = _Times(self.work / "times.json")

    def claim(self) -> None:
        """Marks the folder as this run's. Raises BadOption where it is another's."""
        from lowbit.train.pipeline import run_key

        mark, key = self.work / "run.json", run_key(self.checkpoint, self.options)
        if mark.exists():
            if json.loads(mark.read_text(encoding="utf-8")) != key:
                hint = "Choose another --out, or remove the folder to start again"
                raise BadOption("the folder holds a run of another model or with other options", where=self.out, hint=hint)
        elif self.product.exists():
            raise BadOption("the folder holds a model already", where=self.product, hint="Choose another --out")
        else:
            files.write_json(mark, key)

    def pack_baselines(self) -> None:
        """The reference, and what llama-quantize makes of it."""
        self._stage("reference", self.reference, lambda: pack(self.checkpoint, "source", self.reference))
        self._stage("naive", self.naive, lambda: pack(self.checkpoint, self.options.recipe, self.naive, naive=True))

    def train(self) -> None:
        """Sampling, calibration and distillation, which keep a ledger of their own."""
        from lowbit.train import train

        start = time.monotonic()
        self.trained = train(
            self.checkpoint.path, self.out / "checkpoint", options=self.options, work=self.work / "training"
        )
        if "train" not in self.times.seconds:
            self.times.add("train", time.monotonic() - start)

    def pack_trained(self) -> None:
        """The start of training and its end, with the codes and scales that training left."""
        if self.options.start == "calibrated":
            self._stage(
                "calibrated", self.calibrated, lambda: pack(self.trained.start, self.options.recipe, self.calibrated)
            )
        self._stage("pack", self.product, lambda: pack(self.trained.path, self.options.recipe, self.product))

    def measure(self, text: Path, speed: bool, chunks: int | None) -> None:
        """Every artifact in llama.cpp against the reference, on text that training never saw."""
        artifacts = [path for path in (self.naive, self.calibrated, self.product) if path.exists()]
        key = hashlib.sha256(f"{files.sha256(text)} {speed} {chunks} {self.options.threads}".encode()).hexdigest()[:16]
        path = self.work / f"measure-{key}.json"
        options = MeasureOptions(speed=speed, memory=speed, chunks=chunks, threads=self.options.threads)
        self._stage(
            "measure", path, lambda: measure(artifacts, against=self.reference, text=text, json=path, options=options)
        )
        self.measured = json.loads(path.read_text(encoding="utf-8"))

    def write_record(self) -> None:
        """lowbit.json: what was made, from what, how, and what was measured."""
        measured, training = self.measured, dict(self.trained.record)
        by_role = {Path(a["path"]).name.partition("-")[0]: a for a in measured["artifacts"]}
        roles = {"nearest": "naive", "calibrated": "calibrated", "distilled": "model"}
        training["phases"] = [
            {**phase, "kld": by_role[roles[phase["name"]]]["fidelity"]["kld_mean"]} for phase in training["phases"]
        ]
        files.write_json(self.out / "lowbit.json", {
            "format": _FORMAT,
            "lowbit": lowbit.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["lowbit", *sys.argv[1:]]) if _is_command_line() else "lowbit.ship",
            "model": self._described_model(),
            "recipe": self.options.recipe,
            "grids": recipes.get(self.options.recipe).assign(self.checkpoint),
            "options": vars(self.options),
            "machine": {**machine(), "torch": metadata.version("torch"), "system": platform.system()},
            "stages": [{"name": name, "seconds": seconds} for name, seconds in self.times.seconds.items()],
            "files": self._described_files(),
            "training": training,
            "measure": measured,
        })  # fmt: skip

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "lowbit.json").read_text(encoding="utf-8")))

    def _described_model(self) -> dict[str, Any]:
        path = self.checkpoint.path
        return {
            "name": self.checkpoint.name,
            "source": self.model,
            "architecture": self.checkpoint.family.arch,
            "license": self.checkpoint.license,
            "weights": self.checkpoint.n_weights,
            "sha256": files.sha256(path) if path.is_file() else None,
        }

    def _described_files(self) -> dict[str, Any]:
        hashes = {Path(a["path"]).name: a["sha256"] for a in self.measured["artifacts"]}
        described = {}
        for path in (self.reference, self.naive, self.calibrated, self.product):
            if path.exists():
                described[path.name] = {
                    "sha256": hashes.get(path.name) or files.sha256(path),
                    "size_bytes": path.stat().st_size,
                    "bits_per_weight": inspect(path)["bits_per_weight"],
                }
        return described

    def _stage(self, name: str, product: Path, make: Callable[[], Any]) -> None:
        if product.exists():
            return
        console.log(f"{name}: {product.name}")
        start = time.monotonic()
        make()
        self.times.add(name, time.monotonic() - start)


class _Times:
    """Seconds of each stage, on disk, so that a resumed run tells the whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                self.seconds = dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise BadFile("not valid JSON", where=path, hint="Remove it and run again") from error

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        files.write_json(self.path, self.seconds)


def _is_command_line() -> bool:
    return Path(sys.argv[0]).name in ("lowbit", "__main__.py")


verbs.make_callable(__name__)
