"""The distillation loss and its hand-written gradients, against plain autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lowbit import compact
from lowbit.train import HiddenTargets, TopKTargets, distillation_loss
from lowbit.train.forms import Compact, Targets
from lowbit.train.loss import top_k_targets

KINDS = ("hidden", "topk", "compact")
POSITIONS, WIDTH, VOCABULARY, K = 150, 16, 90, 7  # positions: more than two of the loss's portions, no multiple


class Case:
    """A student's and a reference's hidden states and heads; ``sure`` scales the logits."""

    def __init__(self, seed: int = 0, sure: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.teacher = torch.randn(POSITIONS, WIDTH, generator=generator)
        self.teacher_head = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5 * sure
        self.hidden = self.teacher + 0.3 * torch.randn(POSITIONS, WIDTH, generator=generator)
        self.head = self.teacher_head + 0.1 * sure * torch.randn(VOCABULARY, WIDTH, generator=generator)

    def log_p(self) -> torch.Tensor:
        return F.log_softmax(self.teacher.double() @ self.teacher_head.double().T, -1)

    def targets(self, kind: str, seed: int = 0) -> Targets:
        if kind == "hidden":
            return HiddenTargets(self.teacher, self.teacher_head)
        if kind == "compact":
            return self._compact(seed).targets(self.records(seed), None, torch.device("cpu"))
        tokens, log_p = top_k_targets(self.teacher, self.teacher_head, K)
        return TopKTargets(tokens.long(), log_p)

    def _compact(self, seed: int = 0) -> Compact:
        return Compact(len(self.teacher_head), seed)

    def records(self, seed: int = 0) -> dict[str, np.ndarray]:
        form, tokens = self._compact(seed), np.zeros((1, len(self.teacher)), np.int32)
        said = form.said(self.teacher[None], self.teacher_head, tokens, 0)
        return {name: values.numpy() for name, values in said.items()}

    def kept(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (n, k), their log probabilities, which of them are the head's, and the tail's mass (n, 1), float64."""
        layout = self._compact().layout
        records = self.records()["records"].view(layout.dtype).reshape(-1)
        ids, log_p = (torch.from_numpy(part) for part in compact.unpack(layout, records))
        in_head = torch.arange(layout.entries) < torch.from_numpy(records["head"].astype(np.int64))[:, None]
        return ids, log_p, in_head, torch.from_numpy(records["tail"].astype(np.float64))[:, None]

    def plain(self, kind: str, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """The loss as its definition has it, float64, differentiable by autograd alone."""
        log_p, log_q = self.log_p(), F.log_softmax(hidden @ head.T, -1)
        if kind == "compact":
            return self._plain_compact(log_q)
        if kind == "topk":
            order = log_p.argsort(-1, descending=True)
            log_p, log_q = (_with_tail(x.gather(-1, order)) for x in (log_p, log_q))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def _plain_compact(self, log_q: torch.Tensor) -> torch.Tensor:
        """A row at a time: the head and the tail as outcomes, and how the drawn stand to each other."""
        losses = []
        for ids, log_p, in_head, tail, row in zip(*self.kept(), log_q, strict=True):
            p, of_head = log_p[in_head].exp(), ids[in_head]
            in_tail = torch.ones(VOCABULARY, dtype=torch.bool)
            in_tail[of_head] = False
            loss = (p * (log_p[in_head] - row[of_head])).sum()
            if tail > 0:
                loss = loss + (tail * (tail.log() - row[in_tail].logsumexp(0)))[0]
                apart = row[ids[~in_head]] - log_p[~in_head]
                loss = loss + (tail * (apart.exp().mean().log() - apart.mean()))[0]
            losses.append(loss)
        return torch.stack(losses).mean()

    def expected(self, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Value, gradient by hidden states, gradient by head."""
        hidden, head = (x.double().requires_grad_() for x in (self.hidden, self.head))
        loss = self.plain(kind, hidden, head)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def _with_tail(ordered: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) log probabilities -> (n, K + 1): the first K, and all the rest as one outcome."""
    return torch.cat([ordered[:, :K], ordered[:, K:].logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind: str) -> None:
    case = Case()
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    loss = distillation_loss(hidden, head, case.targets(kind))
    (3 * loss).backward()
    value, for_hidden, for_head = case.expected(kind)
    assert value > 0.05
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0.0)
    assert hidden.grad is not None and head.grad is not None
    torch.testing.assert_close(hidden.grad.double(), 3 * for_hidden, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(head.grad.double(), 3 * for_head, rtol=1e-4, atol=1e-7)


def test_capped_logits() -> None:
    """Gemma 4's: value and gradients are those of autograd through cap tanh(logits / cap), of both models."""
    case, cap = Case(sure=3.0), 2.0
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    loss = distillation_loss(hidden, head, HiddenTargets(case.teacher, case.teacher_head, cap), cap)
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, head))
    of_teacher = case.teacher.double() @ case.teacher_head.double().T
    log_p, log_q = (F.log_softmax(cap * torch.tanh(z / cap), -1) for z in (of_teacher, h @ w.T))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
    assert hidden.grad is not None and head.grad is not None and h.grad is not None and w.grad is not None
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(head.grad.double(), w.grad, rtol=1e-4, atol=1e-7)
    tokens, kept = top_k_targets(case.teacher, case.teacher_head, K, cap)
    torch.testing.assert_close(kept.double(), log_p.gather(-1, tokens.long()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind: str) -> None:
    case = Case(seed=1)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    distillation_loss(hidden, head, case.targets(kind)).backward()
    assert hidden.grad is not None and head.grad is not None
    generator = torch.Generator().manual_seed(2)
    by_hidden, by_head = (torch.randn(x.shape, generator=generator) for x in (hidden, head))
    step = 1e-2
    with torch.no_grad():
        ahead = distillation_loss(hidden + step * by_hidden, head + step * by_head, case.targets(kind))
        behind = distillation_loss(hidden - step * by_hidden, head - step * by_head, case.targets(kind))
    slope = (hidden.grad * by_hidden).sum() + (head.grad * by_head).sum()
    assert slope.abs() > 1e-3
    torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_head_changes_nothing_for_the_rest(kind: str) -> None:
    case = Case()
    together = case.hidden.clone().requires_grad_()
    distillation_loss(together, case.head.clone().requires_grad_(), case.targets(kind)).backward()
    alone = case.hidden.clone().requires_grad_()
    distillation_loss(alone, case.head, case.targets(kind)).backward()
    assert alone.grad is not None and together.grad is not None
    assert torch.equal(alone.grad, together.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_itself_loses_nothing(kind: str) -> None:
    case = Case()
    hidden, head = case.teacher.clone().requires_grad_(), case.teacher_head.clone().requires_grad_()
    loss = distillation_loss(hidden, head, case.targets(kind))
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    assert loss.detach().abs() < 1e-6
    assert hidden.grad.abs().max() < 1e-8
    assert head.grad.abs().max() < 1e-7


def test_compact_targets_are_in_the_mean_just_below_the_exact_divergence() -> None:
    case = Case(seed=4)
    case.teacher_head *= 0.3  # flat rows, so that much is drawn
    case.head = case.teacher_head + 0.1 * torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(5))
    _, _, in_head, tail = case.kept()
    assert (~in_head).sum() > len(in_head) and tail.mean() > 0.1
    exact = float(distillation_loss(case.hidden, case.head, case.targets("hidden")))
    found = [float(distillation_loss(case.hidden, case.head, case.targets("compact", seed))) for seed in range(100)]
    assert 0 < np.std(found) < 0.05 * exact
    assert 0.97 * exact < np.mean(found) <= exact + 3 * np.std(found) / 10


def test_top_k_is_a_lower_bound_that_all_tokens_reach() -> None:
    case = Case()
    with torch.no_grad():
        exact = distillation_loss(case.hidden, case.head, case.targets("hidden"))
        losses = []
        for k in (1, K, VOCABULARY):
            tokens, log_p = top_k_targets(case.teacher, case.teacher_head, k)
            losses.append(distillation_loss(case.hidden, case.head, TopKTargets(tokens.long(), log_p)))
    assert 0 < losses[0] < losses[1] < exact
    torch.testing.assert_close(losses[2], exact, rtol=1e-4, atol=1e-5)


def test_the_tail_of_a_sure_student_is_not_lost() -> None:
    """Where the student is sure, the mass of its tail is far below what 1 - sum could tell in float32."""
    tokens = torch.arange(K).expand(4, K)
    log_p = torch.full((4, K), 0.9 / K).log()  # a tenth of the reference's mass lies outside
    hidden = torch.eye(4, WIDTH).requires_grad_()
    head = torch.zeros(VOCABULARY, WIDTH)
    head[:K] = 30.0  # the tail's mass: about e^-30 a token
    head[K:] = torch.rand(VOCABULARY - K, WIDTH, generator=torch.Generator().manual_seed(3))
    loss = distillation_loss(hidden, head, TopKTargets(tokens, log_p))
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    log_q = _with_tail(F.log_softmax(exact @ head.double().T, -1))
    outcome = torch.cat([log_p.double(), torch.full((4, 1), 0.1, dtype=torch.float64).log()], -1)
    plain = (outcome.exp() * (outcome - log_q)).sum(-1).mean()
    (expected,) = torch.autograd.grad(plain, exact)
    torch.testing.assert_close(loss.double(), plain.detach(), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_predictions_stay_finite(kind: str) -> None:
    case = Case(sure=60.0)
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    loss = distillation_loss(hidden, head, case.targets(kind))
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    assert torch.isfinite(loss) and loss > 0
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(head.grad).all()


def test_a_bfloat16_head_computes_in_bfloat16_and_adds_up_in_float32() -> None:
    case = Case()
    head = case.head.bfloat16().requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    reference = HiddenTargets(case.teacher, case.teacher_head.bfloat16())
    loss = distillation_loss(hidden, head, reference)
    loss.backward()
    value, for_hidden, for_head = case.expected("hidden")
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == torch.float32 and head.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(value.item(), rel=0.05)
    for got, expected in ((hidden.grad, for_hidden), (head.grad, for_head)):
        assert (got.double() - expected).norm() < 0.05 * expected.norm()


def test_top_k_targets_are_the_likeliest() -> None:
    case = Case()
    tokens, log_p = top_k_targets(case.teacher, case.teacher_head, K)
    assert tokens.dtype == torch.int32 and log_p.dtype == torch.float32
    expected = case.log_p().sort(-1, descending=True)
    assert torch.equal(tokens.long(), expected.indices[:, :K])
    torch.testing.assert_close(log_p.double(), expected.values[:, :K], rtol=1e-5, atol=1e-5)
