"""Second moments of what flows into matrices and gradients of what flows out, added up sequence by sequence.

``importance`` says what they are of. Shapes: n is a matrix's inputs, rows its outputs. Of a layer's experts there are
as many of each as experts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.train import experts, precision
from lowbit.train.loss import capped, of_uncapped, softcap

EMBEDDING = "model.embed_tokens.weight"
_POSITIONS = 128  # whose logits are held at once
_MOST_ROWS = 2048  # of a matrix whose rows are told of each other: their moments are as many as its weights


@dataclass(frozen=True)
class Site:
    """A matrix, or a layer's experts as one weight (experts, rows, n): its name, and the module that computes it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def is_experts(self) -> bool:
        return len(self.shape) == 3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts that are written of it, as ``lowbit.pack.calibration`` has them."""
        *lead, rows, n = self.shape
        found: dict[str, tuple[int, ...]] = {"inputs": (*lead, n, n), "outputs": (*lead, rows)}
        if lead:
            return found | {"tokens": (lead[0],), "pooled": (n, n)}
        return found | ({"slopes": (rows, rows)} if rows <= _MOST_ROWS else {})

    @property
    def n_bytes(self) -> int:
        """Of its moments."""
        shapes = self.shapes()
        return 4 * sum(math.prod(shapes[part]) for part in ("inputs", "slopes") if part in shapes)


def sites(model: Any, checkpoint: Checkpoint) -> list[Site]:
    """Every matrix of the layers, in order of execution. Raises Unsupported for experts of an unknown kind."""
    head, found = model.get_output_embeddings(), []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and f"{path}.weight" in checkpoint.specs:
            found.append(Site(f"{path}.weight", module, (module.out_features, module.in_features)))
        parts = [name for name in (experts.GATE_UP, experts.DOWN) if f"{path}.{name}" in checkpoint.specs]
        if parts:
            experts.check(module, path)
        found += [Site(f"{path}.{name}", module, checkpoint.specs[f"{path}.{name}"].shape) for name in parts]
    return found


def model_shapes(model: Any, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """What is written of the head and the embedding: names and shapes."""
    rows, n = model.get_output_embeddings().weight.shape
    head, (vocab, width) = head_name(checkpoint), model.get_input_embeddings().weight.shape
    return {
        f"{head}.inputs": (n, n), f"{head}.outputs": (rows,),
        f"{EMBEDDING}.lookups": (vocab,), f"{EMBEDDING}.gradients": (width,),
    }  # fmt: skip


def head_name(checkpoint: Checkpoint) -> str:
    """The weight that makes the logits: the embedding where they are tied."""
    return next((name for name in checkpoint.names if checkpoint.info(name).role == "output"), EMBEDDING)


class Pass:
    """One pass over the text for some of the sites, and for the head and the embedding."""

    def __init__(self, model: Any, chosen: list[Site], checkpoint: Checkpoint, precision_: str, seed: int) -> None:
        self.model, self.sites, self.checkpoint = model, chosen, checkpoint
        self.device = next(model.parameters()).device
        self.dtype = precision.choose(precision_, self.device, model.config.get_text_config().hidden_size)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # By the names in the file, but for what is made of others at the end.
        shapes = {f"{site.name}.{part}": shape for site in chosen for part, shape in site.shapes().items()}
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".pooled")}
        self.sums = {n: torch.zeros(shape) for n, shape in (shapes | model_shapes(model, checkpoint)).items()}
        self.tokens = 0

    def state(self) -> dict[str, torch.Tensor]:
        """All that ``restore`` needs, given what reads it by name, to go on as if nothing had happened."""
        return {**self.sums, "generator": self.generator.get_state(), "tokens_seen": torch.tensor(self.tokens)}

    def restore(self, read: Callable[[str], torch.Tensor]) -> None:
        for name, values in self.sums.items():
            values.copy_(read(name))
        self.generator.set_state(read("generator"))
        self.tokens = int(read("tokens_seen"))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block ``add`` works: the model has no gradients of its own, and its products are watched."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        with contextlib.ExitStack() as stack:
            handles = [self.model.get_input_embeddings().register_forward_hook(self._embedded)]
            for site in self.sites:
                if not site.is_experts:
                    handles.append(site.module.register_forward_hook(functools.partial(self._flowed, site.name)))
            by_module: dict[nn.Module, set[str]] = {}
            for site in self.sites:
                if site.is_experts:
                    by_module.setdefault(site.module, set()).add(site.name)
            for module, names in by_module.items():
                stack.enter_context(experts.watched(module, functools.partial(self._expert, names)))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def add(self, row: torch.Tensor) -> None:
        """One sequence, (1, tokens)."""
        row = row.to(self.device)
        with precision.autocast(self.device, self.dtype):
            hidden = self.model.model(row, use_cache=False).last_hidden_state
            slope = self._slope(hidden.detach()[0].float())
        hidden.backward(slope[None].to(hidden.dtype))
        assert self._leaf.grad is not None
        gradient = self._leaf.grad[0].float()  # (tokens, width)
        lookups = self.sums[f"{EMBEDDING}.lookups"]
        self.sums[f"{EMBEDDING}.gradients"] += gradient.square().sum(0).cpu()
        lookups += torch.bincount(row[0].cpu(), minlength=len(lookups)).float()
        self.tokens += row.shape[1]

    def _slope(self, hidden: torch.Tensor) -> torch.Tensor:
        """The gradient at the final hidden states (tokens, width) of labels that are drawn; the head's own moments."""
        head, name = self.model.get_output_embeddings().weight, head_name(self.checkpoint)
        cap = softcap(self.model)
        slope = torch.empty_like(hidden)
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = capped((hidden[part] @ head.T).float(), cap)
            p = torch.softmax(logits, -1)
            # By the inverse of their sum: torch.multinomial takes twenty times as long.
            summed = p.cumsum(-1)
            at = torch.rand(len(p), 1, generator=self.generator, device=p.device) * summed[:, -1:]
            drawn = torch.searchsorted(summed, at, right=True).clamp_(max=p.shape[-1] - 1)
            self.sums[f"{name}.outputs"] += (p * (1 - p)).sum(0).cpu()
            p.scatter_add_(1, drawn, torch.full_like(p[:, :1], -1.0))
            slope[part] = (of_uncapped(p, logits, cap) @ head).float()
        self.sums[f"{name}.inputs"].addmm_(hidden.T.cpu(), hidden.cpu())
        return slope

    def _embedded(self, _: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        self._leaf = out.detach().requires_grad_()
        return self._leaf

    def _flowed(self, name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        moments, outputs = self.sums[f"{name}.inputs"], self.sums[f"{name}.outputs"]
        out.register_hook(functools.partial(self._weigh, moments, outputs, self.sums.get(f"{name}.slopes"), x))

    def _expert(self, names: set[str], part: str, expert: int, x: torch.Tensor, out: torch.Tensor) -> None:
        for name in names:
            if name.endswith(f".{part}"):
                inputs, outputs = (self.sums[f"{name}.{kind}"][expert] for kind in ("inputs", "outputs"))
                out.register_hook(functools.partial(self._weigh, inputs, outputs, None, x.detach()))
                self.sums[f"{name}.tokens"][expert] += len(x)

    def _weigh(
        self,
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        slopes: torch.Tensor | None,
        x: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        """Adds tokens to a matrix's sums: x (tokens, n), and the gradient at what they became."""
        gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        squares = gradient.square()
        outputs += squares.sum(0).cpu()
        weighted = x.float() * squares.mean(-1, keepdim=True).sqrt()
        with torch.autocast(self.device.type, enabled=False):
            inputs.addmm_(weighted.T.cpu(), weighted.cpu())
            if slopes is not None:
                slopes.addmm_(gradient.T.cpu(), gradient.cpu())

    def results(self, *, last: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Names and float32 values to write, once: means over the tokens, of the head and the embedding in the ``last``
        pass; but .tokens, which are counts. The sums become the means where they are, for they may be large."""
        for name, sums in self.sums.items():
            if not name.endswith(".tokens"):
                sums /= self.tokens
        scale = float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))
        self.sums[f"{EMBEDDING}.gradients"] *= scale**2
        for site in self.sites:
            for part in site.shapes():
                pooled = part == "pooled"
                values = self.sums[f"{site.name}.inputs"].sum(0) if pooled else self.sums[f"{site.name}.{part}"]
                yield f"{site.name}.{part}", values.numpy()
        for name in model_shapes(self.model, self.checkpoint) if last else ():
            yield name, self.sums[name].numpy()
