"""Tool-call syntaxes, one file each, found by file name. A file defines ``DIALECT``, an instance of base.Dialect."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from lowbit.errors import BadOption
from lowbit.harness.dialects.base import Dialect

__all__ = ["Dialect", "get", "likely", "names", "of_template"]


@functools.cache
def _dialects() -> dict[str, Dialect]:
    found: dict[str, Dialect] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name == "base" or module_info.name.startswith("_"):  # what dialects share
            continue
        dialect = getattr(importlib.import_module(f"{__name__}.{module_info.name}"), "DIALECT", None)
        if not isinstance(dialect, Dialect) or dialect.name != module_info.name:
            raise TypeError(f"dialects/{module_info.name}.py must define DIALECT, a Dialect of that name")
        found[dialect.name] = dialect
    return found


def names() -> tuple[str, ...]:
    """The dialects there are."""
    return tuple(_dialects())


def of_template(template: str) -> str | None:
    """The dialect that a chat template writes calls in, told by the marks that the template itself spells; of one
    without tools, the one that its models were taught by prompts, or None."""
    found = [d for d in _dialects().values() if d.marks and all(mark in template for mark in d.marks)]
    if found:
        return max(found, key=lambda d: len("".join(d.marks))).name
    if "tools" in template:
        return "bare_json"
    return "gemma3" if "<start_of_turn>" in template else None


def likely(text: str) -> tuple[str, ...]:
    """The dialects that a text may be in: those whose marks it has, then those that have none."""
    marked = [d.name for d in _dialects().values() if any(mark in text for mark in d.marks)]
    return (*marked, *(d.name for d in _dialects().values() if not d.marks))


def get(name: str) -> Dialect:
    """Raises BadOption for a name that there is not."""
    try:
        return _dialects()[name]
    except KeyError:
        raise BadOption("unknown dialect", found=name[:60], expected=", ".join(names())) from None
