"""The run folder as one self-contained HTML page and as a terminal table.

``lowbit.report(run_dir)`` reads ``lowbit.json`` and writes ``report.html`` beside it. The record is untrusted: the page
escapes everything from it, loads nothing, and its content policy lets nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, NotFound
from lowbit.files import replacing
from lowbit.units import MIB, format_bytes
from lowbit.verbs import make_callable

RECORD, PAGE = "lowbit.json", "report.html"
FORMAT, MEASURED = "lowbit-run/1", "lowbit-measure/1"
LARGEST_RECORD = 64 * MIB
_HERE = Path(__file__).parent

# The page's only script. Where the browser gives a page no clipboard, the command is selected instead.
SCRIPT = """
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
    catch { button.textContent = "selected"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
"""


def report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` into the run folder and returns its path; of a file that `lowbit measure --json` wrote,
    the page beside it, with .html for its suffix.

    Raises NotFound if the folder holds no lowbit.json, BadFile if that is not a run's record, CannotWrite.
    """
    target = Path(run_dir)
    folder, place = (target.parent, target.with_suffix(".html")) if target.is_file() else (target, target / PAGE)
    page = render(read_record(target), folder)
    with replacing(place) as partial:
        partial.write_text(page, encoding="utf-8")
    return place


def read_record(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's record, lowbit.json, as it stands; of a file, a measurement's result as the record of a run that did
    nothing else."""
    if Path(run_dir).is_file():
        return _of_measurement(Path(run_dir))
    path = Path(run_dir) / RECORD
    if not path.is_file():
        raise NotFound("not a run folder", where=run_dir, expected=f"{RECORD} in it", hint="`lowbit ship` makes one")
    hint = "Remove it and run the same `lowbit ship` again: it writes the record anew"
    record = _read(path, hint)
    if record.get("format") != FORMAT:
        found = repr(record.get("format"))
        raise BadFile("not the record of a run", where=path, found=found, expected=f'"format": "{FORMAT}"')
    return record


def _of_measurement(path: Path) -> dict[str, Any]:
    measured = _read(path, "`lowbit measure --json FILE` writes one")
    if measured.get("format") != MEASURED:
        found = repr(measured.get("format"))
        raise BadFile("not the result of a measurement", where=path, found=found, expected=f'"format": "{MEASURED}"')
    return {
        "format": FORMAT,
        "model": {"name": path.stem},
        "measure": measured,
        "machine": measured.get("machine"),
        "options": measured.get("options"),
    }


def _read(path: Path, hint: str) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_RECORD:
        raise BadFile("too large for a record", where=path, found=format_bytes(size), expected="64 MiB at most")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile("not JSON", where=path, found=error, expected="a record of lowbit's", hint=hint) from error
    if not isinstance(record, dict):
        raise BadFile("not a record", where=path, found=type(record).__name__, expected="a JSON object", hint=hint)
    return record


def render(record: dict[str, Any], run_dir: Path) -> str:
    """The page as text. ``run_dir`` appears in the commands that run the file."""
    from markupsafe import Markup

    from lowbit.report import charts, view

    seen = view.build(record, run_dir)
    return (
        environment()
        .get_template("page.html")
        .render(
            v=seen,
            metrics=view.METRICS,
            speeds=view.SPEEDS,
            plots=_plots(seen),
            widths=(("wide", charts.WIDE), ("narrow", charts.NARROW)),
            commands=commands(seen.product_path, seen.name, seen.recipe) if seen.product else [],
            style=style(),
            script=Markup(SCRIPT),
            script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        )
    )


def environment() -> Any:
    """The jinja2 environment of every page: it escapes what is put in, and knows the templates of this folder."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> Any:
    """The style sheet of every page, as markup."""
    from markupsafe import Markup

    return Markup((_HERE / "page.css").read_text(encoding="utf-8"))


def _plots(seen: Any) -> dict[str, dict[str, Any]]:
    """name -> {"wide": svg, "narrow": svg}; a plot without data is absent."""
    from lowbit.report import charts, long_charts, plan_page

    made: dict[str, dict[str, Any]] = {}
    if seen.plan and (drawn := plan_page.plots(seen.plan.lines)):
        made["plan"] = drawn
    for width_name, width in (("wide", charts.WIDE), ("narrow", charts.NARROW)):
        rows = [
            charts.Row(label=a.title, series=a.role, figure=a.fidelity["kld_mean"])
            for a in seen.artifacts
            if a.role != "reference" and "kld_mean" in a.fidelity
        ]
        if rows:
            axis = "mean KLD to the reference, nats per token" if width > 600 else "mean KLD, nats per token"
            made.setdefault("fidelity", {})[width_name] = charts.interval_plot(rows, axis, width=width)
        phases = [charts.Row(label=p.name, series=p.series, figure=p.kld) for p in seen.phases if p.kld]
        if phases:
            axis = "mean KLD after each phase, nats per token"
            made.setdefault("phases", {})[width_name] = charts.interval_plot(phases, axis, width=width)
        if len(seen.loss) > 1 or len(seen.kld) > 1:
            made.setdefault("curve", {})[width_name] = charts.curve_plot(seen.loss, seen.kld, width=width)
        sizes = [(a.title, a.role, a.size_bytes, a.size) for a in seen.artifacts if a.size_bytes]
        if sizes:
            made.setdefault("sizes", {})[width_name] = charts.bar_plot(sizes, "file size", width=width)
        for name, plot in long_charts.plots(seen.long, width).items():
            made.setdefault(name, {})[width_name] = plot
    return made


def commands(path: str, name: str, recipe: str) -> list[tuple[str, str]]:
    """(runtime, shell commands) that run the file at ``path``."""
    quoted = shlex.quote(path)
    tag = re.sub(r"[^a-z0-9._]+", "-", f"{name}-{recipe}".lower()).strip("-.") or "model"
    modelfile = shlex.quote(f"FROM {path}")
    return [
        ("llama.cpp, in the terminal", f"llama-cli -m {quoted}"),
        ("llama.cpp, as a server on this machine", f"llama-server -m {quoted} --host 127.0.0.1 --port 8080"),
        (
            "Ollama",
            f"printf '%s\\n' {modelfile} > lowbit.Modelfile\nollama create {tag} -f lowbit.Modelfile\nollama run {tag}",
        ),
        ("LM Studio", f"lms import --copy {quoted}"),
        ("lowbit", f"lowbit chat {quoted}"),
    ]


make_callable(__name__)
