"""What the files of a folder define, found by file name: a new file is a new grid, family, runtime, dialect, check, ...

Each file has one name that all of them have (``GRID``, ``FAMILY``, ...): an instance, or a class, of the folder's
contract, called as its file is. Files that begin with _, packages and ``base`` are what the others share.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import Any, TypeVar

from lowbit.errors import BadFile

T = TypeVar("T")


def instances(
    package: str, attribute: str, contract: type[T], *, has: tuple[str, ...] = (), shared: tuple[str, ...] = ()
) -> dict[str, T]:
    """{file name: instance of ``contract``} of a package. has: attributes that each must have. shared: more files that
    define none.

    Raises BadFile for a file that misses part of the contract.
    """
    found = {}
    for name, where, value in _values(package, attribute, shared):
        if not isinstance(value, contract):
            needs = f"{name}.py needs {attribute}, an instance of {_spelled(contract)}"
            raise BadFile(needs, where=where, found=type(value).__name__)
        _whole(attribute, where, [key for key in has if not hasattr(value, key)])
        found[name] = _called(value, name, where, "name")
    return found


def classes(
    package: str, attribute: str, contract: type[T], *, has: tuple[str, ...] = (), named: str = "name"
) -> dict[str, type[T]]:
    """{file name: subclass of ``contract``} of a package. has: attributes that each must have. named: the one
    that is the file's name.

    Raises BadFile for a file that misses part of the contract.
    """
    found = {}
    for name, where, value in _values(package, attribute, ()):
        if not isinstance(value, type) or not issubclass(value, contract):
            raise BadFile(f"{name}.py needs {attribute}, a subclass of {_spelled(contract)}", where=where)
        missing = sorted(getattr(value, "__abstractmethods__", ())) + [key for key in has if not hasattr(value, key)]
        _whole(attribute, where, missing)
        found[name] = _called(value, name, where, named)
    return found


def file_name(name: str) -> str:
    """'llama.cpp' is in llama_cpp.py."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _values(package: str, attribute: str, shared: tuple[str, ...]) -> list[tuple[str, str, Any]]:
    path = importlib.import_module(package).__path__
    files = sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    found = []
    for name in files:
        if name == "base" or name.startswith("_") or name in shared:
            continue
        try:
            module = importlib.import_module(f"{package}.{name}")
        except TypeError as error:  # an instance of a subclass that is still abstract: the message names what it lacks
            raise BadFile("misses part of its contract", where=f"{package}.{name}", found=error) from error
        found.append((name, module.__file__ or module.__name__, getattr(module, attribute, None)))
    return found


def _whole(attribute: str, where: str, missing: list[str]) -> None:
    if missing:
        raise BadFile(f"{attribute} misses part of its contract", where=where, found=f"no {', '.join(missing)}")


def _called(value: Any, name: str, where: str, named: str) -> Any:
    called = getattr(value, named, None)
    if not isinstance(called, str) or file_name(called) != name:
        raise BadFile(f"the {named} of what a file defines is its file's", where=where, found=called, expected=name)
    return value


def _spelled(contract: type) -> str:
    return f"{contract.__module__}.{contract.__qualname__}"
