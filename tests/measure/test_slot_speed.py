"""Speed against depth and slots: what is timed is what the name says, in fresh processes that take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import BadOption, RuntimeFailed
from lowbit.measure import MeasureOptions, SpeedOptions, _slot_probe, measure, slot_speed
from lowbit.run._llama_slots import Slots

FAST: dict[str, Any] = {"depths": (64, 0), "slots": (2, 1), "prompt": 24, "generate": 6, "repeats": 2}


def test_each_depth_and_slot_count_has_its_figures(folder: Path) -> None:
    asked = MeasureOptions(threads=1, speed_at=SpeedOptions(**FAST))
    found = measure(folder / "good.gguf", options=asked)["speed"]
    assert (found["depths"], found["slots"]) == ([0, 64], [1, 2])
    cells = found["artifacts"][0]["cells"]
    assert [(c["type"], c["depth"], c["slots"]) for c in cells] == [("f16", d, s) for d in (0, 64) for s in (1, 2)]
    for cell in cells:
        for name in ("prompt_tokens_per_second", "generation_tokens_per_second", "first_token_seconds"):
            figure = cell[name]
            assert figure["n"] == 2 and 0 <= figure["low"] <= figure["value"] <= figure["high"] and figure["value"] > 0
        assert ("first_token_seconds_cold" in cell) == (cell["slots"] == 1)
        assert "prompt_joules_per_token" not in cell or Path("/sys/class/powercap").is_dir()
    at_depth = cells[2]
    assert at_depth["first_token_seconds_cold"]["value"] > at_depth["first_token_seconds"]["value"]


@pytest.mark.parametrize("unified", [False, True])
def test_slots_go_on_from_the_depth_they_are_said_to(
    folder: Path, unified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama.cpp is given to decode: every timed token at its slot's own position behind the depth."""
    seen: list[tuple[int, int, list[int], bool]] = []
    decode = Slots._decode_batch

    def watched(self: Slots, rows: Any, sequences: Any, *, outputs: bool) -> Any:
        seen.append((*rows.shape, [self.lengths[s] for s in sequences], outputs))
        return decode(self, rows, sequences, outputs=outputs)

    monkeypatch.setattr(Slots, "_decode_batch", watched)
    job = {**FAST, "kv_unified": unified, "powercap": "/nowhere"}
    with Slots(folder / "good.gguf", sequences=3, context=512, unified=unified, threads=1) as model:
        rows = _slot_probe._rows(model, job, [0, 64], [2])
    assert [(row["depth"], row["slots"]) for row in rows] == [(0, 2), (64, 2)]
    steps = [(2, 1, [65 + i] * 2, True) for i in range(6)]
    start = (2, 1, [64] * 2, True)
    assert seen[-10:] == [(1, 64, [0], False), start, (2, 24, [65] * 2, True), start, *steps]


def test_energy_is_per_token_where_there_are_counters(folder: Path, tmp_path: Path, zone: Callable[..., Path]) -> None:
    package = zone("intel-rapl:0", "package-0", 0, wide=1 << 40)
    done = threading.Event()

    def burn() -> None:
        """A counter of a steady 5 watts."""
        begin = time.monotonic()
        while not done.wait(0.001):
            (package / "energy.tmp").write_text(str(int(5e6 * (time.monotonic() - begin))))
            (package / "energy.tmp").replace(package / "energy_uj")

    counting = threading.Thread(target=burn)
    counting.start()
    try:
        options = SpeedOptions(depths=(0,), prompt=400, generate=120, repeats=2, powercap=str(tmp_path))
        [row] = slot_speed.probe(folder / "good.gguf", "f16", options, 1)
    finally:
        done.set()
        counting.join()
    watts = row["generation_joules_per_token"] * row["generation_tokens_per_second"]
    assert watts == pytest.approx(5, rel=0.5)
    assert row["prompt_joules_per_token"] > 0
    assert slot_speed.summarize([[row], [row]])[0]["generation_joules_per_token"]["unit"] == "J/token"


def test_runs_take_turns() -> None:
    assert slot_speed.turns("abc", 3) == [(r, k) for r, order in enumerate(("abc", "cba", "abc")) for k in order]


def test_only_reports_that_make_sense_are_believed() -> None:
    options = SpeedOptions(depths=(0,), slots=(1,))
    good = {"depth": 0, "slots": 1, "prompt_tokens_per_second": 5.0}
    assert slot_speed.makes_sense([good], options)
    bad: list[Any] = [None, [], {}, [5], [good, good], [{**good, "slots": 2}], [{**good, "first_token_seconds": "x"}]]
    for report in [*bad, [{**good, "first_token_seconds": float("nan")}]]:
        assert not slot_speed.makes_sense(report, options)


def test_what_cannot_work_is_refused(folder: Path) -> None:
    bad: list[dict[str, Any]] = [{"depths": ()}, {"depths": (-1,)}, {"slots": (0,)}, {"repeats": 1}, {"prompt": 0}]
    for options in bad:
        with pytest.raises(BadOption):
            SpeedOptions(**options)
    with pytest.raises(RuntimeFailed, match="measures speed failed") as error:
        slot_speed.probe(folder / "absent.gguf", "f16", SpeedOptions(), 1)
    assert "no such file" in str(error.value)
    with pytest.raises(BadOption, match="longer than the model was trained for"):
        measure(folder / "good.gguf", options=MeasureOptions(threads=1, speed_at=SpeedOptions(depths=(4000,))))
    with pytest.raises(BadOption, match="nothing to measure"):
        measure(folder / "good.gguf")
