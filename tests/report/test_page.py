"""The page in a real browser: light and dark, narrow and wide, with nothing loaded and nothing cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit import report

# Elements that stick out of the window, or hold more than they show.
OVERFLOWING = """
[...document.querySelectorAll("body, body *")].filter(e => {
  const box = e.getBoundingClientRect();
  const hides = e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline";
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5 || (hides && !e.closest("svg")));
}).map(e => e.tagName + "." + e.getAttribute("class") + ": " + e.textContent.slice(0, 40))
"""
# Plot labels outside of their plot: an SVG clips them without a scroll bar.
CLIPPED = """
[...document.querySelectorAll("svg text")].filter(e => {
  const box = e.getBoundingClientRect(), frame = e.closest("svg").getBoundingClientRect();
  return box.width && (box.right > frame.right + 0.5 || box.left < frame.left - 0.5 || box.bottom > frame.bottom + 0.5);
}).map(e => e.textContent)
"""
# The smallest contrast ratio (WCAG 2) of any text with the page's ground.
CONTRAST = """
(() => {
  const light = rgb => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll("p, h1, h2, th, td, dt, dd, small, b, svg text")].map(e => {
    const style = getComputedStyle(e), ink = light(e.closest("svg") ? style.fill : style.color);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  }));
})()
"""
LONG = ["kv1", "retrieval", "speed1"]
SECTIONS = ["fidelity", "phases", "training", *LONG, "cost", "run", "provenance", "conditions"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_page_fits_and_loads_nothing(browser: Any, run_dir: Path, scheme: str, width: int) -> None:
    page = lowbit.report(run_dir)
    browser.open(page, width=width, scheme=scheme)

    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate(CONTRAST) >= 4.5
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(v) for v in ground[4:-1].split(",")) > 384) == (scheme == "light")
    shown = browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert shown == SECTIONS


def test_long_names_do_not_widen_the_page(browser: Any, sample: dict[str, Any], tmp_path: Path) -> None:
    sample["model"]["name"] = "A" * 300
    sample["model"]["source"] = "/x" * 200
    sample["command"] = "lowbit ship " + "y" * 400
    folder = tmp_path / ("deep" * 40)
    folder.mkdir()
    (folder / "lowbit.json").write_text(json.dumps(sample), encoding="utf-8")
    page = lowbit.report(folder)
    for width in (360, 1280):
        browser.open(page, width=width)
        assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_a_hostile_record_stays_text(browser: Any, sample: dict[str, Any], run_dir: Path) -> None:
    attack = "</style></script><img src=http://192.0.2.1/x onerror=window.owned=1><script>window.owned=1</script>\"'"

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner) for inner in value]
        return value + attack if isinstance(value, str) else value

    spoiled = spoil(sample) | {"format": "lowbit-run/1", "recipe": "q4_0" + attack}
    (run_dir / "lowbit.json").write_text(json.dumps(spoiled), encoding="utf-8")
    page = lowbit.report(run_dir)
    browser.open(page)
    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.evaluate("window.owned") is None
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.scripts.length") == 1


def test_copy_button_takes_the_command(browser: Any, run_dir: Path) -> None:
    browser.open(lowbit.report(run_dir))
    browser.evaluate("document.querySelector('button.copy').click()")
    selected = browser.evaluate("getSelection().toString()")
    assert selected.strip() == f"llama-cli -m {run_dir.resolve() / 'model-q4_0.gguf'}"


def test_missing_sections_do_not_appear(sample: dict[str, Any], run_dir: Path) -> None:
    del sample["training"]
    page = report.render(sample, run_dir)
    assert 'id="phases"' not in page and 'id="training"' not in page and 'id="fidelity"' in page
    bare = report.render({"format": "lowbit-run/1"}, run_dir)
    assert "<section" in bare and 'id="fidelity"' not in bare and 'id="run"' not in bare


def test_page_refers_to_nothing_outside(run_dir: Path) -> None:
    page = lowbit.report(run_dir).read_text(encoding="utf-8")
    for needle in ("http:", "https:", "url(", "@import", " src=", " href="):
        assert needle not in page
