"""From a checkpoint to a Hugging Face model and back, codes and scales included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, Tensor, static_activations, write_checkpoint
from lowbit.checkpoint.model import ACTIVATIONS
from lowbit.grid.base import Blocks, Grid
from lowbit.run._hf_model import quiet_transformers, weights
from lowbit.train import static_ranges
from lowbit.train.fake_quant import FakeQuantizer, chosen, master, quantized
from lowbit.train.storage import save_tensors


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer of a checkpoint."""
    source = checkpoint.tokenizer_source
    with quiet_transformers():
        if source.is_dir():
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def save(model: nn.Module, folder: str | Path, *, like: Checkpoint, trained_for: dict[str, str] | None = None) -> Path:
    """Writes a prepared model as a checkpoint folder: its values, and the codes and scales they came from.

    like: the checkpoint that the model was loaded from; its config and tokenizer are carried over. ``lowbit pack`` then
    copies the codes and scales as they are. Scales of static activations lie beside them in activations.safetensors.
    trained_for: what of the runtime was simulated, for lowbit.json to say.
    """
    notes: dict[str, Any] = {"trained_for": trained_for} if trained_for else {}
    scales = static_ranges.state(model)
    if scales:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_tensors(scales, Path(folder) / ACTIVATIONS)
        notes["activations"] = {"kind": static_activations.KIND, "file": ACTIVATIONS}
    if chosen(model).n > 1:
        notes["also"] = _also(model, Path(folder))
    return write_checkpoint(folder, like, tensors(model, like), notes=notes)


def _also(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Writes the blocks of every further recipe, and gives what lowbit.json says of them."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for which, name in enumerate(chosen(model).names[1:], 1):
        found = {each: _quantized_tensor(each, m, q) for each, m, q in quantized(model, which)}
        # What only the first recipe rounds is a float here, and the folder's values are the rounded ones.
        found |= {each: _float_tensor(each, m) for each, m, _ in quantized(model) if each not in found}
        file = f"blocks-{name}.safetensors"
        save_tensors({each: torch.from_numpy(tensor.blocks) for each, tensor in found.items()}, folder / file)
        described[name] = {"file": file, "tensors": {each: {"grid": tensor.grid} for each, tensor in found.items()}}
    return described


def tensors(model: nn.Module, like: Checkpoint) -> Iterator[Tensor]:
    """Every tensor of ``like`` with the values that ``model`` computes with."""
    wrapped = {name: (module, quantizer) for name, module, quantizer in quantized(model)}
    plain = weights(model, like)
    for name in like.names:
        if name in wrapped:
            yield _quantized_tensor(name, *wrapped[name])
        else:
            yield Tensor(name=name, values=plain[name].detach().float().cpu().numpy())


def _quantized_tensor(name: str, module: nn.Module, quantizer: FakeQuantizer) -> Tensor:
    return on_grid(name, quantizer.grid, quantizer.blocks(master(module, name.rpartition(".")[2])))


def on_grid(name: str, grid: Grid, blocks: Blocks) -> Tensor:
    """A tensor to write, from its codes and scales."""
    stored = Blocks(**{field.name: _numpy(getattr(blocks, field.name)) for field in dataclasses.fields(blocks)})
    packed = grid.pack(stored)
    rows = packed.reshape(-1, packed.shape[-1])  # experts' matrices one below the other
    return Tensor(name=name, values=grid.dequantize(stored), grid=grid.name, blocks=rows)


def _float_tensor(name: str, module: nn.Module) -> Tensor:
    grid, values = grids.get("f32"), _numpy(master(module, name.rpartition(".")[2]).detach().float())
    return Tensor(name=name, values=values, grid=grid.name, blocks=grid.pack(grid.quantize(values)))


def _numpy(x: torch.Tensor | None) -> Any:
    return None if x is None else x.cpu().numpy()
