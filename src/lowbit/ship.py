"""``lowbit ship``: checkpoint to measured artifact, in one run folder, each stage whole on disk before the next begins.

The folder holds reference.gguf (the source's weights, unquantized), naive-RECIPE.gguf (what llama-quantize makes of
them), calibrated-RECIPE.gguf (the start of training), model-RECIPE.gguf (the product), its certificate, lowbit.json,
lowbit.lock (which of them belong together, for ``lowbit check``) and report.html; checkpoint/ is the trained model as a
Hugging Face folder, work/ what a killed run goes on from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import lowbit
from lowbit import console, files, launch, partial, verbs
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.inspect import inspect
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.kv import KvOptions
from lowbit.measure.record import machine
from lowbit.measure.text import check_text, chunks_of, read_text
from lowbit.pack import certificate, containers, pack
from lowbit.plan import PlanOptions, curves, open_model, plan_open
from lowbit.release.lock import Proof
from lowbit.release.lock import read as read_lock
from lowbit.release.make_lock import locked, today, write_lock
from lowbit.release.release_set import scan_release
from lowbit.release.walk import LOCK_NAME
from lowbit.report import PAGE, RECORD, read_record, render, report
from lowbit.run.llama_cpp import LlamaCpp

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
    Killed at any moment, the same call goes on where it was. Of several processes (torchrun, accelerate) all train and
    the first does the rest; the others return an empty record. Raises LowbitError.
    """
    # Here, so that only the verbs that train import torch.
    from lowbit.train import TrainOptions
    from lowbit.train.pipeline import check_trainable

    options = TrainOptions(**training)
    if "," in options.recipe:
        hint = "lowbit train makes one checkpoint for them, lowbit pack each file, lowbit measure compares"
        raise BadOption("ship makes one file", found=options.recipe, hint=hint)
    held_out = Path(text) if text is not None else Path(str(resources.files("lowbit").joinpath("data", "held-out.txt")))
    check_text(held_out)
    if options.data is not None and Path(options.data).exists() and held_out.samefile(options.data):
        raise BadOption("--text is held out, and --data is trained on", where=text, hint="Give two different texts")
    with open_checkpoint(model) as checkpoint:
        check_trainable(checkpoint, options.recipe, options.kv)
        if not containers.choose("gguf", None).holds(recipes.get(options.recipe).weights):
            hint = f"lowbit train --recipe {options.recipe}, then lowbit pack and lowbit measure"
            raise BadOption("ship measures in llama.cpp, and GGUF lacks this format", found=options.recipe, hint=hint)
        run = _Run(checkpoint, Path(out), options, str(model))
        if launch.rank() > 0:
            run.train()
            return {}
        with run.claimed():
            run.pack_baselines()
            run.check_length(held_out)
            run.train()
            run.pack_trained()
            run.measure(held_out, speed, None if text is not None else _HELD_OUT_CHUNKS)
            run.write_record()
            run.write_lock()
            run.write_page()
            run.tidy()
    return read_record(run.out)


class _Run:
    """One run folder and its stages. A stage is done when its file is there: files are written whole or not at all."""

    def __init__(self, checkpoint: Checkpoint, out: Path, options: Any, model: str) -> None:
        self.checkpoint, self.out, self.options, self.model = checkpoint, out, options, model
        self.work = out / "work"
        self.reference = out / "reference.gguf"
        self.naive = out / f"naive-{options.recipe}.gguf"
        self.calibrated = out / f"calibrated-{options.recipe}.gguf"
        self.product = out / f"model-{options.recipe}.gguf"
        self.certificate = certificate.path_beside(self.product)
        self.times = _Times(self.work / "times.json")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Marks the folder as this run's and keeps others out. Raises BadOption where it is another's."""
        from lowbit.train.pipeline import run_key

        mark, key = self.work / "run.json", run_key(self.checkpoint, self.options)
        begun = mark.exists()
        if not begun:
            self._refuse_what_is_there()
        with _only_one(self.work / "lock"):
            if begun and _read_json(mark) != key:
                self._start_over()
            if not mark.exists():
                files.write_json(mark, key)
            # A killed run could not remove what it was writing; what packing goes on from has a journal beside it.
            for left in self.out.rglob("*.partial"):
                if not partial.journal_of(left).exists():
                    left.unlink(missing_ok=True)
            yield

    def _refuse_what_is_there(self) -> None:
        """Files of our names that no run of ours made are not a stage done, and not ours to replace."""
        names = (RECORD, PAGE, LOCK_NAME, "checkpoint", *(path.name for path in (*self._ggufs(), self.certificate)))
        there = next((self.out / name for name in names if (self.out / name).exists()), None)
        if there is not None:
            found = "this file, and no work/ to go on from"
            raise BadOption("the folder is no run to go on with", where=there, found=found, hint="Choose another --out")

    def _start_over(self) -> None:
        """Lets another model or other options have the folder as long as no training has begun in it."""
        ledger = self.work / "training" / "ledger.json"
        if ledger.exists() and "data" in _read_json(ledger)["stages"]:
            raise BadOption(
                "the folder holds a run of another model or with other options",
                where=self.out,
                hint="Choose another --out, or remove the folder to start again",
            )
        for path in (*self._ggufs(), self.certificate, self.work / "run.json", self.times.path):
            path.unlink(missing_ok=True)
        shutil.rmtree(ledger.parent, ignore_errors=True)
        self.times.seconds.clear()

    def _ggufs(self) -> tuple[Path, ...]:
        return self.reference, self.naive, self.calibrated, self.product

    def check_length(self, text: Path) -> None:
        """Refuses a held-out text of less than a chunk now, not after the training."""
        if not self.product.exists():
            with LlamaCpp(self.reference, context=MeasureOptions().chunk, logits_all=False) as model:
                chunks_of(read_text(text, model), chunk=MeasureOptions().chunk, limit=1, bos=None)

    def pack_baselines(self) -> None:
        """The reference, and what llama-quantize makes of it."""
        self._stage("reference", self.reference, lambda: self._pack(self.checkpoint, "source", self.reference))
        recipe = self.options.recipe
        self._stage("naive", self.naive, lambda: self._pack(self.checkpoint, recipe, self.naive, naive=True))

    def train(self) -> None:
        """Sampling, calibration and distillation, which keep a ledger of their own."""
        from lowbit.train import train

        self.trained = train(
            self.checkpoint.path, self.out / "checkpoint", options=self.options, work=self.work / "training"
        )
        if "train" not in self.times.seconds and launch.rank() == 0:
            self.times.add("train", sum(self.trained.record["stages"].values()))

    def pack_trained(self) -> None:
        """The start of training and its end, with the codes and scales that training left; of the end it is proved."""
        recipe = self.options.recipe
        if self.options.start == "calibrated":
            self._stage("calibrated", self.calibrated, lambda: self._pack(self.trained.start, recipe, self.calibrated))
        # The certificate takes its name first, so where the file is whole it is there, unless somebody removed it.
        if not self.certificate.exists():
            self.product.unlink(missing_ok=True)
        make = functools.partial(self._pack, self.trained.path, recipe, self.product, certified=True)
        self._stage("pack", self.product, make)

    def _pack(
        self, checkpoint: Checkpoint | Path, recipe: str, out: Path, *, naive: bool = False, certified: bool = False
    ) -> None:
        pack(checkpoint, recipe, out, naive=naive, certificate=certified, threads=self.options.threads)

    def measure(self, text: Path, speed: bool, chunks: int | None) -> None:
        """Every artifact in llama.cpp against the reference, on text that training never saw."""
        artifacts = [path for path in self._ggufs()[1:] if path.exists()]
        # A cache that was trained for is measured beside f16, on what a chunk takes, which the text surely has.
        kv = self.options.kv and KvOptions(types=(self.options.kv,), contexts=(MeasureOptions().chunk,))
        asked = f"{files.sha256(text)} {speed} {chunks} {self.options.threads}{f' {kv}' if kv else ''}"
        key = hashlib.sha256(asked.encode()).hexdigest()[:16]
        path = self.work / f"measure-{key}.json"
        options = MeasureOptions(speed=speed, memory=speed, chunks=chunks, threads=self.options.threads, kv=kv or None)
        self._stage(
            "measure", path, lambda: measure(artifacts, against=self.reference, text=text, json=path, options=options)
        )
        self.measured = _read_json(path)

    def write_record(self) -> None:
        """lowbit.json: what was made, from what, how, and what was measured. One that says so already stays."""
        record = self.out / RECORD
        if record.exists() and _read_json(record).get("measure") == self.measured:
            return
        measured, training = self.measured, dict(self.trained.record)
        by_role = {Path(a["path"]).name.partition("-")[0]: a for a in measured["artifacts"]}
        roles = {"nearest": "naive", "calibrated": "calibrated", "distilled": "model"}
        training["phases"] = [
            {**phase, "kld": by_role[roles[phase["name"]]]["fidelity"]["kld_mean"]} for phase in training["phases"]
        ]
        files.write_json(record, {
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
            "certificate": self._described_certificate(),
            "training": training,
            "measure": measured,
            "plan": self._planned(),
        })  # fmt: skip

    def write_lock(self) -> None:
        """lowbit.lock: reference, checkpoint, product, and that llama.cpp ran the product; one that says so stays."""
        path = self.out / LOCK_NAME
        release = scan_release(self.out)
        members = tuple(locked(member) for member in release.members)
        if path.exists() and read_lock(path).members == members:
            return
        version = f"xllamacpp {metadata.version('xllamacpp')}"
        measured = Proof(runtime="llama.cpp", version=version, date=today(), result="pass", checks=("measure",))
        write_lock(release, proved=[measured])

    def write_page(self) -> None:
        """report.html, where it is not there or a folder that was moved makes its commands wrong."""
        page = self.out / PAGE
        if not page.exists() or page.read_text(encoding="utf-8") != render(read_record(self.out), self.out):
            report(self.out)

    def tidy(self) -> None:
        """Removes what only an unfinished training needs: the reference's states and the optimizer's."""
        for name in ("reference", "trainer"):
            shutil.rmtree(self.work / "training" / name, ignore_errors=True)

    def _described_model(self) -> dict[str, Any]:
        path = self.checkpoint.path
        return {
            "name": self.checkpoint.name,
            "source": self.model,
            "architecture": self.checkpoint.family.arch,
            "license": self.checkpoint.license,
            "weights": self.checkpoint.n_weights,
            "sha256": files.sha256(path) if path.is_file() else None,
            # Of a folder, what decides the weights; a hub id's files are named by their content already.
            "files": {} if path.is_file() else {p.name: files.sha256(p) for p in _weight_files(path)},
        }

    def _described_files(self) -> dict[str, Any]:
        hashes = {Path(a["path"]).name: a["sha256"] for a in self.measured["artifacts"]}
        described = {}
        for path in self._ggufs():
            if path.exists():
                described[path.name] = {
                    "sha256": hashes.get(path.name) or files.sha256(path),
                    "size_bytes": path.stat().st_size,
                    "bits_per_weight": inspect(path)["bits_per_weight"],
                }
        return described

    def _planned(self) -> dict[str, Any]:
        """What the product takes in llama-server as it starts by default, and how that grows with the context."""
        options = PlanOptions()
        with open_model(self.product) as model:
            lines = curves(model, options)
            return {**plan_open(model, options).to_json(), "curves": [line.to_json() for line in lines]}

    def _described_certificate(self) -> dict[str, Any]:
        """The certificate's totals, of the whole file and of each type of tensor."""
        proved = _read_json(self.certificate)
        types: dict[str, dict[str, int]] = {}
        for tensor in proved["tensors"]:
            of_type = types.setdefault(tensor["type"], dict.fromkeys(proved["totals"], 0))
            for key in of_type:
                of_type[key] += tensor[key]
        return {"file": self.certificate.name, "source": "checkpoint", "totals": proved["totals"], "types": types}

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
        self.seconds: dict[str, float] = _read_json(path) if path.exists() else {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        files.write_json(self.path, self.seconds)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends. Raises BadOption where another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise files.cannot_write(path, error) from error
    with handle:
        if not files.lock(handle):
            hint = "Wait for it, or choose another --out"
            raise BadOption("another run is at work in this folder", where=path.parent.parent, hint=hint)
        yield


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile("not valid JSON", where=path, hint="Remove it and run again") from error


def _weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), folder / "config.json"])


def _is_command_line() -> bool:
    return Path(sys.argv[0]).name in ("lowbit", "__main__.py")


verbs.make_callable(__name__)
