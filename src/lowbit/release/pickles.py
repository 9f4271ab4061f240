"""Files that run code when they are opened: Python pickles, under whatever name, alone or in a zip.

PyTorch's .bin, .pt and .pth are pickles (a zip with data.pkl in it since 1.6, a bare stream before), and so are numpy's
arrays of objects. A file is told by its first bytes and by its structure, never loaded.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
_WEIGHTS = re.compile(r"(pytorch_model|adapter_model|model|consolidated|training_args|optimizer|scheduler).*\.bin")
_LOOKED_AT = 1 << 20
_MOST_ENTRIES = 20_000
_CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX")
_SAFE_STARTS = (b"GGUF", b"{", b"[", b"\x89PNG", b"\xff\xd8\xff", b"%PDF", b"LITERTLM")


def told_as_pickle(path: Path) -> str | None:
    """Why the file is refused ('a pickle', 'a zip with data.pkl in it', ...); None where it is none. Raises OSError."""
    name = path.name.lower()
    with open(path, "rb") as handle:
        head = handle.read(_LOOKED_AT)
    if zipfile.is_zipfile(path) and (inside := _pickle_in_zip(path)) is not None:
        return inside
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5 and _is_stream(head):
        return "a pickle"
    if head.startswith(b"\x93NUMPY"):
        return "a numpy array of objects, which is a pickle" if b"|O" in head[:256] else None
    if name.endswith(_SUFFIXES):
        return f"a {path.suffix} file, which is opened as a pickle"
    if _WEIGHTS.fullmatch(name):
        return "weights in a .bin file, which are opened as a pickle"
    if not head.startswith(_SAFE_STARTS) and _is_stream(head):
        return "a pickle"
    return None


def _pickle_in_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_ENTRIES:
                return f"a zip of {len(entries):,} entries"
            for entry in entries:
                if entry.filename.lower().endswith((".pkl", ".pickle")):
                    return f"a zip with {entry.filename[:40]} in it, which is a pickle"
                if entry.file_size and not entry.flag_bits & 1:
                    with archive.open(entry) as handle:
                        start = handle.read(4096)
                    if start[:1] == b"\x80" and _is_stream(start, whole=entry.file_size <= len(start)):
                        return f"a zip with a pickle in it, {entry.filename[:40]}"
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, RuntimeError) as error:
        return f"a zip that cannot be looked into ({type(error).__name__})"
    return None


def _is_stream(head: bytes, *, whole: bool = False) -> bool:
    """Whether the bytes are a pickle's instructions and call something, as far as they are there. Nothing is run."""
    called = False
    try:
        for n, (code, _, _) in enumerate(pickletools.genops(head)):
            called = called or code.name in _CALLS
            if code.name == "STOP":
                return called or head[:1] == b"\x80"
            if n > 10_000:
                return called
    except Exception:  # genops raises what it likes on bytes that are no pickle
        # A stream that was cut off after calls is one still: a pickle of tensors is longer than what is looked at.
        return called and head[:1] == b"\x80" and not whole
    return False
