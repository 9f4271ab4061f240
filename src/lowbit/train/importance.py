"""What each weight does to the output: second moments of a matrix's inputs, each token weighted by the loss's slope.

The KLD that errors E of a matrix cause is, to second order, half of sum_t (g_t . E x_t)^2, x_t what flows in at token t
and g_t the gradient, at what flows out, of the loss of a label drawn from the model's own distribution (the Fisher
information; Martens 2020). With one weight a token, mean g_t^2, that is 1/2 tr(E H E^T), H = mean g_t^2 x_t x_t^T:
the loss that ``lowbit.pack.compensate`` makes small, in nats a token. Unweighted moments are what llama.cpp's imatrix
has a diagonal of; a few tokens with enormous activations decide them, and with them rounding gets worse (dev/LOG.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit import console
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.safetensors_file import write_files
from lowbit.train import data, precision
from lowbit.train.model import load, load_tokenizer

_POSITIONS = 128  # whose logits are held at once
_PASS_BYTES = 4 << 30  # of moments held in memory; a model with more is gone over once for every 4 GiB


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """sequences: of the text, ``sequence_length`` tokens each. minutes: after which the rest is left out, or None.
    precision: of the products, 'auto', 'float32' or 'bfloat16'."""

    sequences: int = 96
    sequence_length: int = 512
    minutes: float | None = None
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0


def collect(checkpoint: Checkpoint, out: Path, text: str | None, options: CollectOptions) -> int:
    """Writes the moments of every linear layer of ``checkpoint`` to ``out`` (see ``lowbit.pack.calibration``) and
    returns the number of tokens they are of.

    text: the user's data as ``lowbit train --data`` takes it; None is the text that comes with lowbit.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    n, length = options.sequences, options.sequence_length
    if text is None:
        sequences = data.bundled_sequences(tokenizer, length)[:n]
    else:
        sequences = data.load_sequences(text, tokenizer, length, n)
    rows = torch.from_numpy(sequences).long()
    linear = _linear_layers(model, checkpoint)
    passes = list(_passes(linear))
    tensors = [f"{name}.{part}" for name in linear for part in ("inputs", "outputs")]
    tensors += [f"{_head_name(checkpoint)}.{part}" for part in ("inputs", "outputs")]
    tensors += [f"{_EMBEDDING}.{part}" for part in ("lookups", "gradients")]
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    seen = 0

    def fill(writers: dict[str, Any]) -> None:
        nonlocal seen
        with console.progress("Collecting", len(passes) * len(rows), "sequences") as bar:
            for i, names in enumerate(passes):
                until = (
                    None if deadline is None else time.monotonic() + (deadline - time.monotonic()) / (len(passes) - i)
                )
                work = _Pass(model, {name: linear[name] for name in names}, checkpoint, options)
                seen = work.run(rows, until, lambda: bar.advance(1))
                for name, values in work.results(last=i == len(passes) - 1):
                    writers["moments"].add(name, values, "F32")

    write_files({"moments": out}, tensors, fill)
    return seen


_EMBEDDING = "model.embed_tokens.weight"


def _head_name(checkpoint: Checkpoint) -> str:
    return next((name for name in checkpoint.names if checkpoint.info(name).role == "output"), _EMBEDDING)


def _linear_layers(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    found = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: m for name, m in found.items() if m is not head and name in checkpoint.specs}


def _passes(linear: dict[str, nn.Linear]) -> Iterator[list[str]]:
    """Names in order of execution, as many at a time as there is room for their moments."""
    names: list[str] = []
    room = _PASS_BYTES
    for name, module in linear.items():
        size = 4 * module.in_features**2
        if names and size > room:
            yield names
            names, room = [], _PASS_BYTES
        names.append(name)
        room -= size
    if names:
        yield names


class _Pass:
    """One pass over the text for some of the layers."""

    def __init__(
        self, model: Any, linear: dict[str, nn.Linear], checkpoint: Checkpoint, options: CollectOptions
    ) -> None:
        self.model, self.linear, self.checkpoint = model, linear, checkpoint
        device = next(model.parameters()).device
        self.dtype = precision.choose(options.precision, device, model.config.get_text_config().hidden_size)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(options.seed)
        self.inputs = {name: torch.zeros(m.in_features, m.in_features) for name, m in linear.items()}
        self.outputs = {name: torch.zeros(m.out_features) for name, m in linear.items()}
        head = model.get_output_embeddings().weight
        self.head_inputs, self.head_outputs = torch.zeros(head.shape[1], head.shape[1]), torch.zeros(head.shape[0])
        embedding = model.get_input_embeddings().weight
        self.lookups, self.gradients = torch.zeros(embedding.shape[0]), torch.zeros(embedding.shape[1])
        self.tokens = 0
        self._flowing: dict[str, torch.Tensor] = {}

    def run(self, rows: torch.Tensor, until: float | None, advance: Callable[[], None]) -> int:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        handles = [embedding.register_forward_hook(self._embedded)]
        handles += [m.register_forward_hook(self._hook(name)) for name, m in self.linear.items()]
        try:
            for row in rows:
                if self.tokens and until is not None and time.monotonic() > until:
                    break
                self._one(row[None].to(self.device))
                advance()
        finally:
            for handle in handles:
                handle.remove()
        return self.tokens

    def _one(self, row: torch.Tensor) -> None:
        with precision.autocast(self.device, self.dtype):
            hidden = self.model.model(row, use_cache=False).last_hidden_state
            slope = self._slope(hidden.detach()[0].float())
        hidden.backward(slope[None].to(hidden.dtype))
        assert self._leaf.grad is not None
        gradient = self._leaf.grad[0].float()  # (tokens, width)
        self.gradients += gradient.square().sum(0).cpu()
        self.lookups += torch.bincount(row[0].cpu(), minlength=len(self.lookups)).float()
        self.tokens += row.shape[1]

    def _slope(self, hidden: torch.Tensor) -> torch.Tensor:
        """The gradient at the final hidden states (tokens, width) of labels that are drawn; the head's own moments."""
        head = self.model.get_output_embeddings().weight
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        slope = torch.empty_like(hidden)
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = (hidden[part] @ head.T).float()
            capped = logits if cap is None else cap * torch.tanh(logits / cap)
            p = torch.softmax(capped, -1)
            drawn = torch.multinomial(p, 1, generator=self.generator)
            self.head_outputs += (p * (1 - p)).sum(0).cpu()
            p.scatter_add_(1, drawn, torch.full_like(p[:, :1], -1.0))
            if cap is not None:
                p *= 1 - (capped / cap).square()
            slope[part] = (p @ head).float()
        self.head_inputs.addmm_(hidden.T.cpu(), hidden.cpu())
        return slope

    def _embedded(self, _: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        self._leaf = out.detach().requires_grad_()
        return self._leaf

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def forward(_: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

            def backward(gradient: torch.Tensor) -> None:
                squares = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
                self.outputs[name] += squares.sum(0).cpu()
                weighted = x.float() * squares.mean(-1, keepdim=True).sqrt()
                with torch.autocast(self.device.type, enabled=False):
                    self.inputs[name].addmm_(weighted.T.cpu(), weighted.cpu())

            out.register_hook(backward)

        return forward

    def results(self, *, last: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values to write: means over the tokens."""
        for name in self.linear:
            yield f"{name}.inputs", (self.inputs[name] / self.tokens).numpy()
            yield f"{name}.outputs", (self.outputs[name] / self.tokens).numpy()
        if last:
            head = _head_name(self.checkpoint)
            scale = float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))
            yield f"{head}.inputs", (self.head_inputs / self.tokens).numpy()
            yield f"{head}.outputs", (self.head_outputs / self.tokens).numpy()
            yield f"{_EMBEDDING}.lookups", (self.lookups / self.tokens).numpy()
            yield f"{_EMBEDDING}.gradients", (self.gradients * scale**2 / self.tokens).numpy()
