"""``lowbit train``: sample, calibrate, distil, within one budget; every stage on disk before the next begins."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from lowbit import console
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.files import replacing, write_json
from lowbit.train import calibrate, data, precision
from lowbit.train.fake_quant import assignment, prepare
from lowbit.train.loop import DistillationTrainer, Schedule, distil, latest_checkpoint
from lowbit.train.model import load, load_tokenizer, save
from lowbit.train.options import TrainOptions
from lowbit.train.reference import ReferenceCache
from lowbit.train.storage import save_tensors

_SAMPLING_SHARE = 0.08  # of the budget, where nothing else is asked for
_CALIBRATION_SHARE = 0.08
_CALIBRATION_TOKENS = 32768
_STEP_COST = 4.0  # a training step costs about four forward passes
_FEWEST_SEQUENCES = 8
_UNSEEN = 4  # sequences that are never trained on, to look at as the training goes
_POOL = 4  # times what is wanted is read of the user's data, and what is wanted drawn from that
_DAMPING = 0.01
# Rounding errors of values add up over the positions that attention averages, and of queries and keys inside a softmax;
# moving them about made SmolLM2 worse (dev/LOG.md), where it helps these.
_COMPENSATED = ("attn_o", "ffn_gate", "ffn_up", "ffn_down")


@dataclass
class Ledger:
    """What the run has done and how long each stage took, in ``work/ledger.json``; survives a kill."""

    path: Path
    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, key: str) -> Ledger:
        """Raises BadOption where the folder holds another run's work."""
        if not path.exists():
            return cls(path, facts={"key": key})
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            held, stages, facts = saved["facts"]["key"], dict(saved["stages"]), dict(saved["facts"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile("not a ledger of a run", where=path, hint="Remove the folder and run again") from error
        if held != key:
            hint = "Choose another --out, or remove the folder to start again"
            raise BadOption(
                "the folder holds a run of another model or with other options", where=path.parent, hint=hint
            )
        return cls(path, stages, facts)

    def spent(self) -> float:
        return sum(self.stages.values())

    def save(self) -> None:
        write_json(self.path, {"stages": self.stages, "facts": self.facts})

    @contextmanager
    def stage(self, name: str, start: float | None = None) -> Iterator[None]:
        """Times a stage; it counts as done when the block ends without an error."""
        start = time.monotonic() if start is None else start
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start
        self.save()

    def done(self, name: str) -> bool:
        return name in self.stages


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
    call goes on. Raises LowbitError for bad input, CannotWrite where there is no room.
    """
    options = options or TrainOptions()
    start = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadOption("the checkpoint is a folder", where=out, found="a file", hint="Choose another --out")
    work = Path(work) if work is not None else out.with_name(out.name + ".work")
    with open_checkpoint(model) as checkpoint:
        recipe = recipes.get(options.recipe)
        recipe.assign(checkpoint)
        ledger = Ledger.open(work / "ledger.json", run_key(checkpoint, options))
        run = _Run(checkpoint, options, ledger, work, out)
        if not ledger.done("export"):
            run.load(start)
            run.gather()
            run.calibrate()
            run.distil()
        return TrainResult(out, work / "start", ledger.facts["record"])


def run_key(checkpoint: Checkpoint, options: TrainOptions) -> str:
    """Names the run: the model and every option. The threads of a machine may change."""
    chosen = {**asdict(options), "threads": None}
    stat = [(p.name, p.stat().st_size) for p in _model_files(checkpoint.path)]
    return hashlib.sha256(json.dumps([str(checkpoint.path.resolve()), stat, chosen]).encode()).hexdigest()


def _model_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


class _Run:
    """One training run. Its methods are the stages, in order; each leaves what the next needs on disk."""

    def __init__(self, checkpoint: Checkpoint, options: TrainOptions, ledger: Ledger, work: Path, out: Path) -> None:
        self.checkpoint, self.options, self.ledger, self.work, self.out = checkpoint, options, ledger, work, out
        self.budget = options.minutes * 60
        self.length = options.sequence_length

    def left(self, start: float) -> float:
        """Seconds of the budget left, ``start`` being when the stage now running began."""
        return self.budget - self.ledger.spent() - (time.monotonic() - start)

    def load(self, start: float) -> None:
        """The model, its speed and the precision of its products."""
        torch.manual_seed(self.options.seed)
        with self.ledger.stage("load", start):
            console.log(f"Loading {self.checkpoint.name}")
            self.model: Any = load(self.checkpoint)
            self.tokenizer = load_tokenizer(self.checkpoint)
            self.device = _device()
            self.model.to(self.device)
            facts = self.ledger.facts
            width = self.model.config.hidden_size
            if "dtype" not in facts:
                chosen = precision.choose(self.options.precision, self.device, width)
                facts["dtype"] = "bfloat16" if chosen == torch.bfloat16 else "float32"
            self.dtype = getattr(torch, facts["dtype"])
            facts.setdefault("forward_tokens_per_second", self._forward_speed())
            head = self.model.get_output_embeddings().weight
            if (self.options.top_k or 0) > len(head):
                raise BadOption(
                    "more targets than tokens", found=self.options.targets, expected=f"topk:{len(head)} or less"
                )
            self.reference_head = head.detach().to(self.dtype, copy=True)

    @torch.no_grad()
    def _forward_speed(self) -> float:
        tokens = torch.randint(0, self.model.config.vocab_size, (1, self.length), device=self.device)
        best = float("inf")
        with precision.autocast(self.device, self.dtype):
            for _ in range(3):
                start = time.perf_counter()
                self.model.model(tokens, use_cache=False)
                best = min(best, time.perf_counter() - start)
        return self.length / best

    def gather(self) -> None:
        """Token sequences: the user's data, or the model's own writing filled up with the bundled text."""
        path = self.work / "sequences.npy"
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
                rows = np.random.default_rng(self.options.seed).permutation(len(pool))[:wanted]
                sampled, text = np.empty((0, self.length), np.int32), pool[rows]
            else:
                sampled = self._sample(start)
                wanted = self._affordable(self.left(start))
                text = data.bundled_sequences(self.tokenizer, self.length)[: max(0, wanted - len(sampled))]
                sources = [{"name": "written by the model itself", "license": self.checkpoint.license}]
                if len(text):
                    sources += [{"name": name, "license": terms} for _, name, terms in data.BUNDLED]
            together = np.concatenate([sampled, text])
            self.sequences = together[self._order(len(together))]
            facts["data"] = {"sampled_tokens": sampled.size, "text_tokens": text.size, "sources": sources}
            self.work.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, open(partial, "wb") as handle:
                np.save(handle, self.sequences)

    def _order(self, n: int) -> np.ndarray:
        """The order of n sequences, those written by the model first: what was sampled and what is text, mixed."""
        return np.random.default_rng(self.options.seed).permutation(n)

    def _sample(self, start: float) -> np.ndarray:
        """Batches that the model writes, until their share of the budget is spent."""
        seconds = _SAMPLING_SHARE * self.left(start)
        rounds: list[np.ndarray] = []
        begin = time.monotonic()
        # A copy in the products' dtype: autocast would convert every weight again for every token.
        writer = copy.deepcopy(self.model).to(self.dtype) if self.dtype != torch.float32 else self.model
        with console.progress("Sampling from the reference", seconds) as bar:
            while (left := seconds - (time.monotonic() - begin)) > 0.1 * seconds:
                seed = self.options.seed + len(rounds)
                rounds.append(data.sample(writer, self.tokenizer, self.length, left, seed))
                bar.update(time.monotonic() - begin, f"{sum(r.size for r in rounds)} tokens")
        return np.concatenate(rounds) if rounds else np.empty((0, self.length), np.int32)

    def _affordable(self, seconds: float) -> int:
        """Sequences that ``seconds`` are enough for, to ask the reference about each and to train on each once."""
        if self.options.steps is not None:
            return max(_FEWEST_SEQUENCES, self.options.steps * self.options.batch_size * self.options.accumulate)
        tokens = seconds * self.ledger.facts["forward_tokens_per_second"] / (1 + _STEP_COST)
        return max(_FEWEST_SEQUENCES, int(tokens / self.length))

    def calibrate(self) -> None:
        """The start: scales, and weights that round to the start's codes; also written as a checkpoint of its own."""
        width, n = self.model.config.hidden_size, len(self.sequences)
        self.cache = ReferenceCache(self.work / "reference", n, self.length, width, self.options.top_k)
        path = self.work / "start.safetensors"
        if not self.ledger.done("calibrate"):
            start = time.monotonic()
            with self.ledger.stage("calibrate", start):
                found = self._calibrated(start) if self.options.start == "calibrated" else {}
                save_tensors(found, path)
        self._ask()
        found = safetensors.torch.load_file(path)
        for name, values in found.items():
            kind, _, tensor = name.partition(":")
            if kind == "weight":
                with torch.no_grad():
                    self.model.get_parameter(tensor).copy_(values)
        scales = {name.partition(":")[2]: v.to(self.device) for name, v in found.items() if name.startswith("scales:")}
        prepare(self.model, self.options.recipe, scales=scales, train=self.options.train)
        if not (self.work / "start" / "lowbit.json").exists():
            save(self.model, self.work / "start", like=self.checkpoint)

    def _ask(self) -> None:
        """What the reference says of the sequences that there is still time for, rounding having taken its own."""
        facts = self.ledger.facts
        if not self.ledger.done("reference"):
            left = self.left(time.monotonic())
            facts.setdefault("asked", max(self.cache.done, min(len(self.sequences), self._affordable(left))))
            self.ledger.save()
            with self.ledger.stage("reference"), console.progress("Asking the reference", facts["asked"]) as bar:
                self.cache.fill(self.model, self.sequences, self.dtype, until=facts["asked"], may_go_on=_telling(bar))
        self.sequences = self.sequences[: facts["asked"]]

    def _calibrated(self, start: float) -> dict[str, torch.Tensor]:
        """{"scales:NAME": float16, "weight:NAME": float32} for every matrix below 8 bits."""
        grids = assignment(self.model, self.options.recipe)
        names = [name for name in recipes.get(self.options.recipe).trained(self.checkpoint)]
        modules = {name: self.model.get_submodule(name.removesuffix(".weight")) for name in names}
        linear = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
        affordable = _CALIBRATION_SHARE * self.left(start) * self.ledger.facts["forward_tokens_per_second"] / 2
        until = int(min(_CALIBRATION_TOKENS, max(4 * self.length, affordable)) // self.length)
        until = min(len(self.sequences), max(2, until))
        moments = calibrate.InputMoments(linear)
        try:
            # What the reference says of these rows is not wanted twice, so their targets are kept as well.
            self.cache.done = 0
            self.cache.fill(self.model, self.sequences, self.dtype, until=until, batch=2)
        finally:
            moments.close()
        self.ledger.facts["calibration_tokens"] = until * self.length
        found: dict[str, torch.Tensor] = {}
        with console.progress("Calibrated rounding", len(names)) as bar:
            for done, name in enumerate(names, 1):
                weight, grid = modules[name].weight.detach(), grids[name]
                second = moments[name] if name in linear else torch.eye(weight.shape[1], device=weight.device)
                scales = calibrate.search_scales(weight, second.diagonal(), grid)
                found[f"scales:{name}"] = scales.cpu()
                if self.checkpoint.info(name).role in _COMPENSATED and name in linear:
                    weight = calibrate.compensate(weight, scales, second, grid, _DAMPING)
                found[f"weight:{name}"] = weight.cpu().contiguous()
                bar.update(done)
        return found

    def distil(self) -> None:
        """End-to-end distillation for what is left of the budget, and the checkpoint."""
        start = time.monotonic()
        names = recipes.get(self.options.recipe).trained(self.checkpoint)
        trained = choose_parameters(self.model, self.options.train, names)
        seconds = self.budget - self.ledger.spent()
        curve: list[dict[str, Any]] = []
        # What was trained before a kill counts, also where loading it again has used up the budget.
        begun = latest_checkpoint(self.work / "trainer") is not None
        if trained and (seconds > 0 or self.options.steps or begun):

            def make(schedule: Schedule) -> DistillationTrainer:
                return DistillationTrainer(
                    self.model,
                    options=self.options,
                    sequences=self.sequences,
                    cache=self.cache,
                    reference_head=self.reference_head,
                    dtype=self.dtype,
                    schedule=schedule,
                    folder=self.work / "trainer",
                    held_out=min(_UNSEEN, len(self.sequences) // 8),
                )

            _, curve = distil(make, self.options, seconds, self.work / "trainer")
        distilled = curve[-1]["seconds"] if curve else time.monotonic() - start
        save(self.model, self.out, like=self.checkpoint)
        self.ledger.facts["record"] = self._record(curve, distilled)
        self.ledger.stages["distil"] = distilled
        self.ledger.stages["export"] = 0.0
        self.ledger.save()

    def _record(self, curve: list[dict[str, Any]], distilled: float) -> dict[str, Any]:
        """The report's section on training."""
        facts, stages = self.ledger.facts, self.ledger.stages
        calibrated = {"seconds": stages["calibrate"], "tokens": facts.get("calibration_tokens", 0)}
        steps = curve[-1]["step"] if curve else 0
        tokens = steps * self.options.batch_size * self.options.accumulate * self.length
        return {
            "minutes": self.options.minutes,
            "precision": facts["dtype"],
            "phases": [
                {"name": "nearest", "seconds": 0.0, "tokens": 0, "detail": "ggml's own rounding"},
                *(
                    [{"name": "calibrated", **calibrated, "detail": "scale search and error compensation"}]
                    if self.options.start == "calibrated"
                    else []
                ),
                {"name": "distilled", "seconds": distilled, "tokens": tokens, "detail": f"{steps} steps"},
            ],
            "stages": dict(stages),
            "curve": curve,
            "data": facts["data"] | self._used(),
        }

    def _used(self) -> dict[str, int]:
        """Tokens of what was trained on and looked at; not all that was gathered, where time was short."""
        gathered = self.ledger.facts["data"]
        n_sampled, n_text = gathered["sampled_tokens"] // self.length, gathered["text_tokens"] // self.length
        rows = self._order(n_sampled + n_text)[: len(self.sequences)]
        sampled, whole = int((rows < n_sampled).sum()) * self.length, int(self.sequences.size)
        return {"sampled_tokens": sampled, "text_tokens": whole - sampled, "unique_tokens": whole}


def _telling(bar: console.Progress) -> Callable[[int], bool]:
    def tell(done: int) -> bool:
        bar.update(done)
        return True

    return tell


def choose_parameters(model: Any, train: str, names: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """Marks what is trained of a prepared model, and gives it: the low-bit matrices ``names`` and the norms ("full"),
    or the scales alone ("scales"). Embeddings stay.
    """
    low_bit = {f"{path}.parametrizations.{kind}" for path, _, kind in (name.rpartition(".") for name in names)}
    chosen = []
    for name, parameter in model.named_parameters():
        inside, _, last = name.rpartition(".")
        if last == "scales":
            wanted = train == "scales" and inside.removesuffix(".0") in low_bit
        elif last.startswith("original"):
            wanted = train == "full" and inside in low_bit
        else:
            wanted = train == "full" and parameter.ndim == 1
        parameter.requires_grad_(wanted)
        if wanted:
            chosen.append(parameter)
    return chosen


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")
