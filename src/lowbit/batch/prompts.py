"""What people give as a template or a schema: a file, or the thing itself."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.harness import BadRequest
from lowbit.harness.asking import checker, reader
from lowbit.harness.structured import Schema
from lowbit.units import MIB

_LARGEST = 4 * MIB
_MODEL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def template(given: str, *, plain: bool = False) -> str:
    """A file's text, or what is itself a template; plain: or any text. Raises NotFound, BadFile."""
    path = Path(given)
    if "{{" in given or "{%" in given or (plain and not _is_file(path)):
        return given
    if not _is_file(path):
        raise NotFound(
            "neither a file nor a template", where=given[:200], expected='a file, or text with "{{ column }}"'
        )
    return _text(path)


def schema(given: str) -> tuple[Any, str, Any]:
    """(JSON Schema, its name, what else is to be checked, or None) of a file, or of module:Model.

    The module is imported, with the working folder on the path, as pytest and uvicorn do. Raises NotFound, BadFile,
    BadOption.
    """
    path = Path(given)
    if not path.is_file() and _MODEL.fullmatch(given):
        return _of_model(given)
    if not path.is_file():
        raise NotFound("no such schema", where=given[:200], expected="a file of JSON Schema, or module:Model")
    try:
        raw = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise BadFile("not JSON", where=path, found=str(error)) from None
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem.partition(".")[0]) or "answer"
    return _checked(raw, given), name, None


def _of_model(given: str) -> tuple[Any, str, Any]:
    module_name, _, name = given.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise NotFound("the module cannot be imported", where=given, found=str(error)) from None
    except AttributeError:
        raise NotFound("no such model in the module", where=given) from None
    try:
        read, made, model_name = reader(found)
    except BadRequest:
        raise BadOption("no Pydantic model", where=given, found=type(found).__name__) from None
    return _checked(made, given), model_name, checker(read)


def _checked(raw: Any, given: str) -> Any:
    try:
        Schema.read(raw, given)
    except BadRequest as error:
        raise BadOption(error.message, where="--schema") from None
    return raw


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise BadFile("too large", where=path, found=path.stat().st_size, expected=f"at most {_LARGEST} bytes")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError as error:
        raise BadFile("not UTF-8", where=path, found=f"at byte {error.start}") from None
