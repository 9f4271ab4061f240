"""The checks of a release, one file each, found by file name: a new file here is a new check."""

from __future__ import annotations

import functools

from lowbit import registry
from lowbit.errors import BadFile, BadOption
from lowbit.release.checks.base import Check

__all__ = ["Check", "all_checks", "chosen", "discover"]


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check, those that others wait for before them."""
    return discover(__name__)


def discover(package: str) -> tuple[Check, ...]:
    """The checks that the files of ``package`` define. Raises BadFile where one misses part of its contract."""
    found = registry.classes(package, "CHECK", Check, has=("question", "rank"))  # type: ignore[type-abstract]
    checks = sorted((kind() for kind in found.values()), key=lambda check: check.rank)
    seen: set[str] = set()
    for check in checks:
        if late := set(check.after) - seen:
            raise BadFile("a check waits for one that does not come before it", where=check.name, found=sorted(late))
        seen.add(check.name)
    return tuple(checks)


def chosen(only: tuple[str, ...], skip: tuple[str, ...]) -> frozenset[str]:
    """The names that ``--only`` and ``--skip`` leave, with - or _. Raises BadOption, which lists the names."""
    known = [check.name for check in all_checks()]
    asked = {name: name.strip().lower().replace("_", "-") for name in (*only, *skip)}
    for name, spelled in asked.items():
        if spelled not in known:
            raise BadOption("no such check", found=repr(name), expected="one of " + ", ".join(known))
    wanted = {asked[name] for name in only} or set(known)
    return frozenset(wanted - {asked[name] for name in skip})
