"""``lowbit train``: sample, calibrate, distil, within one budget; every stage on disk before the next begins."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from lowbit import console, texts
from lowbit import grid as grids
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.model import MANIFEST
from lowbit.errors import BadOption
from lowbit.files import replacing
from lowbit.run._hf_model import load
from lowbit.train import data, forms, frames, importance, kv_balance, precision, static_ranges
from lowbit.train.activation_quant import round_activations
from lowbit.train.elsewhere import Elsewhere, identity
from lowbit.train.fake_quant import assignment, prepare
from lowbit.train.kv_quant import quantizer_of
from lowbit.train.ledger import Ledger
from lowbit.train.loop import DistillationTrainer, Schedule, distil, latest_checkpoint
from lowbit.train.loss import softcap
from lowbit.train.model import load_tokenizer, save
from lowbit.train.moments import EMBEDDING
from lowbit.train.options import TrainOptions
from lowbit.train.record import describe
from lowbit.train.reference import Ask, Kept, OwnReference, ReferenceCache
from lowbit.train.reference_file import ReferenceFile
from lowbit.train.reference_server import RemoteReference
from lowbit.train.start import rounded
from lowbit.train.storage import save_tensors
from lowbit.train.trainable import choose_parameters
from lowbit.train.world import ALONE, World, join, leave, together

_SAMPLING_SHARE = 0.08  # of the budget, where nothing else is asked for
# Of the time left when they begin; the second where the start is nearly all that a short training gains.
_COLLECTING_SHARE = (0.35, 0.6)
_ROUNDING_SHARE = (0.3, 0.9)
_ROUNDING_SECONDS = 5e-7  # a weight and core, without its sweeps: what is kept for it
_CALIBRATION_SEQUENCES = 96
_FEWEST_STEPS = 16  # of distillation that may gain on such a start; fewer are noise (dev/LOG.md)
_ROUNDING_SLACK = 0.1  # of its time that rounding may be behind before it leaves the sweeps out
# A training step in forward passes of the body: measured on SmolLM2, 4.1 with the head's three products.
_BODY_STEP = 3.3
_ASKING_SHARE = 0.4  # of the time left, at most
_FEWEST_SEQUENCES = 8
_RANGE_SEQUENCES = 8
_UNSEEN = 4  # sequences that are never trained on, to look at as the training goes
_POOL = 4  # times what is wanted is read of the user's data, and what is wanted drawn from that
_BALANCING_SEQUENCES = 2


@dataclass(frozen=True)
class TrainResult:
    """The trained checkpoint, the start it was trained from, and the record for the report."""

    path: Path
    start: Path
    record: dict[str, Any]


def train(
    model: str | Path, out: str | Path, *, options: TrainOptions | None = None, work: str | Path | None = None
) -> TrainResult:
    """Quantization-aware training of ``model`` by distillation from itself; writes a checkpoint folder to ``out``.

    work: where the stages keep their files (default: ``out`` with ``.work`` behind it). Killed at any moment, the same
    call goes on. Under torchrun or accelerate every process calls, and they share the model. Raises LowbitError for bad
    input, CannotWrite where there is no room, RuntimeFailed where another process is gone.
    """
    options = options or TrainOptions()
    start = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(out)
    work = work_folder(out, work)
    with open_checkpoint(model) as checkpoint:
        check_trainable(checkpoint, options.recipe, options.kv)
        world = join()
        with together(world):
            check_free(out, work, checkpoint.path)
            ledger = Ledger.open(work / "ledger.json", run_key(checkpoint, options), keeps=world.rank == 0)
            run = _run(world)(checkpoint, options, ledger, work, out, world)
            if not world.share(ledger.done("export")):
                run.load(start)
                run.gather()
                run.balance()
                run.calibrate()
                run.distil()
                ledger.facts["record"] = world.share(ledger.facts.get("record"))
            leave(world)
        return TrainResult(out, work / "start", ledger.facts["record"])


def work_folder(out: Path, work: str | Path | None) -> Path:
    """Where the stages keep their files."""
    return Path(work) if work is not None else out.with_name(out.name + ".work")


def _run(world: World) -> type[Run]:
    """How a model is trained by one process, or by several that share it."""
    if world.size == 1:
        return Run
    from lowbit.train.sharded_run import ShardedRun

    return ShardedRun


def check_trainable(checkpoint: Checkpoint, recipe: str, kv: str | None = None) -> None:
    """Raises BadOption where the recipe puts nothing on a low-bit grid, Unsupported where rows, or heads of a KV cache
    of that type, are not whole blocks."""
    if kv is not None:
        quantizer_of(checkpoint, kv)
    for each in recipes.several(recipe):
        if not each.trained(checkpoint):
            hint = f"lowbit pack --recipe {each.name} makes the file"
            raise BadOption("this recipe has no low-bit weights to train", found=each.name, hint=hint)


def check_free(out: Path, work: Path, source: Path) -> None:
    """Refuses a place where something else than this run's checkpoint would be replaced."""
    hint = "Choose another --out"
    if out.exists() and not out.is_dir():
        raise BadOption("the checkpoint is a folder", where=out, found="a file", hint=hint)
    if out.exists() and out.resolve() == source.resolve():
        raise BadOption("the checkpoint would replace the model it is made from", where=out, hint=hint)
    ours = (work / "ledger.json").exists() or (out / MANIFEST).exists()
    if not ours and ((out / "config.json").exists() or any(out.glob("*.safetensors"))):
        raise BadOption("the folder holds a model already", where=out, hint=hint)


def run_key(checkpoint: Checkpoint, options: TrainOptions) -> str:
    """Names the run: the model, as its files are now, and every option. The threads of a machine may change."""
    chosen = {**asdict(options), "threads": None, "reference": identity(options)}
    # A model that was trained on and saved again has the sizes it had.
    stat = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _model_files(checkpoint.path)]
    return hashlib.sha256(json.dumps([str(checkpoint.path.resolve()), stat, chosen]).encode()).hexdigest()


def _model_files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.safetensors"), *path.glob("*.json")]) if path.is_dir() else [path]


class Run:
    """One training run. Its methods are the stages, in order; each leaves what the next needs on disk."""

    sampling_share = _SAMPLING_SHARE
    body_ratio = 1.0  # weights of the layers that are trained, over the reference's

    def __init__(
        self, checkpoint: Checkpoint, options: TrainOptions, ledger: Ledger, work: Path, out: Path,
        world: World = ALONE,
    ) -> None:  # fmt: skip
        self.checkpoint, self.options, self.ledger, self.work, self.out = checkpoint, options, ledger, work, out
        self.world, self.device = world, world.device
        self.budget = options.minutes * 60
        self.length = options.sequence_length
        self.saved_like = checkpoint
        self.recipes = recipes.several(options.recipe)
        self.kv = quantizer_of(checkpoint, options.kv, options.kv_share) if options.kv else None
        # The reference, where it is not the model before it is trained: one of the two.
        self.reference_file: ReferenceFile | None = None
        self.reference_process: RemoteReference | None = None

    def left(self, start: float) -> float:
        """Seconds of the budget left, ``start`` being when the stage now running began."""
        return self.budget - self.ledger.spent() - (time.monotonic() - start)

    def load(self, start: float) -> None:
        """The model, its speed and the precision of its products."""
        torch.manual_seed(self.options.seed)
        with self.ledger.stage("load", start):
            console.log(f"Loading {self.checkpoint.name}")
            self.tokenizer = load_tokenizer(self.checkpoint)
            facts = self.ledger.facts
            asked = self.options.reference_file is None and self.ledger.done("reference")
            if self.options.reference is not None and not asked:
                elsewhere = Elsewhere.found(self.checkpoint, self.options, self.tokenizer, self.world)
                self.reference_file, self.reference_process = elsewhere.file, elsewhere.process
                facts["reference"] = elsewhere.described
            if "dtype" not in facts:
                width = self.checkpoint.config["hidden_size"]
                chosen = self.world.first(lambda: precision.choose(self.options.precision, self.device, width))
                facts["dtype"] = "bfloat16" if chosen == torch.bfloat16 else "float32"
            self.dtype = getattr(torch, facts["dtype"])
            self.model: Any = self._load()
            speed = self.world.share(self._forward_speed())
            facts.setdefault("forward_tokens_per_second", speed)
            self.reference_head: torch.Tensor | None = None
            if self.options.reference is None:
                self.reference_head = self._own_head()
            if (self.options.top_k or 0) > (n := self.checkpoint.specs[EMBEDDING].shape[0]):
                raise BadOption("more targets than tokens", found=self.options.targets, expected=f"topk:{n} or less")

    def _load(self) -> Any:
        return load(self.checkpoint).to(self.device)

    def _own_head(self) -> torch.Tensor:
        """The output head (vocabulary, width) as the model has it before any rounding, in the products' dtype."""
        head: torch.Tensor = self.model.get_output_embeddings().weight
        return head.detach().to(self.dtype, copy=True)

    @torch.no_grad()
    def _forward_speed(self) -> float:
        tokens = torch.randint(0, self.model.config.vocab_size, (1, self.length), device=self.device)
        best = float("inf")
        with precision.autocast(self.device, self.dtype):
            for _ in range(3):
                start = time.perf_counter()
                hidden = self.model.model(tokens, use_cache=False).last_hidden_state
                float(hidden[0, -1, 0])  # waits for a device that runs on its own
                best = min(best, time.perf_counter() - start)
        return self.length / best

    def gather(self) -> None:
        """Token sequences: the user's data, or the model's own writing filled up with the bundled text."""
        path = self.work / "sequences.npy"
        if self.reference_file is not None:
            self.sequences = self.reference_file.sequences
            with self.ledger.stage("data"):
                self.ledger.facts["data"] = self.reference_file.header.facts
            return
        if self.ledger.done("data"):
            self.sequences = np.load(path)
            return
        start = time.monotonic()
        with self.ledger.stage("data", start):
            facts = self.ledger.facts
            if self.options.data is not None:
                # Some more than there is time for, to draw from; a data set may have no end.
                limit = _POOL * self._affordable(self.left(start))
                pool = data.load_sequences(self.options.data, self.tokenizer, self.length, limit)
                sources = [{"name": self.options.data, "license": None}]
                wanted = self._affordable(self.left(start))
                rows = data.order(len(pool), self.options.seed)[:wanted]
                sampled, text = np.empty((0, self.length), np.int32), pool[rows]
            else:
                sampled = self._sample(start)
                wanted = self._affordable(self.left(start))
                text = data.bundled_sequences(self.tokenizer, self.length)[: max(0, wanted - len(sampled))]
                sources = [{"name": "written by the model itself", "license": self.checkpoint.license}]
                if len(text):
                    sources += [{"name": name, "license": terms} for _, name, terms in texts.BUNDLED]
            together = np.concatenate([sampled, text])
            self.sequences = together[data.order(len(together), self.options.seed)]
            facts["data"] = {"sampled_tokens": sampled.size, "text_tokens": text.size, "sources": sources}
            self._keep(path, self.sequences)
        for sampled_file in self._sampled_files():
            sampled_file.unlink(missing_ok=True)

    def _sample(self, start: float) -> np.ndarray:
        """Batches that the model writes, until their share of the budget is spent; each on disk when it is whole."""
        earlier = self.ledger.earlier.get("data", 0.0)
        seconds = self.sampling_share * (self.left(start) + earlier)
        begin = time.monotonic() - earlier
        rounds = [np.load(path) for path in self._sampled_files()]
        writer = self._writer()
        with console.progress("Sampling from the reference", seconds) as bar:
            while (left := self.world.share(seconds - (time.monotonic() - begin))) > 0.1 * seconds:
                seed = (self.options.seed + len(rounds)) % (1 << 32)
                rounds.append(self._write_some(writer, left, seed))
                self._keep(self.work / f"sampled-{len(rounds):04}.npy", rounds[-1])
                self.ledger.tick()
                bar.update(time.monotonic() - begin, f"{sum(r.size for r in rounds)} tokens")
        return np.concatenate(rounds) if rounds else np.empty((0, self.length), np.int32)

    def _write_some(self, writer: Any, seconds: float, seed: int) -> np.ndarray:
        return data.sample(writer, self.tokenizer, self.length, seconds, seed)

    def _keep(self, path: Path, values: np.ndarray) -> None:
        with replacing(path) as partial, open(partial, "wb") as handle:
            np.save(handle, values)

    def _sampled_files(self) -> list[Path]:
        return sorted(self.work.glob("sampled-*.npy"))

    def _writer(self) -> Any:
        """The model with its weights in the products' dtype: autocast would convert each again for every token."""
        if self.dtype == torch.float32:
            return self.model
        writer = copy.deepcopy(self.model)
        for parameter in writer.parameters():  # and not the buffers: the rotary frequencies stay float32
            parameter.data = parameter.data.to(self.dtype)
        return writer

    def _affordable(self, seconds: float) -> int:
        """Sequences that ``seconds`` are enough for, to ask the reference about each and to train on each once."""
        if self.options.steps is not None:
            return max(_FEWEST_SEQUENCES, self.options.steps * self.options.batch_size * self.options.accumulate)
        head = self._head_share()
        exact = self.options.targets == "hidden"
        # The head's products: the student's, its gradient, and the reference's, which others are asked for once.
        body = _BODY_STEP * self.body_ratio
        asking, step = (1.0, body + 3 * head) if exact else (1 + head, body + 2 * head)
        tokens = seconds * self.ledger.facts["forward_tokens_per_second"] / (asking + step)
        return max(_FEWEST_SEQUENCES, int(tokens / self.length))

    def _head_share(self) -> float:
        """Weights of the output head over those of the body: what a head's product costs in forward passes."""
        ends = {id(module.weight) for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        body = sum(p.numel() for p in self.model.parameters() if p.ndim == 2 and id(p) not in ends)
        return math.prod(self.checkpoint.specs[EMBEDDING].shape) / max(1, body)

    @torch.no_grad()
    def balance(self) -> None:
        """Keys and queries of sizes that a quantized cache suits, the model staying the same function."""
        if self.kv is None or not self.kv.types.quantized:
            return
        path = self.work / "balanced.safetensors"
        if not self.ledger.done("balance"):
            with self.ledger.stage("balance"):
                console.log("Balancing keys and queries")
                save_tensors(kv_balance.balance(self.model, self.sequences[:_BALANCING_SEQUENCES], self.dtype), path)
        for name, values in safetensors.torch.load_file(path).items():
            self.model.get_parameter(name).copy_(values)

    def calibrate(self) -> None:
        """The start: scales, and weights that round to the start's codes; also written as a checkpoint of its own."""
        if self.reference_file is None:
            self.cache = self._open_cache(len(self.sequences))
        path = self.work / "start.safetensors"
        if not self.ledger.done("calibrate"):
            start = time.monotonic()
            with self.ledger.stage("calibrate", start):
                found = self._calibrated(start) if self.options.start == "calibrated" else {}
                if self.options.activations == "static":
                    found |= self._ranges()
                self._keep_start(found)
        (self.work / "calibration.safetensors").unlink(missing_ok=True)
        self.ask_reference()
        with self.ledger.stage("prepare"):
            self._prepare(path)

    def _open_cache(self, n: int, keeps: bool = True) -> ReferenceCache:
        return ReferenceCache(self.work / "reference", n, self.length, self._form(), keeps=keeps)

    def _form(self) -> forms.Form:
        vocabulary, width = self.checkpoint.specs[EMBEDDING].shape
        return forms.chosen(self.options, width, vocabulary, softcap(self.model))

    def _ask(self) -> Ask:
        """Who says what the reference says."""
        if self.reference_process is not None:
            return self.reference_process
        return OwnReference(self.model, self.dtype, self.cache.form, self.reference_head)

    def _keep_start(self, found: dict[str, torch.Tensor]) -> None:
        save_tensors(found, self.work / "start.safetensors")

    @torch.no_grad()
    def _prepare(self, path: Path) -> None:
        """Puts the start into the model and the fake quantizers around it, and writes the start as a checkpoint."""
        found = safetensors.torch.load_file(path)
        for name, values in found.items():
            kind, _, tensor = name.partition(":")
            if kind == "weight":
                self.model.get_parameter(tensor).copy_(values)
        starts = [frames.from_tensors(found, self.device, which) for which in range(len(self.recipes))]
        prepare(self.model, self.options.recipe, frames=starts, train=self.options.train)
        ranges = {name.partition(":")[2]: values for name, values in found.items() if name.startswith("range:")}
        if ranges:
            static_ranges.attach(self.model, self._rounded_modules(), ranges)
        if self.options.activations == "runtime":
            round_activations(self.model)
        if not (self.work / "start" / MANIFEST).exists():
            self._save(self.work / "start", self.checkpoint, self.options.trained_for)

    def ask_reference(self) -> None:
        """What the reference says of the sequences that there is still time for, rounding having taken its own."""
        if self.reference_file is not None:
            with self.ledger.stage("reference"):
                self.kept: Kept = self.reference_file
            return
        if not self.ledger.done("reference"):
            begin = time.monotonic()
            left = self.left(begin)
            # What is kept out of training comes last, and is to come after what the start was calibrated on.
            calibrated = self.ledger.facts.get("calibration_tokens", 0) // self.length
            fewest = min(len(self.sequences), max(_FEWEST_SEQUENCES, calibrated + _UNSEEN))
            wanted = max(self.cache.done, fewest, min(len(self.sequences), self._affordable(left)))
            if not self._distils(left):
                wanted = 0
            with self.ledger.stage("reference", begin), console.progress("Asking the reference", wanted) as bar:

                def may_go_on(done: int) -> bool:
                    bar.update(done)
                    self.ledger.tick()
                    in_time = time.monotonic() - begin < _ASKING_SHARE * left
                    return in_time or self.options.steps is not None or done < fewest

                self.cache.fill(self._ask(), self.sequences, until=wanted, may_go_on=may_go_on, world=self.world)
                self.ledger.facts["asked"] = self.cache.done or fewest
        self.sequences, self.kept = self.sequences[: self.ledger.facts["asked"]], self.cache
        if not self.cache.form.needs_head:
            self.reference_head = None

    def _distils(self, seconds: float) -> bool:
        """Whether distillation has the time to gain on the start; decided once."""
        if self.options.steps is not None or not self._starts_well():
            return True
        steps = self._affordable(seconds) // (self.options.batch_size * self.options.accumulate)
        found: bool = self.ledger.facts.setdefault("distils", steps >= _FEWEST_STEPS)
        return found

    def _calibrated(self, start: float) -> dict[str, torch.Tensor]:
        """{"weight:NAME": float32} and the parts of its frame ("scales:NAME", ...) for every matrix that is trained."""
        assigned = [assignment(self.model, recipe) for recipe in self.recipes]
        names = self._trained()
        moments, facts = self.work / "calibration.safetensors", self.ledger.facts
        by_clock = self.options.steps is None
        if not moments.exists():
            n = min(_CALIBRATION_SEQUENCES, len(self.sequences) - _held_out(len(self.sequences)))
            # Written down, so that a killed run goes on with what it has collected.
            minutes = facts.setdefault("calibration_minutes", self._collecting(max(0.0, self.left(start))) / 60)
            options = importance.CollectOptions(
                minutes=minutes if by_clock else None, precision=facts["dtype"], seed=self.options.seed
            )
            facts["calibration_tokens"] = importance.collect_of(
                self.model, self.checkpoint, self.sequences[:n], moments, options, self.ledger.tick
            )
        seconds, begin = _ROUNDING_SHARE[self._starts_well()] * self.left(start), time.monotonic()
        found: dict[str, torch.Tensor] = {}

        def in_time(done: float) -> bool:
            return not by_clock or time.monotonic() - begin < done * seconds + _ROUNDING_SLACK * seconds

        with console.progress("Calibrated rounding", len(names)) as bar:
            wanted = {name: tuple(of[name] for of in assigned) for name in names}
            each = rounded(self.model, wanted, moments, torch.get_num_threads(), in_time)
            for done, (name, weight, starts) in enumerate(each, 1):
                found[f"weight:{name}"] = weight.cpu().contiguous()
                for which, frame in enumerate(starts):
                    found |= {} if frame is None else frames.to_tensors(frame, name, which)
                bar.update(done)
                self.ledger.tick()
        return found

    def _collecting(self, left: float) -> float:
        """Seconds of those that are left for collecting moments."""
        least, share = (part * left for part in (_COLLECTING_SHARE[0], _COLLECTING_SHARE[self._starts_well()]))
        weights = sum(math.prod(self.checkpoint.specs[name].shape) for name in self._trained())
        return max(least, min(share, left - _ROUNDING_SECONDS * weights / torch.get_num_threads()))

    def _starts_well(self) -> bool:
        """Whether rounding under gradients gains more than distillation in the same time: where it chooses the codes of
        one recipe of 4 bits or more, and there is nothing of the runtime to train for."""
        weights_alone = self.kv is None and self.options.activations == "float" and len(self.recipes) == 1
        if self.options.start != "calibrated" or not weights_alone:
            return False
        types = self.recipes[0].assign(self.checkpoint)
        return all(grids.get(types[name]).bits_per_weight >= 4 for name in self._trained())

    def chosen(self) -> list[torch.nn.Parameter]:
        """Marks what is trained, and gives it."""
        return choose_parameters(self.model, self.options.train, self._trained())

    def _trained(self) -> tuple[str, ...]:
        """The tensors that any of the recipes trains."""
        return tuple(dict.fromkeys(name for recipe in self.recipes for name in recipe.trained(self.checkpoint)))

    def _ranges(self) -> dict[str, torch.Tensor]:
        """{"range:NAME": float32} for every activation that is rounded: seen on some of what is trained on."""
        rows = self.sequences[: min(_RANGE_SEQUENCES, len(self.sequences) - _held_out(len(self.sequences)))]
        found = static_ranges.calibrate(self.model, self._rounded_modules(), rows, self.dtype)
        return {f"range:{name}": values for name, values in found.items()}

    def _rounded_modules(self) -> tuple[str, ...]:
        """The linear layers whose weights the recipe rounds."""
        assigned = assignment(self.model, self.recipes[0])
        return tuple(name.removesuffix(".weight") for name, grid in assigned.items() if grid.bits_per_weight <= 8)

    def distil(self) -> None:
        """End-to-end distillation for what is left of the budget, and the checkpoint."""
        start = time.monotonic()
        trained = self.chosen()
        seconds = self.left(start)
        curve: list[dict[str, Any]] = []
        is_worse = False
        if not self._distils(seconds):
            console.log("Too little time is left for distillation to gain on the start, which is kept")
            trained, is_worse = [], True
        # What was trained before a kill counts, also where loading it again has used up the budget.
        checkpoint = self.world.first(lambda: latest_checkpoint(self.work / "trainer"))
        if trained and (seconds > 0 or self.options.steps or checkpoint is not None):
            trainer, curve = distil(lambda spent: self._trainer(seconds, spent), checkpoint)
            before, after = trainer.start_kld, curve[-1].get("kld")
            is_worse = self._is_worse(before, after)
            if is_worse:
                told = f"KLD {before:.4f}, then {after:.4f}"
                console.log(f"Distillation does not help with unseen text ({told}): the start is kept")
        distilled = curve[-1]["seconds"] if curve else time.monotonic() - start
        if self._diverged(trained):
            hint = "Start again in another --out with a smaller --learning-rate"
            raise BadOption("the training has diverged", where=self.out, found="NaN or Inf", hint=hint)
        if is_worse:
            self.ledger.facts["kept"] = "start"
            self.world.first(lambda: shutil.copytree(self.work / "start", self.out, dirs_exist_ok=True))
        else:
            self._save(self.out, self.saved_like, self.options.trained_for)
        self.ledger.stages["distil"] = distilled
        trained_on = len(self.sequences) - _held_out(len(self.sequences))
        self.ledger.facts["record"] = self.described(curve, distilled, trained_on)
        self.ledger.stages["export"] = 0.0
        self.ledger.save()

    def _is_worse(self, before: float | None, after: float | None) -> bool:
        """Whether distillation is thrown away, by the KLD on unseen text: a few steps are noise, and a good start only
        loses by them."""
        return before is not None and after is not None and after > before

    def _trainer(self, seconds: float, spent: float) -> DistillationTrainer:
        return DistillationTrainer(self.model, schedule=Schedule(self.options, seconds, spent), **self._for_trainer())

    def _for_trainer(self) -> dict[str, Any]:
        return {
            "options": self.options, "sequences": self.sequences, "cache": self.kept, "dtype": self.dtype,
            "reference_head": self.reference_head, "folder": self.work / "trainer",
            "held_out": _held_out(len(self.sequences)), "kv": self.kv,
        }  # fmt: skip

    def _diverged(self, trained: Sequence[torch.Tensor]) -> bool:
        return not all(bool(torch.isfinite(parameter).all()) for parameter in trained)

    def _save(self, folder: Path, like: Checkpoint, trained_for: dict[str, str] | None = None) -> None:
        save(self.model, folder, like=like, trained_for=trained_for)

    def described(self, curve: list[dict[str, Any]], distilled: float, sequences: int) -> dict[str, Any]:
        """The record; sequences: how many there were to train on."""
        return describe(self.options, self.ledger, curve, distilled, sequences)


def _held_out(n: int) -> int:
    """How many of n sequences are kept out of training."""
    return min(_UNSEEN, n // 8)
