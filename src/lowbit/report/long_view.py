"""What the long measurements of `lowbit measure` say, as the page and the terminal show it.

The record is untrusted, as everywhere in the report: what does not make sense is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.report.figures import Figure, figure, mapping, number, sequence, text
from lowbit.units import format_bytes

_MOST = 64  # of a kind in a record: types, lengths, depths


@dataclass(frozen=True, kw_only=True)
class KvRow:
    """One cache type at one context length. kld: to the reference; added: what of it the cache adds; to_f16: to the
    same file with an f16 cache; top1: how often its most probable token is that of the f16 cache."""

    type: str
    context: int
    size: str
    sequences: int
    kld: Figure | None
    added: Figure | None
    to_f16: Figure | None
    top1: Figure | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of (x, figure) points, ascending in x."""

    name: str
    points: list[tuple[float, Figure]]


@dataclass(frozen=True, kw_only=True)
class KvFile:
    """KV caches of one artifact. curves: KLD to the f16 cache against position, at the longest context."""

    file: str
    rows: list[KvRow]
    curves: list[Curve]
    curve_context: int
    recommended: str
    why: list[str]


@dataclass(frozen=True, kw_only=True)
class Place:
    """How often a fact at a depth was found. depth: percent; probability: of the right answer, in percent."""

    depth: float
    probability: Figure | None
    choice: Figure | None


@dataclass(frozen=True, kw_only=True)
class RetrievalRow:
    """One cache at one length. verdict: of the likeliest answer being right, against the f16 cache."""

    type: str
    length: int
    places: list[Place]
    probability: Figure | None
    choice: Figure | None
    greedy: Figure | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class RetrievalFile:
    file: str
    depths: list[float]
    chance: str
    rows: list[RetrievalRow]

    @property
    def asked(self) -> str:
        """How many facts each place rests on."""
        counts = sorted({place.choice.n for row in self.rows for place in row.places if place.choice})
        return " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One cache at one depth with so many slots. prompt, generation: tokens a second of all slots; first_token: seconds
    with the depth in the cache; cold: seconds from nothing; joules: a generated token."""

    type: str
    depth: int
    slots: int
    prompt: Figure | None
    generation: Figure | None
    first_token: Figure | None
    cold: Figure | None
    joules: Figure | None


@dataclass(frozen=True, kw_only=True)
class SpeedFile:
    """prompt: tokens that each slot reads when it is timed."""

    file: str
    prompt: str
    rows: list[SpeedRow]

    @property
    def joules(self) -> bool:
        return any(row.joules for row in self.rows)

    @property
    def repeats(self) -> str:
        counts = sorted({row.generation.n for row in self.rows if row.generation})
        return " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""

    def curves(self, what: str) -> list[Curve]:
        """``what`` ("prompt", "generation") against depth, a line for each cache and slot count."""
        lines: dict[str, list[tuple[float, Figure]]] = {}
        for row in self.rows:
            if (figure := getattr(row, what)) is not None:
                name = f"{row.type}, {row.slots} slot{'s' if row.slots > 1 else ''}"
                lines.setdefault(name, []).append((float(row.depth), figure))
        curves = [Curve(name=name, points=sorted(points, key=lambda p: p[0])) for name, points in lines.items()]
        return [curve for curve in curves if len(curve.points) > 1]


@dataclass(frozen=True, kw_only=True)
class LongView:
    """All of it; lists are empty where the record has nothing."""

    kv: list[KvFile]
    limit: str
    noise: str
    retrieval: list[RetrievalFile]
    speed: list[SpeedFile]


def build(measured: Any) -> LongView:
    """Reads a `lowbit measure` result; never raises on what it may hold."""
    measured = mapping(measured)
    vouched = bool(mapping(measured.get("machine")))
    kv, retrieval, speed = (mapping(measured.get(key)) if vouched else {} for key in ("kv", "retrieval", "speed"))
    chance = number(retrieval.get("chance"))
    said = f"{100 * chance:.3g} %" if chance is not None else ""
    files = [_retrieval_file(entry, said) for entry in map(mapping, _some(retrieval.get("artifacts")))]
    if (cells := sequence(retrieval.get("reference"))) and files:
        files.insert(0, _retrieval_file({"path": "reference", "cells": cells}, said))
    limit, noise = number(kv.get("limit")), number(kv.get("noise"))
    return LongView(
        kv=[found for entry in map(mapping, _some(kv.get("artifacts"))) if (found := _kv_file(entry)).rows],
        limit=f"{limit:g}" if limit is not None else "",
        noise=f"{noise:g}" if noise is not None else "",
        retrieval=[found for found in files if found.rows],
        speed=[
            timed
            for entry in map(mapping, _some(speed.get("artifacts")))
            if (timed := _speed_file(entry, number(speed.get("prompt")))).rows
        ],
    )


def _kv_file(entry: dict[str, Any]) -> KvFile:
    cells = [mapping(cell) for cell in _some(entry.get("cells"), _MOST * _MOST)]
    longest = max((int(number(cell.get("context")) or 0) for cell in cells), default=0)
    curves = []
    for cell in cells:
        if int(number(cell.get("context")) or 0) == longest and text(cell.get("type")) != "f16":
            points = [
                ((first + end) / 2, value)
                for band in map(mapping, _some(cell.get("by_position")))
                if (value := figure(band.get("kld_to_f16"))) is not None
                and (first := number(band.get("from"))) is not None
                and (end := number(band.get("to"))) is not None
                and first >= 0
            ]
            if len(points) > 1:
                curves.append(Curve(name=text(cell.get("type")), points=sorted(points, key=lambda point: point[0])))
    best = mapping(entry.get("recommendation"))
    return KvFile(
        file=Path(text(entry.get("path"))).name,
        rows=[_kv_row(cell) for cell in cells],
        curves=curves,
        curve_context=longest,
        recommended=_recommended(best),
        why=[line for line in sequence(best.get("why"))[:_MOST] if isinstance(line, str)],
    )


def _recommended(best: dict[str, Any]) -> str:
    kind, size, plain = text(best.get("type")), number(best.get("cache_bytes")), number(best.get("f16_bytes"))
    if not kind or size is None or plain is None or size < 0:
        return kind
    context = number(best.get("context"))
    return f"{kind} ({format_bytes(size)} at {context or 0:,.0f} tokens; f16 takes {format_bytes(plain)})"


def _kv_row(cell: dict[str, Any]) -> KvRow:
    size = number(cell.get("cache_bytes"))
    return KvRow(
        type=text(cell.get("type")),
        context=int(number(cell.get("context")) or 0),
        size=format_bytes(size) if size is not None else "",
        sequences=int(number(cell.get("sequences")) or 0),
        kld=figure(cell.get("kld")),
        added=figure(cell.get("kld_added")),
        to_f16=figure(cell.get("kld_to_f16")),
        top1=figure(cell.get("top1_as_f16"), percent=True),
        verdict=text(cell.get("verdict")).partition(":")[0],
    )


def _retrieval_file(entry: dict[str, Any], chance: str) -> RetrievalFile:
    rows = [_retrieval_row(mapping(cell)) for cell in _some(entry.get("cells"), _MOST * _MOST)]
    depths = sorted({place.depth for row in rows for place in row.places})
    return RetrievalFile(file=Path(text(entry.get("path"))).name, depths=depths, chance=chance, rows=rows)


def _retrieval_row(cell: dict[str, Any]) -> RetrievalRow:
    places = [
        Place(
            depth=100 * depth,
            probability=figure(place.get("probability"), percent=True),
            choice=figure(place.get("choice"), percent=True),
        )
        for place in map(mapping, _some(cell.get("depths")))
        if (depth := number(place.get("depth"))) is not None and 0 <= depth <= 1
    ]
    against = mapping(mapping(cell.get("against_f16")).get("choice"))
    return RetrievalRow(
        type=text(cell.get("type")),
        length=int(number(cell.get("length")) or 0),
        places=places,
        probability=figure(cell.get("probability"), percent=True),
        choice=figure(cell.get("choice"), percent=True),
        greedy=figure(cell.get("greedy"), percent=True),
        verdict=text(against.get("verdict")),
    )


def _speed_file(entry: dict[str, Any], prompt: float | None) -> SpeedFile:
    rows = [
        SpeedRow(
            type=text(cell.get("type")),
            depth=int(depth),
            slots=int(slots),
            prompt=figure(cell.get("prompt_tokens_per_second")),
            generation=figure(cell.get("generation_tokens_per_second")),
            first_token=figure(cell.get("first_token_seconds")),
            cold=figure(cell.get("first_token_seconds_cold")),
            joules=figure(cell.get("generation_joules_per_token")),
        )
        for cell in map(mapping, _some(entry.get("cells"), _MOST * _MOST))
        if (depth := number(cell.get("depth"))) is not None
        and (slots := number(cell.get("slots"))) is not None
        and depth >= 0
    ]
    name = Path(text(entry.get("path"))).name
    return SpeedFile(file=name, prompt=f"{prompt:,.0f}" if prompt is not None else "", rows=rows)


def _some(value: Any, most: int = _MOST) -> list[Any]:
    return sequence(value)[:most]
