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


def test_what_a_batch_costs(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(
        "dated = 2026-06-01\nbatch = 0.4\n[models.a]\nin = 1\nout = 2\n[models.b]\nin = 1\nout = 2\nbatch = 1\n"
        '[models.c]\nin = 1\nout = 2\nbatch_in = 0.1\nbatch_out = 0.3\nprovider = "P"\n'
    )
    found = PriceFile.read(path).hosted
    assert found["a"].batch == Price(prompt=0.4, completion=0.8) and not found["a"].said
    assert found["b"].batch == Price(prompt=1.0, completion=2.0) and found["b"].said
    assert found["c"].batch == Price(prompt=0.1, completion=0.3) and found["c"].provider == "P"
    path.write_text("dated = 2026-06-01\n[models.a]\nin = 1\nout = 2\n")
    assert PriceFile.read(path).hosted["a"].batch == Price(prompt=0.5, completion=1.0)


@pytest.mark.parametrize(
    "line", ["batch = 2", 'batch = "half"', "batch_in = 1", "batch = 1\nbatch_in = 1\nbatch_out = 1", "ins = 1",
             "provider = 3", "batch = nan"],
)  # fmt: skip
def test_broken_prices_of_a_batch(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(f"dated = 2026-06-01\n[models.a]\nin = 1\nout = 2\n{line}\n")
    with pytest.raises(BadFile, match="a"):
        PriceFile.read(path)
