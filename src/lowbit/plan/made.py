"""A plan of an open model: the runtime's rows under its settings."""

from __future__ import annotations

from dataclasses import replace

from lowbit.plan import runtimes
from lowbit.plan.model import PlanModel
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan


def plan_open(model: PlanModel, options: PlanOptions) -> Plan:
    """The same for an open model: for those who ask for many options."""
    runtime = runtimes.get(options.runtime)
    default = runtime.kv_types[0]
    options = replace(options, kv_type_k=options.kv_type_k or default, kv_type_v=options.kv_type_v or default)
    settings = runtime.settings(model, options)
    return Plan(
        model=model.name,
        architecture=model.architecture,
        runtime=runtime.name,
        settings=settings,
        rows=runtime.rows(model, options),
        notes=(*runtime.notes(model, options), *filter(None, [model.remark])),
    )
