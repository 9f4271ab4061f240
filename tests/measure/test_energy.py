"""Energy counters, on a tree as /sys/class/powercap has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowbit.measure.energy import EnergyMeter


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path, zone: Callable[..., Path]) -> None:
    first, second = (zone(f"intel-rapl:{i}", f"package-{i}", 1_000_000) for i in (0, 1))
    core = zone("intel-rapl:0:0", "core", 500_000)
    psys = zone("intel-rapl:2", "psys", 7)
    (tmp_path / "intel-rapl").mkdir()
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    assert meter and before == [1_000_000, 1_000_000]
    (first / "energy_uj").write_text("3500000")
    (second / "energy_uj").write_text("1500000")
    (core / "energy_uj").write_text("900000")
    (psys / "energy_uj").write_text("99999999")
    assert meter.joules(before) == 3.0


def test_a_counter_that_ran_over(tmp_path: Path, zone: Callable[..., Path]) -> None:
    package = zone("intel-rapl:0", "package-0", 900_000, wide=1_000_000)
    meter = EnergyMeter(tmp_path)
    before = meter.read()
    (package / "energy_uj").write_text("400000")
    assert meter.joules(before) == 0.5


def test_no_counters_no_figure(tmp_path: Path, zone: Callable[..., Path]) -> None:
    for root in (tmp_path / "absent", tmp_path):
        meter = EnergyMeter(root)
        assert not meter and meter.joules(meter.read()) is None
    zone("intel-rapl:0", "package-0", "not a number")
    assert not EnergyMeter(tmp_path)
