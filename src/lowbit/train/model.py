"""From a checkpoint to a Hugging Face model and back, codes and scales included."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, Tensor, write_checkpoint
from lowbit.checkpoint.model import ACTIVATIONS
from lowbit.errors import Unsupported
from lowbit.grid.base import Blocks, Grid
from lowbit.train import static_ranges
from lowbit.train.fake_quant import FakeQuantizer, chosen, master, quantized
from lowbit.train.storage import save_tensors


def load(checkpoint: Checkpoint) -> Any:
    """The transformers model (float32, evaluation mode) of an open checkpoint, GGUF or folder.

    Raises BadFile naming the tensor where a weight is NaN or Inf.
    """
    model = unfilled(checkpoint)
    parameters = weights(model, checkpoint)
    # One tensor at a time into the model, so that the weights are in memory once.
    with torch.no_grad():
        for name in checkpoint.names:
            values = checkpoint.read(name)
            grids.check_finite(values, f"{checkpoint.path}: {name}")
            parameters[name].copy_(torch.from_numpy(values))
    return model.eval()


def unfilled(checkpoint: Checkpoint, *, on_meta: bool = False) -> Any:
    """The checkpoint's model with weights that are not yet its own. Raises Unsupported where it has other tensors.

    on_meta: parameters have no memory; buffers have, and their values.
    """
    config = CONFIG_MAPPING[checkpoint.config["model_type"]](**checkpoint.config)
    config._attn_implementation = "sdpa"
    place = init_empty_weights(include_buffers=False) if on_meta else contextlib.nullcontext()
    with quiet_transformers(), place:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if on_meta:
        model.tie_weights()  # each parameter was replaced by one of its own
    differing = sorted(set(weights(model, checkpoint)) ^ set(checkpoint.names))
    if differing:
        found = f"{type(model).__name__} and the checkpoint disagree on it"
        raise Unsupported("not the tensors that transformers' model has", where=differing[0], found=found)
    return model


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
        notes["activations"] = {"kind": "static-int8", "file": ACTIVATIONS}
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


def weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's parameters (a tied head is not among them), and the buffers that the checkpoint has: Gemma 4's
    ``layer_scalar`` is one."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in checkpoint.specs}
    # The master of a weight that is wrapped for a further recipe alone has its own name in the first one's file.
    plain = {name.replace(".parametrizations", "").removesuffix(".original"): p for name, p in model.named_parameters()}
    return {**plain, **buffers}


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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Its progress bars and advice are not ours to show."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
