"""The file of prices."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from lowbit.errors import BadFile, BadOption, LowbitError, NotFound
from lowbit.harness import Price
from lowbit.harness.prices import PriceFile, chosen

EXAMPLE = Path(__file__).parents[2] / "examples" / "data" / "prices.toml"


def test_the_example() -> None:
    assert chosen(None, None, EXAMPLE, "gemma-4-26b-a4b") == (Price(prompt=0.13, completion=0.40), date(2026, 6, 1))
    assert chosen(1.0, 2.0, EXAMPLE, "other") == (Price(prompt=1.0, completion=2.0), None)
    assert chosen(None, None, None, "other") == (None, None)


def test_a_model_without_a_price() -> None:
    with pytest.raises(NotFound, match="gemma-4-26b-a4b"):
        chosen(None, None, EXAMPLE, "gpt")
    with pytest.raises(NotFound):
        chosen(None, None, EXAMPLE, None)
    with pytest.raises(NotFound):
        PriceFile.read("no/such/file")
    with pytest.raises(BadOption, match="half"):
        chosen(1.0, None, EXAMPLE, "gemma-4-26b-a4b")


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "dated = 2026-06-01", 'dated = "June"\n[models.a]\nin = 1\nout = 1',
        "[models.a]\nin = 1\nout = 1", "dated = 2026-06-01\nmodels = 3", "dated = 2026-06-01\n[models]",
        "dated = 2026-06-01\n[models.a]\nin = 1", 'dated = 2026-06-01\n[models.a]\nin = "1"\nout = 1',
        "dated = 2026-06-01\n[models.a]\nin = -1\nout = 1", "dated = 2026-06-01\n[models.a]\nin = nan\nout = 1",
        "dated = 2026-06-01\n[models.a]\nin = true\nout = 1", "dated = 2026-06-01\nmodels.a = 1", "a = " + "[" * 3000,
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(BadFile):
        PriceFile.read(path)
    path.write_bytes(b"\xff\xfe\x00" + text.encode())
    with pytest.raises(LowbitError):
        PriceFile.read(path)
