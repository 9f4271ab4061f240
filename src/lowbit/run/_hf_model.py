"""A checkpoint, folder or GGUF, as a model of transformers, its tensors read by lowbit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.errors import Unsupported


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
    place = init_empty_weights(include_buffers=False) if on_meta else no_init_weights()
    with quiet_transformers(), place:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # which is otherwise done where weights are drawn
    differing = sorted(set(weights(model, checkpoint)) ^ set(checkpoint.names))
    if differing:
        found = f"{type(model).__name__} and the checkpoint disagree on it"
        raise Unsupported("not the tensors that transformers' model has", where=differing[0], found=found)
    return model


def weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The model's parameters (a tied head is not among them), and the buffers that the checkpoint has: Gemma 4's
    ``layer_scalar`` is one."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in checkpoint.specs}
    # The master of a weight that is wrapped for a further recipe alone has its own name in the first one's file.
    plain = {name.replace(".parametrizations", "").removesuffix(".original"): p for name, p in model.named_parameters()}
    return {**plain, **buffers}


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
