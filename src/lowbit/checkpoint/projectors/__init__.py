"""Vision towers and projectors, one file a model family, found by file name. A file defines ``PROJECTOR``, an instance
of base.Projector."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from lowbit.checkpoint.projectors.base import Projector
from lowbit.errors import Unsupported

__all__ = ["Projector", "by_config", "names"]


@functools.cache
def _projectors() -> dict[str, Projector]:
    modules = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("base", "preprocessor")]
    found = {name: getattr(importlib.import_module(f"{__name__}.{name}"), "PROJECTOR", None) for name in modules}
    for name, projector in found.items():
        if not isinstance(projector, Projector) or projector.name != name:
            raise TypeError(f"projectors/{name}.py must define PROJECTOR, a Projector of that name")
    return {name: projector for name, projector in found.items() if projector is not None}


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
