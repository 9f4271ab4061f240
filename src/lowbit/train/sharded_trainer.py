"""Distillation by several processes: the same step, each process with its share of the step's sequences.

``--batch-size`` times ``--accumulate`` is a step's sequences, whatever the number of processes; so the same command
gives the same steps on one machine and on eight.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from lowbit.errors import BadOption
from lowbit.train import sharded_checkpoint, sharded_model
from lowbit.train.fake_quant import master, quantized
from lowbit.train.loop import DistillationTrainer, Schedule, SequenceOrder
from lowbit.train.options import TrainOptions
from lowbit.train.storage import writing
from lowbit.train.world import World


def check_divisible(options: TrainOptions, processes: int) -> None:
    """Raises BadOption where a step's sequences cannot be shared out equally."""
    together = options.batch_size * options.accumulate
    if together % processes:
        unit = math.lcm(options.batch_size, processes) // options.batch_size
        enough = -(-options.accumulate // unit) * unit
        hint = f"Try --batch-size {options.batch_size} --accumulate {enough}"
        found = f"{together} sequences a step (batch size {options.batch_size} x accumulate {options.accumulate})"
        raise BadOption(f"{processes} processes cannot share a step's sequences", found=found, hint=hint)


def share_of(options: TrainOptions, processes: int) -> TrainOptions:
    """One process's part of a step: as many sequences at a time as it may, and all passes of one size."""
    own = options.batch_size * options.accumulate // processes
    at_once = next(n for n in range(min(own, options.batch_size), 0, -1) if own % n == 0)
    return dataclasses.replace(options, batch_size=at_once, accumulate=own // at_once)


class SharedSchedule(Schedule):
    """A schedule by process 0's clock, which all read once a step."""

    def __init__(self, options: TrainOptions, seconds: float, spent: float, world: World) -> None:
        super().__init__(options, seconds, spent)
        self._world, self._now = world, spent

    def read_clock(self) -> None:
        self._now = self._world.share(super().elapsed())

    def elapsed(self) -> float:
        return self._now

    def agree(self, seconds: float) -> float:
        return self._world.share(seconds)


class ShareOfOrder(IterableDataset):  # type: ignore[type-arg]
    """This process's part of each step of a SequenceOrder."""

    def __init__(self, order: SequenceOrder, step: int, world: World) -> None:
        self.order, self.step, self.world = order, step, world

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        each = self.step // self.world.size
        begin = self.world.rank * each
        rows = iter(self.order)
        while True:
            yield from list(itertools.islice(rows, self.step))[begin : begin + each]


class ShardedTrainer(DistillationTrainer):
    """Trains a model of ``sharded_model.build``."""

    schedule: SharedSchedule

    def __init__(self, model: Any, *, options: TrainOptions, world: World, **more: Any) -> None:
        self.world = world
        self._step_size = options.batch_size * options.accumulate
        super().__init__(model, options=share_of(options, world.size), **more)
        # The model places itself and reduces its gradients; transformers' word for such a one.
        self.is_distributed_loading_by_transformers = True

    def _order(self, sequences: np.ndarray) -> ShareOfOrder:
        return ShareOfOrder(SequenceOrder(sequences, self.options.seed), self._step_size, self.world)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def _mean_size(self, parameter: torch.Tensor) -> float:
        own = torch.tensor([float(parameter.detach().abs().sum()), parameter.numel()], dtype=torch.float64)
        total, n = self.world.total(own.to(self.args.device)).tolist()
        return float(total / n)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Nothing: plain parameters here are the scales of a process's own rows, not copies of one another."""

    def _step_loss(self, losses: torch.Tensor) -> float:
        return float(self.world.total(losses.mean())) / self.world.size

    def _unseen_klds(self, model: Any) -> list[float]:
        """Each process looks at its share of the rows; the last ones again where they do not come out even."""
        n, size = len(self._unseen), self.world.size
        klds = torch.zeros(n, dtype=torch.float64, device=self.args.device)
        for first in range(0, n, size):
            place = first + self.world.rank
            kld = self._kld_of(model, *self._unseen[min(place, n - 1)])
            if place < n:
                klds[place] = kld
        sharded_model.reshard(model)
        return [float(kld) for kld in self.world.total(klds)]

    def _student_head(self, model: Any) -> torch.Tensor:
        if 0 in self._heads:
            return self._heads[0]
        weight = sharded_model.gathered_head(model)
        if sharded_model.head_parameter(model).requires_grad:
            return weight.to(self.dtype)
        self._heads[0] = weight.detach().to(self.dtype, copy=True)  # what was gathered is dropped again
        return self._heads[0]

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """The norm over all processes' rows; gradients of learned scales are made here, from those of their values."""
        self.schedule.read_clock()
        for name, module, quantizer in quantized(model):
            weight = master(module, name.rpartition(".")[2])
            if not quantizer.learned or weight.grad is None:
                continue
            rows, slope = (sharded_model.own_rows(part) for part in (weight, weight.grad))
            for part, gradient in zip(("scales", "mins"), quantizer.frame_gradients(rows, slope), strict=True):
                if gradient is not None and getattr(quantizer, part).requires_grad:
                    getattr(quantizer, part).grad = gradient
            if quantizer.train_what == "scales":
                weight.grad = None
        own = [sharded_model.own_rows(p.grad) for p in model.parameters() if p.grad is not None]
        squares = torch.stack([gradient.float().square().sum(dtype=torch.float64) for gradient in own]).sum()
        norm = self.world.total(squares).sqrt()
        factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for gradient in own:
            gradient.mul_(factor)
        return norm.float()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sharded_checkpoint.save(folder, model, self.optimizer)  # type: ignore[arg-type]
            if self.world.rank == 0:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        self.world.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        sharded_checkpoint.load_weights(Path(resume_from_checkpoint), self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            sharded_checkpoint.load_optimizer(Path(checkpoint), self, self.world)
