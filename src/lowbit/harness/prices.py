"""A file of prices: dated, because they change, and plain to edit.

dated = 2026-06-01

[models."gemma-4-26b-a4b"]  # US dollars per million tokens
in = 0.13
out = 0.40
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.harness.spend import Price

_LARGEST = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class PriceFile:
    """models: by the name that is sent to the server. dated: when they were true."""

    path: Path
    dated: date
    models: dict[str, Price]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PriceFile:
        """Raises NotFound, BadFile."""
        path = Path(path)
        if not path.is_file():
            raise NotFound("no such file of prices", where=path)
        try:
            if path.stat().st_size > _LARGEST:
                raise BadFile("too large for a file of prices", where=path)
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadFile("not a file of prices", where=path, found=str(error)[:120], expected="TOML") from None
        dated, models = found.get("dated"), found.get("models")
        if type(dated) is not date:
            raise BadFile("the prices have no date", where=path, expected="dated = 2026-06-01, a line at the top")
        if not isinstance(models, dict) or not models:
            raise BadFile("there is no price", where=path, expected='[models."NAME"] with in and out')
        return cls(path=path, dated=dated, models={name: _price(path, name, entry) for name, entry in models.items()})

    def of(self, model: str | None) -> Price:
        """Raises NotFound where the model has no price here."""
        if model not in self.models:
            raise NotFound(
                "no price of this model", where=self.path, found=model or "no model's name",
                expected=", ".join(sorted(self.models))[:200], hint="Add it, or give its prices with the command",
            )  # fmt: skip
        return self.models[model]


def chosen(
    prompt: float | None, completion: float | None, file: str | os.PathLike[str] | None, model: str | None
) -> tuple[Price | None, date | None]:
    """The price that was given, else the file's with its date; (None, None) where neither says one.

    Raises BadOption where half a price was given, NotFound, BadFile.
    """
    if (prompt is None) != (completion is None):
        raise BadOption("half a price", expected="that of prompt tokens and that of completion tokens")
    if prompt is not None and completion is not None:
        return Price(prompt=prompt, completion=completion), None
    if file is None:
        return None, None
    prices = PriceFile.read(file)
    return prices.of(model), prices.dated


def _price(path: Path, name: str, entry: Any) -> Price:
    amounts: list[Any] = [entry.get(key) for key in ("in", "out")] if isinstance(entry, dict) else []
    amounts = [amount for amount in amounts if type(amount) in (int, float)]
    if len(amounts) != 2:
        raise BadFile("not a price", where=f"{path}: {name[:60]}", expected="in = DOLLARS and out = DOLLARS")
    try:
        return Price(prompt=amounts[0], completion=amounts[1])
    except BadOption as error:
        raise BadFile(error.what, where=f"{path}: {name[:60]}", found=error.found, expected=error.expected) from None
