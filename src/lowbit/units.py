"""Bytes, bits per weight, shares and durations, and how they print."""

from __future__ import annotations

import math

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


def format_dollars(amount: float) -> str:
    """1234.5 -> '$1,234.50'; 0.00012 -> '$0.00012': two digits behind the point, more where they would be noughts."""
    if amount == 0 or abs(amount) >= 1:
        return f"${amount:,.2f}"
    text = f"{amount:.{max(2, 1 - math.floor(math.log10(abs(amount))))}f}"
    return f"${text}"


def format_span(seconds: float) -> str:
    """A time that may be long, in the unit that fits: '45 s', '12 min', '3.4 hours', '57 days'."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{1 if seconds < 10 * size and unit != 'min' else 0}f} {unit}"
    return f"{seconds:.0f} s"
