"""Will it fit: weights, KV cache, scratch, drafter and projector of a model in a runtime, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from lowbit.plan.curve import Curve, curves
from lowbit.plan.fit import Best, Fit, FitOptions, fit
from lowbit.plan.made import plan_open
from lowbit.plan.model import PlanModel, open_listed, open_model
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan, Row
from lowbit.verbs import make_callable

__all__ = [
    "Best", "Curve", "Fit", "FitOptions", "Plan", "PlanModel", "PlanOptions", "Row", "curves", "fit", "open_listed",
    "open_model", "plan", "plan_open",
]  # fmt: skip


def plan(model: str | Path, options: PlanOptions | None = None) -> Plan:
    """What ``model`` takes in ``options.runtime``: a GGUF, a folder, a config.json, a hub id or a packaged name.

    No weight is read, and of a hub id only config.json is downloaded.
    Raises NotFound, BadFile, BadConfig, BadOption or Unsupported.
    """
    with open_model(model) as opened:
        return plan_open(opened, options or PlanOptions())


make_callable(__name__)
