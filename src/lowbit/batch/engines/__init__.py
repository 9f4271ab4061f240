"""Engines: one file each, what answers a batch's requests, all behind the contract of base.py, found by name."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from lowbit.batch.engines.base import Engine, EngineOptions
from lowbit.errors import BadFile, BadOption

__all__ = ["Engine", "EngineOptions", "engines", "open_engine"]


@functools.cache
def engines() -> dict[str, type[Engine]]:
    """Every engine by name. Raises BadFile where a file breaks the contract."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: _load(name) for name in found if name != "base" and name[0] != "_"}


def open_engine(options: EngineOptions, name: str | None = None) -> Engine:
    """The engine of that name, or the one that suits the options; not yet entered. Raises BadOption."""
    known = engines()
    if name is not None:
        if name not in known:
            raise BadOption("no such engine", found=repr(name)[:60], expected=", ".join(known))
        return known[name](options)
    found = [kind for kind in known.values() if kind.suits(options)]
    if len(found) != 1:
        raise BadOption(
            "what is to answer?", expected="--model MODEL, which is started here, or --endpoint URL, and not both"
        )
    return found[0](options)


def _load(name: str) -> type[Engine]:
    module = importlib.import_module(f"{__name__}.{name}")
    engine = getattr(module, "ENGINE", None)
    where = module.__file__ or name
    if not isinstance(engine, type) or not issubclass(engine, Engine):
        raise BadFile("an engine's file needs ENGINE, a subclass of lowbit.batch.engines.base.Engine", where=where)
    if missing := sorted(engine.__abstractmethods__):
        raise BadFile("an engine misses part of its contract", where=where, found=f"no {', '.join(missing)}")
    if getattr(engine, "name", None) != name:
        raise BadFile("an engine's name is its file's", where=where, found=getattr(engine, "name", None), expected=name)
    return engine
