"""The public models of a family, as data: what their config.json says, and how many parameters were published.

One JSON file a family, found by its name: ``name``, ``sources`` and ``models``; of each model its name, hub id, config
and published parameters. The numbers are facts about the models; tests compare them with the published counts.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One public model. parameters: as published; counted: what of the model that count is of."""

    name: str
    family: str
    hub_id: str
    parameters: int
    counted: str
    config: Mapping[str, Any]
    path: Path


@functools.cache
def listed() -> tuple[Listed, ...]:
    """Every model, family by family, the smallest first."""
    found = []
    for path in sorted(_HERE.glob("*.json")):
        family = json.loads(path.read_text(encoding="utf-8"))
        if family.get("name") != path.stem or not family.get("sources"):
            raise TypeError(f"plan/catalogue/{path.name} must have its own name and its sources")
        found += [Listed(family=path.stem, path=path, **model) for model in family["models"]]
    return tuple(found)


def families() -> tuple[str, ...]:
    """The families' names, as people write them."""
    return tuple(dict.fromkeys(model.family for model in listed()))


def find(name: str) -> tuple[Listed, ...]:
    """The models that ``name`` means: one of a model's name ('gemma-4-e2b', 'Gemma 4 E2B') or hub id, several of a
    family's name or of the beginning of some ('gemma4', 'llama-3.2'), none where it means nothing here."""
    wanted = _plain(name)
    for model in listed():
        if name == model.hub_id or wanted == _plain(model.name):
            return (model,)
    return tuple(m for m in listed() if wanted in (_plain(m.family), *_beginnings(m.name)))


def near(name: str) -> tuple[str, ...]:
    """Names that ``name`` may be a misspelling of."""
    names = {_plain(word): word for word in (*families(), *(model.name for model in listed()))}
    return tuple(names[word] for word in difflib.get_close_matches(_plain(name), names, n=3, cutoff=0.7))


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]+", "", name.lower())


def _beginnings(name: str) -> set[str]:
    """'llama-3.2-1b' begins with 'llama3.2' and 'llama', not with 'lla'."""
    parts = re.split(r"(?<=[a-z])(?=\d)|[\s_-]+", name)
    return {_plain("".join(parts[: i + 1])) for i in range(len(parts) - 1)}
