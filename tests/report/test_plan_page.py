"""The page of a plan in a real browser, and the plan in a run's report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.plan import FitOptions, PlanOptions, fit, open_model, plan
from lowbit.plan.curve import curves
from lowbit.report import plan_page, plan_view
from lowbit.units import GIB

sys.path.insert(0, str(Path(__file__).parent))

from test_page import CLIPPED, CONTRAST, OVERFLOWING

PAGES = {
    "plan": ("gemma-4-12b", PlanOptions(runtime="mlx", context=32_768), None),
    "fit": ("gemma-3-4b", PlanOptions(), FitOptions(room=6 * GIB, kv_types=("f16", "q8_0"), slots=(1, 2))),
    "family": ("gemma-4", PlanOptions(runtime="mlx"), FitOptions(room=32 * GIB)),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for kind, (model, options, room) in PAGES.items():
        found = fit(model, options, room) if room else plan(model, options)
        plan_page.write(model, options, found, folder / f"{kind}.html")
    return {kind: folder / f"{kind}.html" for kind in PAGES}


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (400, "light"), (800, "light"), (1280, "light")])
def test_pages_fit_and_load_nothing(browser: Any, pages: dict[str, Path], kind: str, width: int, scheme: str) -> None:
    browser.open(pages[kind], width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [pages[kind].resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate(CONTRAST) >= 4.5


def test_a_page_says_what_the_plan_says(pages: dict[str, Path]) -> None:
    page = pages["plan"].read_text(encoding="utf-8")
    assert "gemma-4-12b" in page and "3,070 tokens" in page and page.count("<svg") == 2
    family = pages["family"].read_text(encoding="utf-8")
    assert "gemma-4-31b" in family and "q8_g64</th>" not in family  # no model of the family can have it
    assert "mlx-lm cannot quantize" in family


def test_a_name_from_a_file_stays_text(tmp_path: Path) -> None:
    """A folder's name is shown, and is no markup."""
    folder = tmp_path / "<b onclick=x>"
    folder.mkdir()
    with open_model("qwen3-0.6b") as model:
        (folder / "config.json").write_text(json.dumps(dict(model.config)))
    found = plan(folder, PlanOptions(runtime="vllm", context=512))
    page = plan_page.render(found, ())
    assert "<b onclick" not in page and "&lt;b onclick" in page


def test_a_runs_report_has_its_plan(run_dir: Path, browser: Any) -> None:
    record = json.loads((run_dir / "lowbit.json").read_text())
    with open_model("smollm2-360m") as model:
        lines = [line.to_json() for line in curves(model, PlanOptions())]
    record["plan"] = {**plan("smollm2-360m").to_json(), "curves": lines}
    (run_dir / "lowbit.json").write_text(json.dumps(record))
    browser.open(lowbit.report(run_dir), width=1280)
    assert "plan" in browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert browser.evaluate(OVERFLOWING) == [] and browser.evaluate(CLIPPED) == []
    assert "KV cache, 32 global layers" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    "raw",
    [
        None, 7, [], {}, {"rows": "x"}, {"rows": [{"what": "w", "bytes": -1}], "total_bytes": 1, "runtime": "r"},
        {"rows": [{"what": "w", "bytes": 1e300}], "total_bytes": 1, "runtime": "r"},
        {"rows": [{"what": "w", "bytes": 1}], "total_bytes": "1", "runtime": "r"},
    ],
)  # fmt: skip
def test_what_is_no_plan_is_not_shown(raw: Any) -> None:
    assert plan_view.read(raw) is None


def test_half_a_curve_is_not_drawn() -> None:
    raw = {"rows": [{"what": "w", "bytes": 1}], "total_bytes": 1, "runtime": "r", "curves": [
        {"label": "good", "points": [[1, 2], [3, 4]]}, {"label": "bad", "points": [[1, 2], [None, 4]]},
        {"label": "short", "points": [[1, 2]]}, {"points": [[1, 2], [3, 4]]}, 5,
    ]}  # fmt: skip
    seen = plan_view.read(raw)
    assert seen and [line.label for line in seen.lines] == ["good"]
