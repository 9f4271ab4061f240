"""What a measurement says of differences: better, worse, or no measurable difference, and what it could have seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.report.figures import Figure, figure, mapping, number, sequence, text

# key in a pair or in "against_reference" -> (name, unit, printed as percent)
DIFFERENCES = {
    "kld_mean_difference": ("Mean KLD", "nats", False),
    "top1_difference": ("Top-1 agreement", "", True),
    "log_perplexity_difference": ("Log perplexity", "nats", False),
}
NO_DIFFERENCE = "no measurable difference"
_VERDICTS = ("better", "worse", NO_DIFFERENCE)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One difference. smallest: the difference that this measurement would find in 80% of cases, as text."""

    what: str
    difference: Figure
    unit: str
    verdict: str
    smallest: str

    @property
    def value(self) -> str:
        sign = "+" if self.difference.value > 0 else ""
        return f"{sign}{self.difference.short}" + (f" {self.unit}" if self.unit else "")

    @property
    def interval(self) -> str:
        """Not with a dash, which stands beside minus signs here."""
        return (
            f"{self.difference.low:,.{self.difference.digits}f} to {self.difference.high:,.{self.difference.digits}f}"
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two files, by their names, and the differences between them."""

    artifact: str
    baseline: str
    verdicts: list[Verdict]


def of(measured: dict[str, Any]) -> list[Compared]:
    """Of each artifact against the reference, then of each pair; what a record lacks is left out."""
    found = []
    for entry in map(mapping, sequence(measured.get("artifacts"))):
        found.append(_compared(entry.get("path"), "the reference", mapping(entry.get("against_reference"))))
    for pair in map(mapping, sequence(measured.get("pairs"))):
        found.append(_compared(pair.get("artifact"), _name(pair.get("baseline")), pair))
    return [compared for compared in found if compared.verdicts]


def of_cache(measured: dict[str, Any]) -> list[str]:
    """A line on each artifact whose KLD was had from a reference cache."""
    lines = []
    for entry in map(mapping, sequence(measured.get("artifacts"))):
        kept = mapping(entry.get("kld_from_cache"))
        error, asked = number(kept.get("error")), number(kept.get("asked"))
        low, high = number(kept.get("certain_low")), number(kept.get("certain_high"))
        if error is None or asked is None or low is None or high is None:
            continue
        line = f"{_name(entry.get('path'))}: the reference cache moves its mean KLD by at most {error:.2g} nats (99.9%)"
        line += f"; certain are only {low:.3g} to {high:.3g}"
        if error > asked:
            line += f". That is MORE than the {asked:g} asked: give a longer text, or measure without the cache"
        lines.append(line)
    return lines


def _compared(artifact: Any, baseline: str, raw: dict[str, Any]) -> Compared:
    verdicts = []
    for key, (what, unit, percent) in DIFFERENCES.items():
        fields = mapping(raw.get(key))
        difference, verdict = figure(fields, percent=percent), text(fields.get("verdict"))
        if difference is None or verdict not in _VERDICTS:
            continue
        least = number(fields.get("smallest_detectable"))
        factor, suffix = (100, " %") if percent else (1, f" {unit}")
        smallest = f"{least * factor:.2g}{suffix}" if least is not None else ""
        verdicts.append(Verdict(what=what, difference=difference, unit=unit, verdict=verdict, smallest=smallest))
    return Compared(artifact=_name(artifact), baseline=baseline, verdicts=verdicts)


def _name(path: Any) -> str:
    return Path(text(path)).name
