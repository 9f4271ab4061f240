"""The key that callers must send, out of a file."""

from __future__ import annotations

from pathlib import Path

from lowbit.errors import BadFile, NotFound

_LONGEST = 4096


def key_in(path: Path) -> str:
    """The one line of a file. Raises NotFound; BadFile, which never shows what the file holds."""
    try:
        with open(path, "rb") as handle:
            raw = handle.read(_LONGEST + 1)
    except OSError as error:
        raise NotFound(f"cannot read the key: {error.strerror or error}", where=path) from None
    lines = raw.decode("utf-8", "replace").split()
    if len(raw) > _LONGEST or len(lines) != 1 or not lines[0].isascii():
        raise BadFile("not a file with one key", where=path, expected="one line of ASCII without spaces")
    return lines[0]
