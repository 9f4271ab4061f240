"""Are an artifact's weights those of the checkpoint, rounded? Rows of every matrix are read and compared."""

from __future__ import annotations

import math
import re

import numpy as np

from lowbit.checkpoint import Checkpoint
from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.members import Member
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet

_ROWS = 4  # of a matrix
_MOST_TENSORS = 120
# The largest ||artifact - checkpoint|| / ||checkpoint|| of a matrix by the bits it is stored in. Rounding normal
# weights to Q4_0 gives 0.09, to Q2_K 0.3; two matrices that have nothing to do with each other differ by 1.4.
_MOST_ERROR = ((4, 0.4), (3, 0.6), (0, 0.9))
_OF_VECTORS = 0.1


class Weights(Check):
    name = "weights"
    question = "the artifacts' weights are the checkpoint's, rounded"
    rank = 40
    after = ("hashes", "architecture")
    roles = TEXT_MODELS

    def run(self, release: ReleaseSet, found: Findings) -> None:
        models = release.text_models
        if len(models) < 2:
            raise NotApplicable("one model only, nothing to compare with")
        reference = models[0]
        with release.checkpoint(reference) as source:
            for member in models[1:]:
                with found.problems_of(member), release.checkpoint(member) as other:
                    self._compare(reference, source, member, other, found)

    def _compare(
        self, reference: Member, source: Checkpoint, member: Member, other: Checkpoint, found: Findings
    ) -> None:
        names = [name for name in source.names if name in other]
        names = names[:: max(1, len(names) // _MOST_TENSORS)]
        errors = {name: relative_error(source, other, name) for name in names}
        wrong = {name: e for name, e in errors.items() if not e <= allowed(other, name)}
        if wrong:
            listed = [f"{name} by {100 * e:.0f}%" for name, e in sorted(wrong.items(), key=lambda item: -item[1])]
            advice = f"{member} was made from another checkpoint: pack {reference} again, or find the one it came from"
            few = f"{len(wrong)} of {len(names)} tensors are not those of {reference}"
            found.problem(f"{member}: {few}: {shortened(listed, 2)}", advice)
        else:
            worst = max(errors, key=lambda name: errors[name])
            found.note(f"{member}: {len(names)} tensors, off by at most {100 * errors[worst]:.1f}% ({worst})")


def relative_error(source: Checkpoint, other: Checkpoint, name: str) -> float:
    """||other - source|| / ||source|| of a sample of a tensor's rows."""
    n_rows = source.specs[name].n_rows
    picked = sorted({round(i * (n_rows - 1) / max(1, _ROWS - 1)) for i in range(_ROWS)})
    ours = np.concatenate([source.read_rows(name, row, row + 1) for row in picked]).astype(np.float64)
    theirs = np.concatenate([other.read_rows(name, row, row + 1) for row in picked]).astype(np.float64)
    size = math.sqrt(float((ours**2).sum()))
    off = math.sqrt(float(((theirs - ours) ** 2).sum()))
    return off / size if size else off


def allowed(other: Checkpoint, name: str) -> float:
    info = other.info(name)
    if len(info.shape) < 2:
        return _OF_VECTORS
    digits = re.search(r"(?:Q|FP|AFFINE|INT)(\d)", info.dtype.upper())
    bits = int(digits[1]) if digits else 16
    return next(most for least, most in _MOST_ERROR if bits >= least)


CHECK = Weights
