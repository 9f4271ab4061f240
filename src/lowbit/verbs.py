"""Lets a verb be a package and a function at once: ``lowbit.pack.recipe`` is a module, ``lowbit.pack(...)`` a call."""

from __future__ import annotations

import sys
import types
from typing import Any


class _Verb(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module_name: str) -> None:
    """Makes the module call its function of the same name; the last line of a verb's ``__init__.py`` or module."""
    sys.modules[module_name].__class__ = _Verb
