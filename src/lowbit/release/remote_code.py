"""Files and settings that make a loader run a stranger's Python: auto_map, model_file, *.py beside a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Key -> what loads its code.
KEYS = {
    "auto_map": "transformers with trust_remote_code",
    "model_file": "mlx-lm",
    "custom_pipelines": "transformers with trust_remote_code",
    "custom_generate": "transformers with trust_remote_code",
    "trust_remote_code": "a loader that believes the file",
}
_BINARIES = (".so", ".dll", ".dylib", ".pyd", ".pyc", ".exe")
_MODEL_CODE = re.compile(
    r"(modeling|modelling|configuration|tokenization|processing|image_processing|video_processing|feature_extraction|"
    r"generation|pipeline|custom_generate)_?.*\.py"
)
_MODEL_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
_MOST_BYTES = 64 << 20
_DEEPEST = 40


def told_as_code(path: Path) -> str | None:
    """Why a file is refused by its name and place; None where it is no code of a model."""
    low = path.name.lower()
    if low.endswith(_BINARIES) or re.search(r"\.so\.\d+$", low):
        return "a program in machine code"
    if not low.endswith(".py"):
        return None
    if _MODEL_CODE.fullmatch(low):
        return "Python code of a model"
    beside = next((name for name in _MODEL_FILES if (path.parent / name).exists()), None)
    return f"Python code beside {beside}" if beside else None


def keys_of_code(path: Path) -> Iterator[str]:
    """Sentences about the keys of a JSON file that name code. Raises OSError."""
    if path.stat().st_size > _MOST_BYTES or path.name == "tokenizer.json":
        return  # weights' indexes and vocabularies have no such keys; tokenizers reads its own strictly
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # what needs the file says that it is broken
    yield from _keys(value, 0)


def _keys(value: Any, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in KEYS and inner not in (None, False, {}, []):
                yield f"{key} = {json.dumps(inner)[:60]}, which {KEYS[key]} runs"
            else:
                yield from _keys(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value[:1000]:
            yield from _keys(inner, depth + 1)
