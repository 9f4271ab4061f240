"""What a training run has done: its stages, how long each took, and what it found out on the way; survives a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, BadOption
from lowbit.files import write_json

_TICK = 5.0  # seconds between two notes of a stage that goes on


@dataclass
class Ledger:
    """What the run has done and how long each stage took, in ``work/ledger.json``; survives a kill.

    stages: seconds of each stage that is done. earlier: seconds that killed processes had spent in stages they did
    not end. facts: what the run found out. keeps: whether this process is the one that writes the file.
    """

    path: Path
    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, float] = field(default_factory=dict)
    keeps: bool = True
    _open: tuple[str, float] | None = None  # the stage now running and when it began
    _ticked: float = 0.0

    @classmethod
    def open(cls, path: Path, key: str, *, keeps: bool = True) -> Ledger:
        """Raises BadOption where the folder holds another run's work."""
        if not path.exists():
            return cls(path, facts={"key": key}, keeps=keeps)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            held, stages, facts = saved["facts"]["key"], dict(saved["stages"]), dict(saved["facts"])
            earlier = dict(saved.get("unfinished", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile("not a ledger of a run", where=path, hint="Remove the folder and run again") from error
        if held != key:
            hint = "Choose another --out, or remove the folder to start again"
            raise BadOption(
                "the folder holds a run of another model or with other options", where=path.parent, hint=hint
            )
        return cls(path, stages, facts, earlier, keeps)

    def spent(self) -> float:
        """Seconds behind the run, without those of the stage now running in this process."""
        return sum(self.stages.values()) + sum(self.earlier.values())

    def save(self) -> None:
        if not self.keeps:
            return
        unfinished = dict(self.earlier)
        if self._open is not None:
            name, start = self._open
            unfinished[name] = unfinished.get(name, 0.0) + time.monotonic() - start
        write_json(self.path, {"stages": self.stages, "facts": self.facts, "unfinished": unfinished})

    def tick(self) -> None:
        """Call now and then inside a long stage: its time counts also where the process is killed."""
        if time.monotonic() - self._ticked > _TICK:
            self._ticked = time.monotonic()
            self.save()

    @contextmanager
    def stage(self, name: str, start: float | None = None) -> Iterator[None]:
        """Times a stage; it counts as done when the block ends without an error."""
        start = self._ticked = time.monotonic() if start is None else start
        self._open = (name, start)
        try:
            yield
            seconds = self.earlier.pop(name, 0.0) + time.monotonic() - start
            self.stages[name] = self.stages.get(name, 0.0) + seconds
        finally:
            self._open = None
        self.save()

    def done(self, name: str) -> bool:
        return name in self.stages
