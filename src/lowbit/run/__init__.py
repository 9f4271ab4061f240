"""Runtimes: one file each, what an artifact is executed in, all behind the contract of base.py.

``open_artifact`` opens a file, a folder or a URL in the runtime that it is for, or in the one that is named.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import registry
from lowbit.errors import BadOption, NotFound, Unsupported

if TYPE_CHECKING:
    from lowbit.run.base import Runtime

__all__ = ["discover", "existing", "get", "is_url", "open_artifact", "options_of", "runtime_for", "runtimes"]


def open_artifact(target: str | os.PathLike[str], runtime: str | None = None, **options: Any) -> Runtime:
    """Opens an artifact in the runtime that it is for: a GGUF in llama.cpp, an MLX folder in MLX, another Hugging Face
    folder in transformers, a .litertlm in LiteRT-LM, an http(s) URL as an OpenAI-compatible endpoint.

    target:  path or URL; also a packaged model's name or a hub id, as ``checkpoint.resolve`` has them
    runtime: a name of ``runtimes()``, where another than the default is to run it
    options: of the runtime's constructor (context, ubatch, threads, kv_type, ...); None leaves one at its default

    Raises NotFound (no such artifact, runtime not installed), Unsupported (no runtime for it), BadOption (unknown
    runtime, an option that the runtime does not have), and what the runtime raises.
    """
    target = existing(target)
    chosen = runtime_for(target, runtime)
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(options_of(chosen))):
        raise BadOption(
            f"{chosen.name} has no option {unknown[0]}",
            where=target,
            found=given[unknown[0]],
            expected=", ".join(options_of(chosen)),
        )
    return chosen(target, **given)  # type: ignore[call-arg]


def runtime_for(target: str | os.PathLike[str], runtime: str | None = None) -> type[Runtime]:
    """The runtime that ``open_artifact`` opens ``target`` in. Raises Unsupported, BadOption."""
    from lowbit.run.base import Suits

    if runtime is not None:
        chosen = get(runtime)
        if chosen.suits(target) is Suits.NO:
            raise Unsupported(f"{chosen.name} does not run this", where=target, expected=_who_runs(target))
        return chosen
    best = max(runtimes().values(), key=lambda kind: kind.suits(target))
    if best.suits(target) is not Suits.BY_DEFAULT:
        expected = "a GGUF, an MLX or Hugging Face folder, a .litertlm or an http(s) URL"
        found = _first_bytes(target)
        raise Unsupported("no runtime is known for this", where=target, found=found, expected=expected)
    return best


def _first_bytes(target: str | os.PathLike[str]) -> str | None:
    try:
        with open(target, "rb") as file:
            return f"the first bytes {file.read(4)!r}"
    except OSError:
        return None


def get(name: str) -> type[Runtime]:
    """The runtime of that name, also with - or _ for its other signs. Raises BadOption, which lists the names."""
    wanted = registry.file_name(name)
    for known, runtime in runtimes().items():
        if registry.file_name(known) == wanted:
            return runtime
    raise BadOption("no such runtime", found=repr(name), expected="one of " + ", ".join(runtimes()))


@functools.cache
def runtimes() -> dict[str, type[Runtime]]:
    """Every runtime by name, installed or not (``Runtime.installed`` tells)."""
    return discover(__name__)


def discover(package: str) -> dict[str, type[Runtime]]:
    """The runtimes that the files of ``package`` define, by name. Raises BadFile where one breaks the contract."""
    from lowbit.run.base import Runtime

    found = registry.classes(package, "RUNTIME", Runtime)  # type: ignore[type-abstract]
    return {runtime.name: runtime for runtime in found.values()}


def options_of(runtime: type[Runtime]) -> tuple[str, ...]:
    """Names of the keyword options that its constructor takes, or of the dataclass that they make."""
    if runtime.options_class is not None:
        return tuple(field.name for field in dataclasses.fields(runtime.options_class))
    parameters = inspect.signature(runtime).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def existing(target: str | os.PathLike[str]) -> str | Path:
    """What a target means: a URL as it is, a path, or the path of a packaged model's name or a hub id.

    A path with a suffix may name nothing; whoever opens it says so. Raises NotFound.
    """
    from lowbit.checkpoint import resolve

    if is_url(target):
        return str(target)
    path = Path(target).expanduser()
    if path.exists() or path.suffix:
        return path
    return resolve(os.fspath(target))


def is_url(target: str | os.PathLike[str]) -> bool:
    """An http(s) URL?"""
    return isinstance(target, str) and target.lower().startswith(("http://", "https://"))


def _who_runs(target: str | os.PathLike[str]) -> str:
    names = [name for name, runtime in runtimes().items() if runtime.suits(target)]
    if not names and not Path(target).exists():
        raise NotFound("no such file or folder", where=target)
    return "one of " + ", ".join(names) if names else "another file"
