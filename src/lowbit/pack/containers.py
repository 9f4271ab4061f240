"""The containers that a checkpoint can be packed into, one file each: a new ``NAME_container.py`` here is a new one.

A container file defines ``RECIPE`` (the name of the recipe that it packs by if none is asked for), ``holds(grid_name)``
and ``write(checkpoint, types, out, *, file_type, naive, threads, guide, check)``; see gguf_container. Where a file says
how long the caches are, ``write`` takes ``context`` too. Where it holds the scales of static activations, it defines
``STATIC_ACTIVATIONS``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lowbit.checkpoint import Checkpoint
from lowbit.errors import BadFile, BadOption
from lowbit.pack.guide import Guide

_ENDING = "_container"
_FIRST = "gguf"  # where a recipe does not tell


class Container(Protocol):
    """What a container's module has."""

    RECIPE: str

    def holds(self, grid: str) -> bool:
        """Whether tensors can lie on the grid of that name in this container."""

    def write(
        self,
        checkpoint: Checkpoint,
        types: Mapping[str, str],
        out: Path,
        *,
        file_type: str,
        naive: bool,
        threads: int | None = None,
        guide: Guide | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> int:
        """Writes the artifact whole or not at all, and returns its size in bytes.

        types: grid name by tensor name. file_type: the recipe's name. naive: every tensor is rounded from its values.
        threads: how many work at it, by default as many as there are cores; the bytes do not depend on it.
        guide: which errors matter; a container that cannot use one raises BadOption.
        check: is given the whole artifact before it takes its name, and may refuse it by raising.
        """


def names() -> tuple[str, ...]:
    """Every container's name, as ``--to`` takes it."""
    return tuple(_containers())


def choose(to: str | None, grid: str | None) -> Container:
    """The container called ``to``; without a name the one that holds ``grid`` (None, or several: GGUF first).

    Raises BadOption where there is none of that name, or it cannot hold the grid.
    """
    found = _containers()
    if to is not None and to not in found:
        raise BadOption("no such container", found=repr(to), expected="one of " + ", ".join(found))
    order = [to] if to is not None else [_FIRST, *(name for name in found if name != _FIRST)]
    for name in order:
        if grid is None or found[name].holds(grid):
            return found[name]
    hint = f"Without --recipe it packs {found[to].RECIPE}" if to is not None else None
    if grid is not None and not any(each.holds(grid) for each in found.values()):
        hint = "No container has it yet; --recipe f32 packs the values that it stands for, exactly"
    raise BadOption("this container does not have the recipe's format", where=to, found=grid, hint=hint)


def sizes(container: Container, context: int | None) -> dict[str, Any]:
    """What ``write`` is given beyond the usual. Raises BadOption for a context where the file holds no caches."""
    if context is None:
        return {}
    if "context" not in inspect.signature(container.write).parameters:
        hint = "The runtime is told when it loads the file"
        raise BadOption("only LiteRT-LM's files have a context of their own", found=context, hint=hint)
    return {"context": context}


@functools.cache
def _containers() -> dict[str, Container]:
    package = importlib.import_module(__package__)
    modules = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.endswith(_ENDING))
    return {m.removesuffix(_ENDING).replace("_", "-"): _load(f"{__package__}.{m}") for m in modules}


def _load(module_name: str) -> Container:
    module = importlib.import_module(module_name)
    for attribute in ("RECIPE", "holds", "write"):
        if not hasattr(module, attribute):
            raise BadFile("a container misses part of its contract", where=module_name, expected=attribute)
    return module  # type: ignore[return-value]
