"""The contract of a runtime in a plan: what it allocates for a model under given options, row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lowbit.plan.model import PlanModel
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Plan, Row
from lowbit.units import GIB


class Runtime(ABC):
    """One runtime; a subclass sets the class variables and writes the methods.

    name:     as people write it ('llama.cpp'); its file is called the same with underscores
    kv_types: the types that keys and values can be cached in, the default first
    usual_kv_types, recipes: those that a table of what fits has; recipes are the formats of a family's models
    margin_why: why ``margin`` is what it is
    """

    name: ClassVar[str]
    kv_types: ClassVar[tuple[str, ...]]
    usual_kv_types: ClassVar[tuple[str, ...]]
    recipes: ClassVar[tuple[str, ...]]
    margin_why: ClassVar[str]

    def margin(self, room: int) -> int:
        """Bytes of ``room`` that stay free where nobody says how many."""
        return GIB

    def resident(self, plan: Plan, *, gpu: bool) -> tuple[Row, ...]:
        """The rows of a plan that must be in memory at once; in a GPU's the program itself is not."""
        return tuple(row for row in plan.rows if not (gpu and row.part == "process"))

    @abstractmethod
    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        """The options as the runtime resolves them, as JSON; at least ``context``, ``context_per_slot`` and ``slots``,
        and what else decides a size. Raises BadOption for what the runtime refuses or does not have."""

    @abstractmethod
    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        """What is allocated. Cheap to call again for other options: what is prepared once is kept with the model
        (``PlanModel.keep``). Raises BadOption as ``settings`` does, Unsupported for a model that it does not run."""

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        """What else a reader should know, a sentence each."""
        return ()
