"""Energy that the processor's own counters report: Linux' powercap (RAPL), one counter a package.

Where there is none, or it may not be read (it belongs to root on most systems), there is no figure.
Source: the kernel's Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules of all processor packages since an earlier reading.

    root: the folder of powercap's zones
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = [zone for zone in _packages(root) if _counter(zone) is not None]

    def __bool__(self) -> bool:
        """Whether anything is counted here."""
        return bool(self._zones)

    def read(self) -> list[int]:
        """The counters, microjoules; to be given to ``joules``."""
        return [_counter(zone) or 0 for zone in self._zones]

    def joules(self, since: list[int]) -> float | None:
        """Joules spent since a reading, all packages together; None without counters. A counter that ran over its
        range once is allowed for."""
        if not self._zones:
            return None
        total = 0
        for zone, before, after in zip(self._zones, since, self.read(), strict=True):
            spent = after - before
            if spent < 0:
                spent += _whole(zone / "max_energy_range_uj") or 0
            total += max(0, spent)
        return total / 1e6


def _packages(root: Path) -> list[Path]:
    """The zones of whole packages; their parts (cores, memory) and the platform (psys) would count the same twice."""
    try:
        zones = sorted(root.iterdir())
    except OSError:
        return []
    return [zone for zone in zones if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")]


def _counter(zone: Path) -> int | None:
    return _whole(zone / "energy_uj")


def _whole(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
