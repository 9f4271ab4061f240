"""Checkpoints of a training over several processes: each writes the rows that it holds, any number reads them again.

torch.distributed.checkpoint in safetensors files (its pickled form is not used). What is in them are the trained
parameters under their names and AdamW's two moments beside them. A world of another size takes the rows that are then
its own; so does one process alone, and processes that are several take up what one alone had saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from lowbit.train.fake_quant import master, quantized
from lowbit.train.sharded_model import as_sharded, own_part, own_rows
from lowbit.train.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SHARDS = "sharded"  # the folder of the shards' files in a checkpoint's folder
_OPTIMIZER = "optimizer.pt"  # of transformers' Trainer, where one process trained alone


def is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / _SHARDS).is_dir()


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every process of a sharded model calls; raises what writing raises."""
    held: dict[str, torch.Tensor] = {}
    for name, parameter, like in _trained(model):
        held[name] = _sharded(own_rows(parameter), like)
        for moment in _MOMENTS:
            if (value := optimizer.state.get(parameter, {}).get(moment)) is not None:
                held[f"{moment}.{name}"] = _sharded(own_rows(value), like)
    writer = dcp.HuggingFaceStorageWriter(str(checkpoint / _SHARDS), save_distributed=True)
    dcp.save(held, storage_writer=writer)


@torch.no_grad()
def load_weights(checkpoint: Path, trainer: Any) -> None:
    """The trained parameters, from shards or from the file that one process alone wrote."""
    source = checkpoint / _SHARDS if is_sharded(checkpoint) else checkpoint
    _read(source, {name: (own_rows(parameter), like) for name, parameter, like in _trained(trainer.model)})


@torch.no_grad()
def load_optimizer(checkpoint: Path, trainer: Any, world: World) -> None:
    """AdamW's moments and the learning rate, as they were after the trainer's ``state.global_step`` steps.

    trainer: a transformers Trainer on a prepared model, before its first step.
    """
    step = trainer.state.global_step
    alone = None if is_sharded(checkpoint) else _of_one_process(checkpoint, trainer)
    wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, parameter, like in _trained(trainer.model):
        state: dict[str, torch.Tensor] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in _MOMENTS:
            rows = torch.zeros_like(own_rows(parameter))
            if alone is not None:
                rows.copy_(alone[name][moment][own_part(like, world)])
            wanted[f"{moment}.{name}"] = (rows, like)
            state[moment] = as_sharded(rows, parameter) if isinstance(parameter, DTensor) else rows
        trainer.optimizer.state[parameter] = state
    if alone is None:
        _read(checkpoint / _SHARDS, wanted)
    scheduler = trainer.lr_scheduler
    scheduler.last_epoch = step
    scheduler._last_lr = [
        base * scale(step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(trainer.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Of all that the optimizer moves: name, parameter, and the sharded parameter whose rows its rows go with."""
    parameters = dict(model.named_parameters())
    # A master whose codes are fixed has a gradient over several processes, but only for its scales' sake.
    fixed = {id(master(module)) for _, module, quantizer in quantized(model) if quantizer.train_what == "scales"}
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) not in fixed:
            inside, _, last = name.rpartition(".0.")
            yield name, parameter, parameters[f"{inside}.original"] if last in ("scales", "mins") else parameter


def _sharded(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return as_sharded(rows.contiguous(), like) if isinstance(like, DTensor) else rows


def _read(folder: Path, wanted: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Fills this process's rows in place."""
    state = {name: _sharded(rows, like) for name, (rows, like) in wanted.items()}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
        dcp.load(state, storage_reader=reader, no_dist=alone)


def _of_one_process(checkpoint: Path, trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What transformers' Trainer saved of AdamW: by the place of each parameter in its groups."""
    saved = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    places = [place for group in saved["param_groups"] for place in group["params"]]
    moved = {id(parameter): name for name, parameter, _ in _trained(trainer.model)}
    held = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
    names = [moved[id(parameter)] for parameter in held if id(parameter) in moved]
    return {name: saved["state"][place] for name, place in zip(names, places, strict=True)}
