"""What a plan says: rows of bytes with their reasons, and their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PARTS = ("weights", "kv", "scratch", "drafter", "projector", "process")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that takes memory.

    part:  the sum that it belongs to, one of PARTS: 'scratch' is the compute and output buffers, 'process' what the
           program and the vocabulary take whatever the settings
    what:  a few words ('KV cache of 4 global layers')
    bytes: how many
    why:   what makes it so, in one sentence
    found: how the number was found ('formula', "llama.cpp's own layout", 'estimate, within 20%')
    """

    part: str
    what: str
    bytes: int
    why: str
    found: str

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"a row's part is one of {', '.join(PARTS)}, not {self.part}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of one model in one runtime under one set of options.

    settings: the options as the runtime resolves them (slots, unified or not, tokens a slot, ...). notes: what else a
    reader should know, one sentence each.
    """

    model: str
    architecture: str
    runtime: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    def bytes_of(self, part: str) -> int:
        return sum(row.bytes for row in self.rows if row.part == part)

    @property
    def total_bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """model, architecture, runtime, settings, <part>_bytes of every part, total_bytes, rows, notes."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "runtime": self.runtime,
            "settings": dict(self.settings),
            **{f"{part}_bytes": self.bytes_of(part) for part in PARTS},
            "total_bytes": self.total_bytes,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }
