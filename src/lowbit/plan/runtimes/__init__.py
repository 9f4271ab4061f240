"""Runtimes that can be planned for, one file each, found by file name. A file defines ``RUNTIME``, a base.Runtime."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re

from lowbit.errors import BadOption
from lowbit.plan.runtimes.base import Runtime

__all__ = ["Runtime", "get", "names"]


@functools.cache
def _runtimes() -> dict[str, Runtime]:
    found: dict[str, Runtime] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name == "base" or module_info.name.startswith("_"):
            continue
        runtime = getattr(importlib.import_module(f"{__name__}.{module_info.name}"), "RUNTIME", None)
        if not isinstance(runtime, Runtime) or _file_name(runtime.name) != module_info.name or not runtime.kv_types:
            what = "must define RUNTIME, a Runtime with its KV types, whose name is the file's"
            raise TypeError(f"plan/runtimes/{module_info.name}.py {what}")
        found[module_info.name] = runtime
    return found


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def names() -> tuple[str, ...]:
    """The runtimes there are, as people write them."""
    return tuple(runtime.name for runtime in _runtimes().values())


def get(name: str) -> Runtime:
    """The runtime of that name ('llama.cpp', 'llama_cpp'). Raises BadOption, which lists the names, for another."""
    runtime = _runtimes().get(_file_name(name))
    if runtime is None:
        raise BadOption("no such runtime", found=repr(name)[:40], expected="one of " + ", ".join(names()))
    return runtime
