"""lowbit's own loop: a Hugging Face Trainer with the distillation loss, a schedule by the clock, small checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from lowbit import console
from lowbit.files import write_json
from lowbit.run._hf_model import quiet_transformers
from lowbit.train import sharded_checkpoint, static_ranges
from lowbit.train.fake_quant import FakeQuantizer, chosen
from lowbit.train.kv_quant import KvQuantizer, simulated
from lowbit.train.loss import distillation_loss, softcap
from lowbit.train.options import TrainOptions
from lowbit.train.precision import autocast
from lowbit.train.reference import Kept
from lowbit.train.storage import save_tensors, writing
from lowbit.train.world import ALONE
from lowbit.units import format_duration

_LOWEST = 0.01  # of the peak learning rate, where the cosine ends
# Of scales that move with their weights, in parts of their mean magnitude: of rows, of blocks, which hear of few
# weights and mostly noise (dev/LOG.md), and of activations.
_ROW_RATE, _BLOCK_RATE, _RANGE_RATE = 1e-4, 3e-5, 1e-3
_SMALLEST_SCALE = 1e-8
_WEIGHTS = "trained.safetensors"
_START = "start_kld"
_WHOLE = "whole"  # marks a checkpoint folder that was written to its end
_SAVE_EVERY = 60.0  # seconds between checkpoints, at least
_LOOK_EVERY = 0.05  # of the schedule between two looks at the held-out rows, at least
_LOOK_SHARE = 0.02  # of the time that looking may take
_STEPS_WITHOUT_LIMIT = 10_000_000


class Schedule:
    """How far distillation has come, by the clock or by steps, and the learning rate that follows from it.

    seconds: what distillation may take, all its processes together; spent: what earlier ones took.
    """

    def __init__(self, options: TrainOptions, seconds: float, spent: float) -> None:
        self.options, self.seconds, self.spent = options, seconds, spent
        self._start = time.monotonic()
        self.step = 0

    def agree(self, seconds: float) -> float:
        """Seconds that this process measured, as all processes are to count them; one alone counts its own."""
        return seconds

    def elapsed(self) -> float:
        return self.spent + time.monotonic() - self._start

    def fraction(self) -> float:
        if self.options.steps is not None:
            return min(1.0, self.step / self.options.steps)
        return min(1.0, self.elapsed() / self.seconds) if self.seconds > 0 else 1.0

    def factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        self.step = step
        warm = min(1.0, (step + 1) / max(1, self.options.warmup_steps))
        return warm * (_LOWEST + (1 - _LOWEST) * 0.5 * (1 + math.cos(math.pi * self.fraction())))

    def time_left(self) -> float:
        fraction = self.fraction()
        if self.options.steps is None:
            return max(0.0, self.seconds - self.elapsed())
        return self.elapsed() * (1 - fraction) / fraction if fraction else 0.0


class SequenceOrder(IterableDataset):  # type: ignore[type-arg]
    """Sequences in a seeded random order, every one once before any comes again; endless.

    Trainer skips what a resumed run has seen already.
    """

    def __init__(self, sequences: np.ndarray, seed: int) -> None:
        self.sequences, self.seed = sequences, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = np.random.default_rng(self.seed)
        while True:
            for row in order.permutation(len(self.sequences)):
                tokens = torch.from_numpy(self.sequences[row].astype(np.int64))
                yield {"input_ids": tokens, "row": torch.tensor(int(row))}


class DistillationTrainer(Trainer):
    """Trains a prepared model towards what is kept of the reference. Saves what it trains, not what can be made again.

    The last ``held_out`` rows of the sequences are never trained on: the KLD on them is that of unseen text.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        options: TrainOptions,
        sequences: np.ndarray,
        cache: Kept,
        reference_head: torch.Tensor | None,
        dtype: torch.dtype,
        schedule: Schedule,
        folder: Path,
        held_out: int = 0,
        kv: KvQuantizer | None = None,
    ) -> None:
        self.options, self.cache, self.dtype, self.schedule = options, cache, dtype, schedule
        self.reference_head, self.kv = reference_head, kv
        seen = len(sequences) - held_out
        self._unseen = [(row, sequences[row]) for row in range(seen, len(sequences))]
        self._heads: dict[int, torch.Tensor] = {}  # by recipe
        self._passes = 0
        self._losses: list[torch.Tensor] = []  # of the step under way, one a forward pass
        self.recent: float | None = None
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            max_steps=options.steps or _STEPS_WITHOUT_LIMIT,
            learning_rate=options.peak_learning_rate,
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=options.clip,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
            seed=options.seed,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # Trainer would copy the model to every GPU
        super().__init__(model, arguments, train_dataset=self._order(sequences[:seen]))
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Clock(self))

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        turn = chosen(model)
        with turn.use(self._passes % turn.n):  # files that share weights take turns
            loss = self._divergence(model, inputs["input_ids"], inputs["row"])
        self._passes += 1
        self._losses.append(loss.detach())
        return loss

    def _order(self, sequences: np.ndarray) -> IterableDataset[Any]:
        return SequenceOrder(sequences, self.options.seed)

    @property
    def start_kld(self) -> float | None:
        """The KLD on unseen text before the first step, also of a run that went on; None where there is none."""
        return next((entry[_START] for entry in self.state.log_history if _START in entry), None)

    def note_step(self) -> None:
        """Takes the loss of the step that just ended into the recent ones' mean."""
        value = self._step_loss(torch.stack(self._losses))
        self._losses.clear()
        self.recent = value if self.recent is None else 0.9 * self.recent + 0.1 * value

    def _step_loss(self, losses: torch.Tensor) -> float:
        """The mean over a step's forward passes (n,)."""
        return float(losses.mean())

    def _divergence(self, model: Any, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Mean KL(reference || student) over tokens (B, T), which are the cache's ``rows`` (B)."""
        with autocast(tokens.device, self.dtype), simulated(self.model, self.kv):
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        targets = self.cache.targets(rows, self.reference_head, tokens.device)
        return distillation_loss(hidden.flatten(0, 1).float(), self._student_head(model), targets, softcap(model))

    @torch.no_grad()
    def unseen_kld(self) -> float | None:
        """KLD in nats a token on the rows that are never trained on; None where there are none."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        found, turn = [], chosen(model)
        for which in range(turn.n):
            with turn.use(which):
                found += self._unseen_klds(model)
        model.train(was_training)
        return sum(found) / len(found) if found else None

    def _unseen_klds(self, model: Any) -> list[float]:
        return [self._kld_of(model, row, tokens) for row, tokens in self._unseen]

    def _kld_of(self, model: Any, row: int, tokens: np.ndarray) -> float:
        batch = torch.from_numpy(tokens.astype(np.int64))[None].to(self.args.device)
        return float(self._divergence(model, batch, torch.tensor([row])))

    def _student_head(self, model: Any) -> torch.Tensor:
        """The output head as the file will hold it, in the products' dtype; made once if it does not move."""
        turn = chosen(model).index
        if turn in self._heads:
            return self._heads[turn]
        weight: torch.Tensor = model.get_output_embeddings().weight
        head = weight.to(self.dtype)
        if torch.is_grad_enabled() and not weight.requires_grad:  # without gradients a head that moves says so too
            self._heads[turn] = head
        return head

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Weights at the learning rate; each weight's scales in parts of their own magnitude, which differ widely."""
        if self.optimizer is None:
            rest: dict[str, Any] = {"params": [], "weight_decay": self.args.weight_decay}
            groups = [rest]
            rates = self._scale_rates()
            for name, parameter in self._parameters():
                rate = rates.get(name)
                if parameter.requires_grad and rate:
                    size = max(self._mean_size(parameter), _SMALLEST_SCALE)
                    groups.append({**rest, "params": [parameter], "lr": rate * size})
                elif parameter.requires_grad:
                    rest["params"].append(parameter)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **settings)
        return self.optimizer  # type: ignore[no-any-return]

    def _scale_rates(self) -> dict[str, float]:
        """The rates of scales, in parts of their magnitude, by name; what is not there goes by the learning rate."""
        found, asked = {}, self.options.scale_rate
        assert self.model is not None
        for path, module in self.model.named_modules():
            if isinstance(module, static_ranges.StaticRange):
                found[f"{path}.{static_ranges.PARAMETER}"] = asked or _RANGE_RATE
            elif isinstance(module, FakeQuantizer) and (asked or self.options.train == "both"):
                usual = _ROW_RATE if module.grid.whole_rows else _BLOCK_RATE
                found |= dict.fromkeys((f"{path}.scales", f"{path}.mins"), asked or usual)
        return found

    def _mean_size(self, parameter: torch.Tensor) -> float:
        return float(parameter.detach().abs().mean())

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.factor)  # type: ignore[arg-type]
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Only what is trained: rounding, norms and embedding that stay as they were are not written again."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._parameters() if p.requires_grad}
        save_tensors(trained, folder / _WEIGHTS)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self.model is not None
        return self.model.named_parameters()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(Path(self.args.output_dir or ".")):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = json.loads((Path(resume_from_checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        self._passes = state["global_step"] * self.options.accumulate
        if sharded_checkpoint.is_sharded(Path(resume_from_checkpoint)):
            sharded_checkpoint.load_weights(Path(resume_from_checkpoint), self)
            return
        saved = safetensors.torch.load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        parameters = dict(self._parameters())
        with torch.no_grad():
            for name, values in saved.items():
                parameters[name].copy_(values)

    def _init_training_state(self, *arguments: Any) -> Any:
        with quiet_transformers():  # it warns where another number of processes had saved
            return super()._init_training_state(*arguments)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and sharded_checkpoint.is_sharded(Path(checkpoint)):
            sharded_checkpoint.load_optimizer(Path(checkpoint), self, ALONE)
            return
        super()._load_optimizer_and_scheduler(checkpoint)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Stops at the end of the budget, saves now and then, keeps the curve and moves the progress bar."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self._saved = trainer.schedule.elapsed()
        self._noted = 0.0
        self._looked = (-1.0, 0.0, 0.0)  # fraction and seconds at the last look, and what it took
        self.kld: float | None = None
        self.bar = console.Progress()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            state.log_history.append({_START: self.trainer.unseen_kld()})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule = self.trainer.schedule
        self.trainer.note_step()
        # The scheduler has counted this step already; ask the clock at the step that just ended.
        schedule.step = state.global_step
        fraction, elapsed = schedule.fraction(), schedule.elapsed()
        kld = self._look(fraction, elapsed)
        if fraction >= min(self._noted, 1.0) or state.global_step <= 2 or kld is not None:
            self._noted = fraction + 0.01
            entry = {
                "step": state.global_step,
                "seconds": round(elapsed, 2),
                "loss": round(self.trainer.recent or 0.0, 5),
                "lr": self.trainer.lr_scheduler.get_last_lr()[0],  # type: ignore[union-attr]
            }
            state.log_history.append(entry if kld is None else {**entry, "kld": round(kld, 5)})
        unseen = "" if self.kld is None else f"KLD {self.kld:.4f} on unseen text, "
        note = f"loss {self.trainer.recent or 0:.4f}, {unseen}{format_duration(schedule.time_left())} left"
        self.bar.update(fraction, note)
        if fraction >= 1:
            control.should_training_stop = True
        elif elapsed - self._saved > max(_SAVE_EVERY, schedule.seconds / 20):
            control.should_save = True

    def _look(self, fraction: float, elapsed: float) -> float | None:
        """The KLD on unseen rows, where it is time to look again."""
        at, when, cost = self._looked
        if fraction < 1 and (fraction < at + _LOOK_EVERY or (elapsed - when) * _LOOK_SHARE < cost):
            return None
        begin = time.monotonic()
        kld = self.trainer.unseen_kld()
        self._looked = fraction, elapsed, self.trainer.schedule.agree(time.monotonic() - begin)
        self.kld = kld
        return kld

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = self.trainer.schedule.elapsed()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / _WHOLE, {"seconds": self._saved, "loss": self.trainer.recent})
        for older in folder.parent.glob("checkpoint-*"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)


def latest_checkpoint(folder: Path) -> tuple[Path, float] | None:
    """The newest whole checkpoint and the seconds of distillation behind it; broken ones are removed."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    whole = None
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        seconds = _seconds_behind(path)
        if whole is None and seconds is not None:
            whole = path, seconds
        else:
            shutil.rmtree(path, ignore_errors=True)
    return whole


def _seconds_behind(checkpoint: Path) -> float | None:
    """Seconds of distillation behind a checkpoint; None where it was not written to its end."""
    try:
        return float(_mark(checkpoint)["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(checkpoint: Path) -> dict[str, Any]:
    """What was noted when the checkpoint was whole."""
    found: dict[str, Any] = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8"))
    return found


def distil(
    make_trainer: Callable[[float], DistillationTrainer], checkpoint: tuple[Path, float] | None
) -> tuple[DistillationTrainer, list[dict[str, Any]]]:
    """Trains until the budget is spent, going on from the newest checkpoint. Gives the trainer and its curve, whose
    last entry has the KLD on unseen text.

    make_trainer: from the seconds that distillation has taken so far. checkpoint: as ``latest_checkpoint`` found it.
    """
    trainer = make_trainer(checkpoint[1] if checkpoint else 0.0)
    trainer.recent = _mark(checkpoint[0]).get("loss") if checkpoint else None
    with console.progress("Distilling", 1.0) as bar:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, _Clock):
                callback.bar = bar
        trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    return trainer, [entry for entry in trainer.state.log_history if "seconds" in entry and "loss" in entry]
