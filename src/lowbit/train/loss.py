"""Distillation losses: the Kullback-Leibler divergence of the student from the reference, in nats a token.

The vocabulary is large and the batch is not, so logits are made, compared and dropped a few positions at a time; the
gradient is known in closed form (softmax of the student minus probabilities of the reference).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

# Positions whose logits are held at once: two float32 rows a position of a 50k vocabulary stay in a 32 MB cache.
_POSITIONS = 64


class _Distillation(torch.autograd.Function):
    """mean over positions of KL(reference || student), differentiable by the student's hidden states and head."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, reference: Any, cap: float | None) -> torch.Tensor:
        n = len(hidden)
        for_hidden = torch.empty_like(hidden)
        for_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        product = head.dtype
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, n, _POSITIONS):
            part = slice(start, start + _POSITIONS)
            h = hidden[part].to(product)
            logits = capped((h @ head.T).float(), cap)  # (positions, vocabulary)
            log_q = F.log_softmax(logits, dim=-1)
            divergence, slope = reference.compare(part, log_q)  # slope: d divergence / d logits
            slope = of_uncapped(slope, logits, cap)
            total += divergence.sum(dtype=torch.float64)
            slope = slope.to(product)
            for_hidden[part] = (slope @ head).to(hidden.dtype)
            if for_head is not None:
                for_head += (slope.T @ h).float()
        for_hidden /= n
        ctx.save_for_backward(for_hidden, for_head / n if for_head is not None else None)
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_hidden, for_head = ctx.saved_tensors
        return for_hidden * gradients[0], None if for_head is None else for_head * gradients[0], None, None


def softcap(model: Any) -> float | None:
    """The cap of a model's logits (final_logit_softcapping), or None."""
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """The logits as a model with such a cap has them, Gemma 4 for one: cap tanh(logits / cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def of_uncapped(slope: torch.Tensor, logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """The slope by the logits before the cap, made of that by the capped ``logits``, which it takes the place of."""
    return slope if cap is None else slope.mul_(1 - (logits / cap).square())


def distillation_loss(
    hidden: torch.Tensor, head: torch.Tensor, reference: Any, cap: float | None = None
) -> torch.Tensor:
    """Mean KL(reference || student) in nats.

    hidden: (n, width) float32, the student's final hidden states (after its last norm). head: (vocabulary, width), the
    student's output head; its dtype is that of the products. reference: HiddenTargets, TopKTargets or CompactTargets,
    at the same n positions. cap: of the student's logits.
    """
    return _Distillation.apply(hidden, head, reference, cap)  # type: ignore[no-any-return, no-untyped-call]


class HiddenTargets:
    """The reference's final hidden states (n, width), its head (vocabulary, width) and the cap of its logits: exact
    probabilities."""

    def __init__(self, hidden: torch.Tensor, head: torch.Tensor, cap: float | None = None) -> None:
        self.hidden, self.head, self.cap = hidden, head, cap

    def compare(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (self.hidden[part].to(self.head.dtype) @ self.head.T).float()
        log_p = F.log_softmax(capped(logits, self.cap), dim=-1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(-1)
        return divergence, log_q.exp().sub_(p)


class TopKTargets:
    """The reference's k largest probabilities and, as one more outcome, the mass of all the rest.

    tokens: (n, k) int64. log_p: (n, k) float32. The divergence is that of the k + 1 outcomes, a lower bound.
    """

    def __init__(self, tokens: torch.Tensor, log_p: torch.Tensor) -> None:
        self.tokens, self.log_p = tokens, log_p

    def compare(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, log_p = self.tokens[part], self.log_p[part].float()
        log_q_top = log_q.gather(-1, tokens)
        p = log_p.exp()
        tiny = torch.finfo(torch.float32).tiny
        tail_p = (1 - p.sum(-1)).clamp_min(tiny)
        # The rest is summed, not taken from 1: a sure student's tail would drown in rounding, and is divided by.
        rest = log_q.exp().scatter_(-1, tokens, 0.0)
        tail_q = rest.sum(-1).clamp_min(tiny)
        divergence = (p * (log_p - log_q_top)).sum(-1) + tail_p * (tail_p.log() - tail_q.log())
        # Through the softmax: q - p on the k tokens; each of the rest less its share of the reference's tail mass.
        slope = rest - rest / tail_q.unsqueeze(-1) * tail_p.unsqueeze(-1)
        slope.scatter_(-1, tokens, log_q_top.exp() - p)
        return divergence, slope


class CompactTargets:
    """What ``lowbit.compact`` keeps: the head's probabilities, the mass of the tail, and tokens drawn from the tail.

    ids: (n, k) int64, the first ``head`` (n,) of a row the head's, the others drawn, each as good as any other.
    log_p: (n, k) float32. tail: (n,) float32.

    The divergence is that of the head's tokens and, as one more outcome, the tail; plus the tail's mass times the
    divergence within the tail, of which the drawn tell: log mean(q / p) - mean log(q / p) over them. It is never below
    zero, is zero for the reference itself whatever was drawn, and in the mean over the draws at most the exact one,
    which it comes the closer to the more are drawn. Its gradient moves the drawn against each other, and the tail as a
    whole: where the student has the reference's probabilities nothing is left of the draws' noise.
    """

    def __init__(self, ids: torch.Tensor, log_p: torch.Tensor, head: torch.Tensor, tail: torch.Tensor) -> None:
        self.ids, self.tail = ids, tail
        places = torch.arange(ids.shape[-1], device=ids.device)
        self.in_head = (places < head[:, None]) | (tail <= 0)[:, None]
        # What is stored is rounded: the parts are made to add up to one.
        self.log_p = log_p - (torch.where(self.in_head, log_p.exp(), 0.0).sum(-1) + tail).log()[:, None]
        self.tail = tail / (torch.where(self.in_head, log_p.exp(), 0.0).sum(-1) + tail)

    def compare(self, part: slice, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, log_p, in_head, tail_p = self.ids[part], self.log_p[part], self.in_head[part], self.tail[part]
        tiny = torch.finfo(torch.float32).tiny
        log_q_kept = log_q.gather(-1, ids)
        q_kept, p = log_q_kept.exp(), torch.where(in_head, log_p.exp(), 0.0)
        # The rest is summed, not taken from 1: a sure student's tail would drown in rounding, and is divided by.
        rest = log_q.exp().scatter_(-1, ids, torch.where(in_head, 0.0, q_kept))
        tail_q = rest.sum(-1).clamp_min(tiny)
        ratio = torch.where(in_head, -torch.inf, log_q_kept - log_p)  # log(q / p) of the drawn
        n = (~in_head).sum(-1).clamp_min(1)
        seen = (~in_head).any(-1)
        log_sum = torch.where(seen, ratio.logsumexp(-1), 0.0)
        within = torch.where(seen, log_sum - n.log() - torch.where(in_head, 0.0, ratio).sum(-1) / n, 0.0)
        divergence = (p * (log_p - log_q_kept)).sum(-1) + tail_p * (tail_p.clamp_min(tiny) / tail_q).log()
        divergence += tail_p * within
        slope = rest - rest * (tail_p / tail_q)[:, None]
        shares = torch.where(in_head, 0.0, (ratio - log_sum[:, None]).exp() - 1 / n[:, None])
        slope.scatter_add_(-1, ids, torch.where(in_head, q_kept - p, tail_p[:, None] * shares))
        return divergence, slope


def top_k_targets(
    hidden: torch.Tensor, head: torch.Tensor, k: int, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, width) hidden states -> (n, k) tokens int32 and (n, k) log probabilities float32 of the k likeliest."""
    tokens, log_ps = [], []
    for start in range(0, len(hidden), _POSITIONS):
        logits = (hidden[start : start + _POSITIONS].to(head.dtype) @ head.T).float()
        log_p = F.log_softmax(capped(logits, cap), dim=-1)
        top = log_p.topk(k, dim=-1)
        tokens.append(top.indices.to(torch.int32))
        log_ps.append(top.values)
    return torch.cat(tokens), torch.cat(log_ps)
