"""Model families, one file each, found by file name. A file defines ``FAMILY``, an instance of base.Family."""

from __future__ import annotations

import functools
from typing import Any

from lowbit import registry
from lowbit.checkpoint.families.base import Family
from lowbit.errors import BadConfig, Unsupported

__all__ = ["Family", "by_arch", "by_config", "names"]


@functools.cache
def _families() -> dict[str, Family]:
    return registry.instances(__name__, "FAMILY", Family)  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """The families there are."""
    return tuple(_families())


def by_config(config: dict[str, Any], where: object, *, to_plan: bool = False) -> Family:
    """The family of a Hugging Face config, by ``model_type`` and ``architectures``. to_plan: also one that can be
    planned for and nothing else."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadConfig("missing key model_type", where=where, hint="Is this a Hugging Face model's config.json?")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        what, found = "bad value for architectures", repr(architectures)[:60]
        raise BadConfig(what, where=where, found=found, expected="a list of class names")
    for family in _families().values():
        if model_type in family.model_types and set(architectures) <= set(family.architectures):
            return _usable(family, where, to_plan)
    usable = [family for family in _families().values() if to_plan or family.packs]
    supported = [name for family in usable for name in family.architectures]
    found = ", ".join(map(str, architectures)) or f"model_type {model_type}"
    raise _unsupported(where, found, supported)


def by_arch(arch: object, where: object, *, to_plan: bool = False) -> Family:
    """The family of a GGUF's ``general.architecture``."""
    for family in _families().values():
        if family.arch == arch:
            return _usable(family, where, to_plan)
    usable = [family for family in _families().values() if to_plan or family.packs]
    raise _unsupported(where, str(arch)[:60], [family.arch for family in usable])


def _usable(family: Family, where: object, to_plan: bool) -> Family:
    if not family.packs and not to_plan:
        hint = "lowbit plan says what it takes; llama.cpp's own converter packs it"
        raise Unsupported("lowbit only plans for models of this family", where=where, found=family.name, hint=hint)
    return family


def _unsupported(where: object, found: str, supported: list[str]) -> Unsupported:
    expected = f"one of {', '.join(supported)}"
    hint = "Models fine-tuned from one of these are supported too"
    return Unsupported("unsupported architecture", where=where, found=found, expected=expected, hint=hint)
