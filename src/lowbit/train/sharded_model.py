"""A model over several processes: each holds some rows of every weight, of its gradient and of the optimizer's state.

FSDP2 (torch.distributed.fsdp.fully_shard) gathers a decoder layer when it computes and drops it again. No process ever
holds the whole model: it is made without memory, sharded, and filled from the checkpoint a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrize

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, Tensor, write_checkpoint
from lowbit.grid.base import Blocks
from lowbit.run._hf_model import unfilled, weights
from lowbit.train.fake_quant import FakeQuantizer, assignment, master, quantized, read_from, retie
from lowbit.train.model import on_grid
from lowbit.train.rounded_shard import RoundedShard
from lowbit.train.trainable import choose_parameters
from lowbit.train.world import World


def build(
    checkpoint: Checkpoint, recipe: str, *, train: str, trained: tuple[str, ...], world: World, dtype: torch.dtype
) -> Any:
    """The checkpoint's model in evaluation mode, sharded over ``world``, with fake quantizers that are still off.

    dtype: of the matrix products, which is what is gathered of the matrices that ``recipe`` puts on a grid.
    trained: their names, of those that training moves. Raises as ``load`` does.
    """
    model = unfilled(checkpoint, on_meta=True)
    _wrap(model, recipe, train, dtype)
    choose_parameters(model, train, trained)
    ask_for_gradients(model, trained)
    _shard(model, world, dtype)
    _materialize(model, world.device)
    _fill(model, checkpoint, world)
    return model.eval()


def ask_for_gradients(model: nn.Module, trained: Iterable[str]) -> None:
    """Of the values of all matrices that are trained: the gradients of learned scales are made from them."""
    for name in trained:
        path, _, attribute = name.rpartition(".")
        master(model.get_submodule(path), attribute).requires_grad_(True)


def _wrap(model: nn.Module, recipe: str, train: str, dtype: torch.dtype) -> None:
    """``prepare`` for weights that are not there yet, and that each process will round its own rows of."""
    for name, grid in assignment(model, recipe).items():
        if grid.name == "f32":
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        quantizer = FakeQuantizer(grid, None, train=train)
        quantizer.is_lookup, quantizer.in_shards = isinstance(module, nn.Embedding), True
        parametrize.register_parametrization(module, attribute, quantizer, unsafe=True)
    retie(model)
    for _, module, quantizer in quantized(model):
        for chain in module.parametrizations.values():  # type: ignore[union-attr, operator]
            if chain[0] is quantizer:
                gathered = torch.float32 if quantizer.is_lookup else dtype
                chain.original = nn.Parameter(RoundedShard(chain.original.detach(), quantizer, gathered))


def _shard(model: Any, world: World, dtype: torch.dtype) -> None:
    """Units that are gathered together: each decoder layer, large embeddings, a head of its own, and the rest.

    The rest (the last norm, and an embedding that is also the head) stays whole from the forward to the backward pass,
    for the loss reads the head between them.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(world.device.type, (world.size,))
    more: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    body, head, embedding = model.model, model.get_output_embeddings(), model.get_input_embeddings()
    for layer in body.layers:
        if dtype != torch.float32 and (vectors := _of_vectors(layer)):
            fully_shard(vectors, reshard_after_forward=False, **more)  # gradients of one unit are of one dtype
        fully_shard(layer, reshard_after_forward=True, **more)
    if (plain := embedding._parameters.get("weight")) is not None and plain is head._parameters.get("weight"):
        read_from(head, embedding)
    is_tied = hasattr(head, "_tied_to")
    for module in body.modules():
        if isinstance(module, nn.Embedding) and not (is_tied and module is embedding):
            fully_shard(module, reshard_after_forward=True, **more)
    fully_shard(body, **more)
    if not is_tied:
        head.give_weight = lambda: head.weight.view_as(head.weight)
        fully_shard(head, reshard_after_forward=False, **more)
        register_fsdp_forward_method(head, "give_weight")


def _of_vectors(layer: nn.Module) -> list[nn.Module]:
    """The norms of a layer: modules whose own parameters are vectors that are trained."""
    return [
        module for module in layer.modules()
        if (own := list(module.parameters(recurse=False))) and all(p.ndim == 1 and p.requires_grad for p in own)
    ]  # fmt: skip


def _materialize(model: Any, device: torch.device) -> None:
    """Memory for what this process holds. Buffers (rotary frequencies, scalars) have their values already."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def _fill(model: Any, checkpoint: Checkpoint, world: World) -> None:
    """Each process takes its rows of every tensor; one tensor is in memory at a time."""
    wrapped = {name: master(module, name.rpartition(".")[2]) for name, module, _ in quantized(model)}
    parameters = weights(model, checkpoint) | wrapped
    for name in checkpoint.names:
        values = checkpoint.read(name)
        grids.check_finite(values, f"{checkpoint.path}: {name}")
        own_rows(parameters[name]).copy_(torch.from_numpy(values[own_part(parameters[name], world)]))


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The plain rows that this process holds of a parameter, on the same memory; all of what is not sharded."""
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.rows if isinstance(local, RoundedShard) else local.detach()


def own_part(tensor: torch.Tensor, world: World) -> slice:
    """Which rows those are."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    each = -(-tensor.shape[0] // world.size)
    return slice(min(tensor.shape[0], world.rank * each), min(tensor.shape[0], (world.rank + 1) * each))


def as_sharded(rows: torch.Tensor, of: DTensor) -> DTensor:
    """What each process has of something with as many rows as the parameter ``of``, as one tensor."""
    shape = torch.Size((of.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, of.device_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def whole(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """The same, gathered into every process."""
    return as_sharded(rows, of).full_tensor() if isinstance(of, DTensor) else rows


def reshard(model: nn.Module) -> None:
    """Drops what is gathered still: after a pass without gradients, whose end nothing else marks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def head_parameter(model: Any) -> torch.Tensor:
    """What this process holds of the output head: of its own, or of the embedding that serves as one."""
    head = model.get_output_embeddings()
    module = head._tied_to[0] if hasattr(head, "_tied_to") else head
    return master(module) if parametrize.is_parametrized(module) else module.weight  # type: ignore[no-any-return]


def gathered_head(model: Any) -> torch.Tensor:
    """The whole output head as it is computed with, between a forward pass and the next."""
    head = model.get_output_embeddings()
    return head.give_weight() if hasattr(head, "give_weight") else head.weight  # type: ignore[no-any-return]


def save(model: nn.Module, folder: Path, like: Checkpoint, world: World) -> None:
    """``lowbit.train.save`` of a sharded model: process 0 writes, a tensor at a time is gathered for it."""
    each = _tensors(model, like)
    if world.rank == 0:
        write_checkpoint(folder, like, each)
    for _ in each:  # joins the gathering
        pass
    world.wait()


@torch.no_grad()
def _tensors(model: nn.Module, like: Checkpoint) -> Iterator[Tensor]:
    wrapped = {name: (module, quantizer) for name, module, quantizer in quantized(model)}
    plain = weights(model, like)
    for name in like.names:
        if name not in wrapped:
            values = whole(own_rows(plain[name]), plain[name])
            yield Tensor(name=name, values=values.float().cpu().numpy())
            continue
        module, quantizer = wrapped[name]
        weight = master(module, name.rpartition(".")[2])
        own = vars(quantizer.blocks(own_rows(weight)))
        blocks = Blocks(**{field: None if part is None else whole(part, weight) for field, part in own.items()})
        yield on_grid(name, quantizer.grid, blocks)
