"""``lowbit train --drafter``: a drafter that guesses what its target, as it ships, will say.

A drafter made for the unquantized model guesses what that one would say; where quantization has moved the target's
choices it is wrong. Here the target is the file that ships: it writes the text (a drafter meets no other) and its
probabilities on it are the drafter's targets (Zhou et al. 2024, DistillSpec). The drafter is trained unquantized: it is
small, and Q8_0 packs it as good as without loss. What does not move is its embedding, and with it a tied head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from lowbit import launch
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import BadOption, Unsupported
from lowbit.run._hf_model import load
from lowbit.train.cut import Cut, layers_asked
from lowbit.train.ledger import Ledger
from lowbit.train.model import load_tokenizer
from lowbit.train.moments import EMBEDDING
from lowbit.train.options import TrainOptions
from lowbit.train.pipeline import Run, TrainResult, check_free, run_key
from lowbit.train.record import describe
from lowbit.train.world import join

_SAMPLING_SHARE = 0.3  # a drafter meets nothing but its target's writing
_RATE_OF_A_CUT, _RATE = 1e-3, 1e-4


def train_drafter(
    target: str | Path,
    drafter: str | Path,
    out: str | Path,
    *,
    options: TrainOptions | None = None,
    work: str | Path | None = None,
) -> TrainResult:
    """Trains ``drafter`` to guess the tokens of ``target``; writes a checkpoint folder to ``out``.

    target: what ships, a packed GGUF or a checkpoint. drafter: a model of the same vocabulary, or 'layers:N': N of the
    target's own. options: minutes, steps, data, seed and the finer ones; recipe, start and train are of no use here.
    Killed at any moment, the same call goes on. Raises LowbitError.
    """
    if launch.size() > 1:
        hint = "Start the command by itself, without torchrun or accelerate"
        raise Unsupported("a drafter is trained by one process", found=f"{launch.size()} processes", hint=hint)
    options = options or TrainOptions()
    if options.reference is not None:
        raise Unsupported("a drafter learns from its target, in this process", found=f"reference {options.reference}")
    start = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(out)
    work = Path(work) if work is not None else out.with_name(out.name + ".work")
    n_layers = layers_asked(str(drafter))
    if options.learning_rate is None:
        options = dataclasses.replace(options, learning_rate=_RATE if n_layers is None else _RATE_OF_A_CUT)
    with contextlib.ExitStack() as stack:
        of = stack.enter_context(open_checkpoint(target))
        student = stack.enter_context(Cut(of, n_layers) if n_layers is not None else open_checkpoint(drafter))
        if n_layers is None:
            check_vocabulary(of, student)
        for model in (of, student):
            check_free(out, work, model.path)
        key = run_key(of, options) + (f" layers {n_layers}" if n_layers else run_key(student, options))
        ledger = Ledger.open(work / "ledger.json", key)
        run = _DrafterRun(of, student, options, ledger, work, out)
        if not ledger.done("export"):
            run.load(start)
            run.gather()
            run.ask()
            run.distil()
        return TrainResult(out, out, ledger.facts["record"])


def check_vocabulary(target: Checkpoint, drafter: Checkpoint) -> None:
    """Raises BadOption where the two number their tokens differently."""
    hint = "A drafter's tokens are its target's"
    sizes = [checkpoint.specs[EMBEDDING].shape[0] for checkpoint in (target, drafter)]
    if sizes[0] != sizes[1]:
        raise BadOption("the drafter has another vocabulary", found=sizes[1], expected=sizes[0], hint=hint)
    # Numbers without a token, which fill a vocabulary up, are named in a GGUF and not in a folder.
    ours, theirs = (
        {number: token for token, number in load_tokenizer(checkpoint).get_vocab().items()}
        for checkpoint in (target, drafter)
    )
    differing = min((i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]), default=None)
    if differing is not None:
        found, expected = (f"token {differing} is {tokens[differing]!r:.40}" for tokens in (theirs, ours))
        raise BadOption("the drafter has another vocabulary", found=found, expected=expected, hint=hint)


class _DrafterRun(Run):
    """The same stages as for a model's own training, with two models; the reference is the target as it ships."""

    sampling_share = _SAMPLING_SHARE

    def __init__(
        self, target: Checkpoint, student: Checkpoint, options: TrainOptions, ledger: Ledger, work: Path, out: Path
    ) -> None:
        super().__init__(target, options, ledger, work, out, join())
        self.saved_like = student

    def load(self, start: float) -> None:
        super().load(start)
        with self.ledger.stage("load"):
            self.student: Any = load(self.saved_like).to(self.device)
            self.body_ratio = _body(self.student) / _body(self.model)

    def ask(self) -> None:
        """What the target says of each sequence; after that it is not needed any more."""
        self.cache = self._open_cache(len(self.sequences))
        self.ask_reference()
        self.model = self.student

    def chosen(self) -> list[torch.nn.Parameter]:
        """Everything but the embedding and the head."""
        ends = {id(m.weight) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in ends)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _starts_well(self) -> bool:
        return False

    def _is_worse(self, before: float | None, after: float | None) -> bool:
        return False  # there is no start to go back to

    def described(self, curve: list[dict[str, Any]], distilled: float, sequences: int) -> dict[str, Any]:
        record = describe(dataclasses.replace(self.options, start="nearest"), self.ledger, curve, distilled, sequences)
        return record | {"phases": record["phases"][-1:], "drafts_for": self.checkpoint.name}


def _body(model: Any) -> int:
    """Weights of the layers."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())
