"""A file of prices: dated, because they change, and plain to edit.

dated = 2026-06-01
batch = 0.5  # what a batch costs of the online price, where a model says nothing else; 0.5 without this line

[models."gemma-4-26b-a4b"]  # US dollars per million tokens
in = 0.13
out = 0.40
provider = "..."   # may be there, and is shown
batch = 1.0        # may be there: this model's own share; or batch_in and batch_out, in dollars
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.harness.spend import Price

_LARGEST = 1 << 20  # bytes
_BATCH = 0.5  # of the online price: what the large providers' batch endpoints cost
_KEYS = frozenset({"in", "out", "provider", "batch", "batch_in", "batch_out", "source"})


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """A hosted model's prices. said: whether the price of a batch is the file's own word on this model, and not the
    usual discount."""

    name: str
    provider: str
    online: Price
    batch: Price
    said: bool


@dataclass(frozen=True, kw_only=True)
class PriceFile:
    """models: online prices by the name that is sent to the server. dated: when they were true. hosted: all that the
    file says of the same models."""

    path: Path
    dated: date
    models: dict[str, Price]
    hosted: dict[str, Hosted] = field(default_factory=dict)

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
        usual = _share(path, "batch", found.get("batch", _BATCH))
        hosted = {name: _hosted(path, name, entry, usual) for name, entry in models.items()}
        return cls(path=path, dated=dated, models={name: h.online for name, h in hosted.items()}, hosted=hosted)

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


def bundled() -> Path:
    """The file that comes with lowbit: a start, to be copied and edited."""
    return Path(str(resources.files("lowbit").joinpath("data/prices.toml")))


def _hosted(path: Path, name: str, entry: Any, usual: float) -> Hosted:
    if isinstance(entry, dict) and (unknown := sorted(set(entry) - _KEYS)):
        expected = ", ".join(sorted(_KEYS))
        raise BadFile("unknown key", where=f"{path}: {name[:60]}", found=unknown[0][:60], expected=expected)
    online = _price(path, name, entry, ("in", "out"))
    provider = entry.get("provider", "")
    if not isinstance(provider, str):
        raise BadFile("not a provider's name", where=f"{path}: {name[:60]}", found=repr(provider)[:60])
    own = {"batch_in", "batch_out"} & set(entry)
    if own and "batch" in entry:
        raise BadFile("the price of a batch is given twice", where=f"{path}: {name[:60]}", expected="batch alone, or "
                      "batch_in and batch_out")  # fmt: skip
    if own:
        batch = _price(path, name, entry, ("batch_in", "batch_out"))
    else:
        share = _share(path, name, entry.get("batch", usual))
        batch = Price(prompt=online.prompt * share, completion=online.completion * share)
    return Hosted(name=name, provider=provider, online=online, batch=batch, said=bool(own) or "batch" in entry)


def _share(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise BadFile("not a share of the online price", where=f"{path}: {name[:60]}", found=repr(value)[:60],
                      expected="batch = 0.5, a number from 0 to 1")  # fmt: skip
    return float(value)


def _price(path: Path, name: str, entry: Any, keys: tuple[str, str]) -> Price:
    amounts: list[Any] = [entry.get(key) for key in keys] if isinstance(entry, Mapping) else []
    amounts = [amount for amount in amounts if type(amount) in (int, float)]
    if len(amounts) != 2:
        expected = f"{keys[0]} = DOLLARS and {keys[1]} = DOLLARS"
        raise BadFile("not a price", where=f"{path}: {name[:60]}", expected=expected)
    try:
        return Price(prompt=amounts[0], completion=amounts[1])
    except BadOption as error:
        raise BadFile(error.what, where=f"{path}: {name[:60]}", found=error.found, expected=error.expected) from None
