"""Engines: one file each, what answers a batch's requests, all behind the contract of base.py, found by name."""

from __future__ import annotations

import functools

from lowbit import registry
from lowbit.batch.engines.base import Engine, EngineOptions
from lowbit.errors import BadOption

__all__ = ["Engine", "EngineOptions", "engines", "open_engine"]


@functools.cache
def engines() -> dict[str, type[Engine]]:
    """Every engine by name. Raises BadFile where a file breaks the contract."""
    return registry.classes(__name__, "ENGINE", Engine)  # type: ignore[type-abstract]


def open_engine(options: EngineOptions, name: str | None = None) -> Engine:
    """The engine of that name, or the one that suits the options; not yet entered. Raises BadOption."""
    known = engines()
    if options.ray_address is not None and name != "ray":
        raise BadOption("--ray-address without a cluster", found=f"--engine {name}" if name else "no --engine",
                        expected="--engine ray")  # fmt: skip
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
