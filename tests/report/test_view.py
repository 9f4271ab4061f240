"""What is shown of a record: only figures with their n, interval, machine and hash; never a crash."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import lowbit
from lowbit import report
from lowbit.errors import BadFile, NotFound
from lowbit.report import charts, long_tables, terminal, view
from lowbit.report.figures import figure


def shown(record: dict[str, Any]) -> view.View:
    return view.build(record, Path("run"))


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.1314, 0.1262, 0.1366, ("0.131", "0.126–0.137")),
        (24.113, 23.39, 24.84, ("24.1", "23.4–24.8")),
        (0.40713, 0.39113, 0.42313, ("0.407", "0.391–0.423")),
        (1234.5, 1204.5, 1264.5, ("1,234", "1,204–1,264")),
        (5.0, 5.0, 5.0, ("5.000", "5.000–5.000")),
        (-15.0, -25.0, -6.0, ("-15", "-25 to -6")),
    ],
)
def test_digits_follow_the_interval(value: float, low: float, high: float, expected: tuple[str, str]) -> None:
    made = figure({"value": value, "low": low, "high": high, "n": 10})
    assert made is not None and (made.short, made.interval) == expected


@pytest.mark.parametrize(
    "raw",
    [
        None,
        0.5,
        {},
        {"value": 0.5, "n": 9},
        {"value": 0.5, "low": 0.4, "n": 9},
        {"value": 0.5, "low": 0.6, "high": 0.4, "n": 9},
        {"value": float("nan"), "low": 0.4, "high": 0.6, "n": 9},
        {"value": 0.5, "low": 0.4, "high": float("inf"), "n": 9},
        {"value": "0.5", "low": 0.4, "high": 0.6, "n": 9},
        {"value": True, "low": 0, "high": 1, "n": 9},
        {"value": 10**400, "low": 0, "high": 1, "n": 9},
        {"value": 0.5, "low": 0.4, "high": 0.6},
        {"value": 0.5, "low": 0.4, "high": 0.6, "n": 0},
    ],
)
def test_half_a_figure_is_none(raw: Any) -> None:
    assert figure(raw) is None


def test_figures_without_machine_or_hash_are_left_out(sample: dict[str, Any], run_dir: Path) -> None:
    assert shown(sample).model is not None and not shown(sample).left_out
    nameless = {**sample, "machine": {}, "measure": {**sample["measure"], "machine": None}}
    assert not shown(nameless).artifacts and shown(nameless).ratio is None
    assert "does not give the machine" in report.render(nameless, run_dir)

    unhashed = copy.deepcopy(sample)
    for entry in unhashed["measure"]["artifacts"]:
        del entry["sha256"]
    del unhashed["files"]["naive-q4_0.gguf"]["sha256"]
    del unhashed["files"]["model-q4_0.gguf"]["sha256"]
    assert [a.role for a in shown(unhashed).artifacts] == ["reference"]


def test_the_certificate_is_never_rounded_up(sample: dict[str, Any], run_dir: Path) -> None:
    assert shown(sample).proved == "100% of 4,202,557"
    assert "model-q4_0.gguf.certificate.json" in report.render(sample, run_dir)
    totals = sample["certificate"]["totals"]
    totals["exact"] -= 1
    assert shown(sample).proved == "99.99% of 4,202,557"
    sample["certificate"]["types"]["q4_0"] |= {"exact": 1, "off_lattice": 3317759}
    [_, q4_0, _] = shown(sample).proofs
    assert (q4_0.exact, q4_0.off_lattice, q4_0.within_scale_rounding) == ("0.01%", "99.99%", "0")
    del sample["certificate"]
    assert shown(sample).proved == "" and "Certificate" not in report.render(sample, run_dir)


def test_commands_quote_the_path() -> None:
    made = dict(report.commands("/tmp/it's here/model.gguf", "Org/Name (v1)", "q4_0"))
    assert made["LM Studio"] == "lms import --copy '/tmp/it'\"'\"'s here/model.gguf'"
    assert "ollama create org-name-v1-q4_0 -f lowbit.Modelfile" in made["Ollama"]


@pytest.mark.parametrize(("high", "last", "count"), [(0.423, 0.5, 6), (1.0, 1.0, 6), (7.3, 8.0, 5), (0.0, 1.0, 2)])
def test_ticks_are_round_and_reach_the_end(high: float, last: float, count: int) -> None:
    marks = charts.ticks(high)
    assert marks[0] == 0 and marks[-1] == pytest.approx(last) and len(marks) == count


def test_long_curves_are_thinned(sample: dict[str, Any]) -> None:
    sample["training"]["curve"] = [{"seconds": 60.0 * i, "loss": 1.0} for i in range(10_001)]
    loss = shown(sample).loss
    assert 300 < len(loss) <= 400 and loss[-1][0] > 9_900


def test_records_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="not a run folder"):
        lowbit.report(tmp_path)
    path = tmp_path / "lowbit.json"
    for content in ("", "{", "[]", "{}", '{"format": "lowbit-run/9"}', "\udcff", "[" * 100_000):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(BadFile):
            lowbit.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_terminal_gives_the_figures_and_no_escapes(sample: dict[str, Any]) -> None:
    sample["training"]["phases"][0]["name"] = "\x1b[31mred [bold]x"
    stream = io.StringIO()
    terminal.show(sample, stream)
    text = stream.getvalue()
    assert "0.322 of naive" in text and "0.131" in text and "87.5 MiB" in text
    assert "\x1b" not in text and "[bold]x" in text


def test_long_measurements_are_shown_with_their_figures(sample: dict[str, Any], run_dir: Path) -> None:
    long = shown(sample).long
    [kv], [speed] = long.kv, long.speed
    assert kv.recommended == "q8_0 (95.6 MiB at 8,192 tokens; f16 takes 180.0 MiB)" and kv.curve_context == 8192
    assert [(curve.name, len(curve.points)) for curve in kv.curves] == [("q8_0", 8), ("q4_0", 8)]
    assert [found.file for found in long.retrieval] == ["reference", "model-q4_0.gguf"]
    assert long.retrieval[1].depths == [0, 25, 50, 75, 100] and long.retrieval[1].asked == "8"
    assert [curve.name for curve in speed.curves("generation")] == ["f16, 1 slot", "f16, 4 slots"]
    assert speed.joules and speed.repeats == "3"
    stream = io.StringIO()
    terminal.show(sample, stream)
    for words in (
        "recommended KV cache: q8_0 (95.6 MiB",
        "Facts found again by reference",
        "J/token",
        "above the limit",
    ):
        assert words in stream.getvalue()
    del sample["measure"]["machine"]
    assert not shown(sample).long.kv and "Facts in long texts" not in report.render(sample, run_dir)


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_the_terminal(sample: dict[str, Any], width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, markup=False)
    long_tables.show(console, shown(sample).long)
    assert "…" not in stream.getvalue()
    assert max(len(line) for line in stream.getvalue().splitlines()) <= width


def test_a_measurement_has_a_page_of_its_own(sample: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(sample["measure"]), encoding="utf-8")
    page = lowbit.report(path)
    assert page == tmp_path / "result.html"
    assert 'id="kv1"' in page.read_text(encoding="utf-8") and 'id="training"' not in page.read_text(encoding="utf-8")
    for content in ("{", "[]", '{"format": "lowbit-run/1"}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(BadFile):
            lowbit.report(path)


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}))


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value; of long lists the first three items."""
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value[:3])) if isinstance(value, list) else items[:40]
    return [prefix, *(p for key, inner in items for p in paths(inner, (*prefix, key)))]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_may_be_anything(sample: dict[str, Any], data: st.DataObject) -> None:
    record = json.loads(json.dumps(sample))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(paths(record)[1:] or [()]))
        if not place:
            break
        holder = record
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = data.draw(JUNK)
    report.render(record, Path("run"))
    terminal.show(record, io.StringIO())
