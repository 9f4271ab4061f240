"""Every two artifacts against each other, on the same draws of the same text: differences and verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.measure.bootstrap import Bootstrap
from lowbit.measure.fidelity import Scores
from lowbit.measure.record import Figure
from lowbit.measure.statistics import Comparison, corrected, of_means


def pairs(names: Sequence[str], scores: Sequence[Scores], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """For every two artifacts, the earlier as "baseline": differences with their verdicts (Comparison.as_json), each
    corrected for how many pairs there are, and "kld_mean_ratio", a figure; None where the baseline is the reference."""
    both = list(itertools.combinations(range(len(names)), 2))
    found = [_differences(scores[b], scores[a], bootstrap) for b, a in both]
    judged = {key: corrected([each[key] for each in found]) for key in (found[0] if found else ())}
    listed = []
    for i, (b, a) in enumerate(both):
        ratio = _ratio(scores[b], scores[a], bootstrap)
        listed.append(
            {
                "baseline": names[b],
                "artifact": names[a],
                "kld_mean_ratio": ratio.as_json() if ratio else None,
                **{key: comparisons[i].as_json() for key, comparisons in judged.items()},
            }
        )
    return listed


def perplexity_against(reference: Scores, artifact: Scores, bootstrap: Bootstrap) -> Comparison:
    """The difference of log perplexity from the reference's: what the artifact lost on the text itself."""
    return of_means(artifact.nll - reference.nll, bootstrap, higher_is_better=False, unit="nats")


def _differences(baseline: Scores, artifact: Scores, bootstrap: Bootstrap) -> dict[str, Comparison]:
    tops = artifact.same_top.astype(np.float64) - baseline.same_top
    return {
        "kld_mean_difference": of_means(artifact.kld - baseline.kld, bootstrap, higher_is_better=False, unit="nats"),
        "top1_difference": of_means(tops, bootstrap, higher_is_better=True, unit="share"),
        "log_perplexity_difference": perplexity_against(baseline, artifact, bootstrap),
    }


def _ratio(baseline: Scores, artifact: Scores, bootstrap: Bootstrap) -> Figure | None:
    base, mean = bootstrap.means(baseline.kld), float(np.mean(baseline.kld))
    if mean <= 0 or not np.all(base > 0):
        return None
    return bootstrap.figure(float(np.mean(artifact.kld)) / mean, bootstrap.means(artifact.kld) / base, "ratio")
