"""The checks of a release, one file each, found by file name: a new file here is a new check."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from lowbit.errors import BadFile, BadOption
from lowbit.release.checks.base import Check

__all__ = ["Check", "all_checks", "chosen", "discover"]


@functools.cache
def all_checks() -> tuple[Check, ...]:
    """Every check, those that others wait for before them."""
    return discover(importlib.import_module(__name__))


def discover(package: ModuleType) -> tuple[Check, ...]:
    """The checks that the files of ``package`` define. Raises BadFile where one misses part of its contract."""
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base" and m.name[0] != "_")
    checks = sorted((_load(f"{package.__name__}.{name}", name) for name in names), key=lambda check: check.rank)
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


def _load(module_name: str, file_name: str) -> Check:
    module = importlib.import_module(module_name)
    where = module.__file__ or module_name
    kind = getattr(module, "CHECK", None)
    if not isinstance(kind, type) or not issubclass(kind, Check):
        raise BadFile("a check's file needs CHECK, a subclass of checks.base.Check", where=where)
    missing = sorted(kind.__abstractmethods__) + [k for k in ("question", "rank") if not hasattr(kind, k)]
    if missing:
        raise BadFile("a check misses part of its contract", where=where, found=f"no {', '.join(missing)}")
    name = getattr(kind, "name", None)
    if name != file_name.replace("_", "-"):
        raise BadFile("a check's name is its file's", where=where, found=name, expected=file_name.replace("_", "-"))
    return kind()
