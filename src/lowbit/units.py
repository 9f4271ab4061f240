"""Bytes, bits per weight, shares and durations, and how they print."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'. Binary units, as llama.cpp's log prints them."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def bits_per_weight(n_bytes: int, n_weights: int) -> float:
    """Bits that the stored bytes spend on each weight."""
    return 8.0 * n_bytes / n_weights if n_weights else 0.0


def format_share(part: float, whole: float) -> str:
    """A share of a count in percent: never 100% nor 0 where it is not all or nothing."""
    if not whole or part in (0, whole):
        return "100%" if whole and part == whole else "0"
    return f"{min(99.99, max(0.01, 100 * part / whole)):.2f}%"


def format_duration(seconds: float) -> str:
    """75 -> '1:15'; 3700 -> '1:01:40'."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
