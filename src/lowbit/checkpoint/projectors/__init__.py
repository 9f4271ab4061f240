"""Vision towers and projectors, one file a model family, found by file name. A file defines ``PROJECTOR``, an instance
of base.Projector."""

from __future__ import annotations

import functools
from typing import Any

from lowbit import registry
from lowbit.checkpoint.projectors.base import Projector
from lowbit.errors import Unsupported

__all__ = ["Projector", "by_config", "names"]


@functools.cache
def _projectors() -> dict[str, Projector]:
    return registry.instances(__name__, "PROJECTOR", Projector, shared=("preprocessor",))  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """The projectors there are."""
    return tuple(_projectors())


def by_config(config: dict[str, Any], where: object) -> Projector:
    """The projector of a Hugging Face config, by ``model_type``. Raises Unsupported where the model has no tower that
    lowbit knows."""
    model_type = config.get("model_type")
    projector = next((p for p in _projectors().values() if model_type in p.model_types), None)
    if projector is None or not any(isinstance(config.get(part), dict) for part in projector.parts):
        expected = ", ".join(name for p in _projectors().values() for name in p.architectures)
        raise Unsupported(
            "the checkpoint has no vision or audio tower that lowbit packs",
            where=where, found=f"model_type {model_type}"[:60], expected=expected,
            hint="Without --mmproj the text model is packed",
        )  # fmt: skip
    return projector
