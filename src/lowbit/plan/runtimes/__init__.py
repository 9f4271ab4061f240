"""Runtimes that can be planned for, one file each, found by file name. A file defines ``RUNTIME``, a base.Runtime."""

from __future__ import annotations

import functools

from lowbit import registry
from lowbit.errors import BadOption
from lowbit.plan.runtimes.base import Runtime

__all__ = ["Runtime", "get", "names"]


@functools.cache
def _runtimes() -> dict[str, Runtime]:
    return registry.instances(__name__, "RUNTIME", Runtime, has=("name", "kv_types"))  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """The runtimes there are, as people write them."""
    return tuple(runtime.name for runtime in _runtimes().values())


def get(name: str) -> Runtime:
    """The runtime of that name ('llama.cpp', 'llama_cpp'). Raises BadOption, which lists the names, for another."""
    runtime = _runtimes().get(registry.file_name(name))
    if runtime is None:
        raise BadOption("no such runtime", found=repr(name)[:40], expected="one of " + ", ".join(names()))
    return runtime
