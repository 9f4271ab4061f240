"""How long the long measurements may take."""

from __future__ import annotations

from lowbit.measure.journal import Journal


class Budget:
    """Seconds for the cells of one section; what earlier runs spent counts. None is no limit.

    At least one cell is always measured; a cell that is begun is finished.
    """

    def __init__(self, journal: Journal, prefix: str, seconds: float | None) -> None:
        self._journal, self._prefix, self._seconds = journal, prefix, seconds

    def left(self, names: list[str]) -> bool:
        """Whether another cell may begin, or all of ``names`` are there already."""
        if self._seconds is None or all(self._journal.has(name) for name in names):
            return True
        return self._journal.seconds(self._prefix) < self._seconds
