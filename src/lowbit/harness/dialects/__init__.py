"""Tool-call syntaxes, one file each, found by file name. A file defines ``DIALECT``, an instance of base.Dialect."""

from __future__ import annotations

import functools

from lowbit import registry
from lowbit.errors import BadOption
from lowbit.harness.dialects.base import Dialect

__all__ = ["Dialect", "get", "likely", "names", "of_template"]


@functools.cache
def _dialects() -> dict[str, Dialect]:
    return registry.instances(__name__, "DIALECT", Dialect)  # type: ignore[type-abstract]


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
