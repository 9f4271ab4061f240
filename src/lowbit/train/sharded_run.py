"""A training run by several processes: each step of ``Run``, with what they share and what one does for all.

Process 0 alone writes the run's files; the others read them, so the folder must be one that all can see. It also
calibrates, on a copy of the whole model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.model import MANIFEST
from lowbit.errors import Unsupported
from lowbit.run._hf_model import load
from lowbit.train import data, frames, sharded_model
from lowbit.train.fake_quant import master, quantized
from lowbit.train.pipeline import Run
from lowbit.train.precision import autocast
from lowbit.train.reference import ReferenceCache
from lowbit.train.sharded_trainer import ShardedTrainer, SharedSchedule, check_divisible


class ShardedRun(Run):
    _alone = False  # while process 0 does what the others wait for

    def load(self, start: float) -> None:
        check_divisible(self.options, self.world.size)
        hint = "Train with one process, or without that option"
        if len(self.recipes) > 1:
            raise Unsupported("several processes train for one recipe", found=self.options.recipe, hint=hint)
        if self.options.activations != "float":
            found = self.options.activations
            raise Unsupported("several processes train with no rounded activations", found=found, hint=hint)
        if self.options.kv is not None:
            raise Unsupported("several processes do not train for a KV cache", found=self.options.kv, hint=hint)
        super().load(start)

    def _load(self) -> Any:
        names = self._trained()
        return sharded_model.build(
            self.checkpoint, self.options.recipe, train=self.options.train, trained=names, world=self.world,
            dtype=self.dtype,
        )  # fmt: skip

    def _own_head(self) -> torch.Tensor:
        weight = sharded_model.head_parameter(self.model)
        whole = sharded_model.whole(sharded_model.own_rows(weight), weight)
        return whole.to(self.dtype, copy=True)

    def _writer(self) -> Any:
        return self.model  # its matrices are gathered in the products' dtype

    def _write_some(self, writer: Any, seconds: float, seed: int) -> np.ndarray:
        """Each process writes with a seed of its own; all of it, to all."""
        own = (seed * self.world.size + self.world.rank) % (1 << 32)
        with autocast(self.device, self.dtype):
            rows = data.sample(writer, self.tokenizer, self.length, seconds, own, agree=self.world.share)
        sharded_model.reshard(self.model)
        written = self.world.collect({"rows": torch.from_numpy(rows)})
        return np.concatenate(self.world.share([part["rows"].numpy() for part in written if part]))

    def _keep(self, path: Path, values: np.ndarray) -> None:
        self.world.first(lambda: super(ShardedRun, self)._keep(path, values))

    def _open_cache(self, n: int, keeps: bool = True) -> ReferenceCache:
        keeps = self.world.rank == 0
        cache = super()._open_cache(n, keeps) if keeps else None  # the files are there before the others look
        self.world.wait()
        return cache or super()._open_cache(n, keeps)

    def left(self, start: float) -> float:
        return super().left(start) if self._alone else self.world.share(super().left(start))

    def _calibrated(self, start: float) -> dict[str, torch.Tensor]:
        """By process 0, on a copy of the whole model, so that the start is what one process alone would have."""
        found: dict[str, torch.Tensor] = {}
        if self.world.rank == 0:
            sharded, self._alone = self.model, True
            self.model = load(self.checkpoint).to(self.device)
            try:
                found = super()._calibrated(start)
            finally:
                self.model, self._alone = sharded, False
        self.ledger.facts = self.world.share(self.ledger.facts)
        return found

    def _keep_start(self, found: dict[str, torch.Tensor]) -> None:
        self.world.first(lambda: super(ShardedRun, self)._keep_start(found))

    @torch.no_grad()
    def _prepare(self, path: Path) -> None:
        """Each process takes its rows of the start, and rounds by them from here on."""
        sharded_model.reshard(self.model)
        with safe_open(path, framework="pt") as start:
            parts: dict[str, list[str]] = {}
            for key in start.keys():  # noqa: SIM118 (no mapping)
                parts.setdefault(key.partition(":")[2], []).append(key)
            for name, module, quantizer in quantized(self.model):
                weight = master(module, name.rpartition(".")[2])
                own = sharded_model.own_part(weight, self.world)
                found = {key: start.get_slice(key)[own] for key in parts.get(name, ())}
                rows = sharded_model.own_rows(weight)
                if (moved := found.get(f"weight:{name}")) is not None:
                    rows.copy_(moved)
                quantizer.start(rows, frames.from_tensors(found, self.device).get(name))
        if not self.world.share((self.work / "start" / MANIFEST).exists()):
            self._save(self.work / "start", self.checkpoint, self.options.trained_for)
        self.world.wait()

    def _trainer(self, seconds: float, spent: float) -> ShardedTrainer:
        sharded_model.ask_for_gradients(self.model, self._trained())
        schedule = SharedSchedule(self.options, seconds, spent, self.world)
        return ShardedTrainer(self.model, schedule=schedule, world=self.world, **self._for_trainer())

    def _diverged(self, trained: Sequence[torch.Tensor]) -> bool:
        own = [sharded_model.own_rows(parameter) for parameter in trained]
        worst = torch.tensor(float(super()._diverged(own)), device=self.device)
        return bool(self.world.total(worst) > 0)

    def _save(self, folder: Path, like: Checkpoint, trained_for: dict[str, str] | None = None) -> None:
        sharded_model.save(self.model, folder, like, self.world)
