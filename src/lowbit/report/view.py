"""The record of a run as what the page and the terminal show, section by section.

The record is untrusted: every part may be missing or of another type, and a section without its facts is None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lowbit.report import long_view, plan_view, task_view, verdicts
from lowbit.report.figures import Figure, figure, mapping, number, sequence, text
from lowbit.report.plan_view import Planned
from lowbit.units import format_bytes, format_duration, format_share

# Order and words of the artifacts wherever they stand side by side.
TITLES = {"reference": "reference", "naive": "naive Q4_0", "calibrated": "calibrated", "model": "this model"}
# key in "fidelity" -> (name, what it says, printed as percent)
METRICS = {
    "perplexity": ("Perplexity", "", False),
    "kld_mean": ("Mean KLD", "nats per token", False),
    "kld_lower_bound": ("Mean KLD, at least", "nats per token; all that an endpoint's log-probabilities tell", False),
    "kld_median": ("Median KLD", "nats per token", False),
    "kld_p99": ("99th percentile KLD", "nats per token", False),
    "top1": ("Top-1 agreement", "with the reference", True),
    "rms_delta_p": ("RMS Δp", "of the right token's probability", True),
}
SPEEDS = {
    "time_to_first_token": "Time to first token, s",
    "prompt_tokens_per_second": "Prompt, tokens/s",
    "generation_tokens_per_second": "Generation, tokens/s",
}
PHASES = {"nearest": "rounded to nearest", "calibrated": "calibrated rounding", "distilled": "distillation"}


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One measured file, or an endpoint. fidelity, speed: figures by name; a figure that cannot be shown is absent.
    runtime: what it ran in, "" where the record does not say."""

    role: str
    title: str
    file: str
    runtime: str
    size_bytes: float | None
    bits_per_weight: float | None
    fidelity: dict[str, Figure]
    speed: dict[str, Figure]
    peak_memory: Figure | None

    @property
    def size(self) -> str:
        return format_bytes(self.size_bytes) if self.size_bytes is not None else ""

    @property
    def memory(self) -> str:
        return format_bytes(self.peak_memory.value) if self.peak_memory is not None else ""


@dataclass(frozen=True, kw_only=True)
class File:
    name: str
    size: str
    bits: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the certificate says of the product's tensors of one type: blocks, and the shares of them."""

    type: str
    blocks: str
    exact: str
    within_scale_rounding: str
    off_lattice: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    name: str
    series: str
    kld: Figure | None
    duration: str
    tokens: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything a report shows. Lists are empty and texts "" where the record has nothing."""

    name: str
    recipe: str
    product: str
    product_path: str
    created: str
    command: str
    version: str
    license: str
    weights: str
    ratio: Figure | None
    artifacts: list[Artifact]
    compared: list[verdicts.Compared]
    text_facts: list[tuple[str, str]]
    phases: list[Phase]
    loss: list[tuple[float, float]]
    kld: list[tuple[float, float]]
    data_sources: list[tuple[str, str]]
    data_tokens: list[tuple[str, str]]
    files: list[File]
    proofs: list[Proof]
    proved: str
    certificate: str
    source: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    options: list[tuple[str, str]]
    stages: list[tuple[str, str]]
    grids: list[tuple[str, str]]
    long: long_view.LongView
    plan: Planned | None = None
    tasks: list[task_view.TaskView]
    left_out: list[str] = field(default_factory=list)

    @property
    def runtimes(self) -> str:
        """What the files ran in; records of before runtimes were named are llama.cpp's."""
        return " or ".join(sorted({a.runtime or "llama.cpp" for a in self.artifacts}))

    def artifact(self, role: str) -> Artifact | None:
        return next((a for a in self.artifacts if a.role == role), None)

    @property
    def model(self) -> Artifact | None:
        return self.artifact("model")

    @property
    def repeats(self) -> str:
        """How often each speed was measured; "" without speeds."""
        counts = sorted({f.n for a in self.artifacts for f in a.speed.values()})
        return " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""


def build(record: dict[str, Any], run_dir: Path) -> View:
    """Reads the record of the run folder ``run_dir``; never raises on what a record may hold."""
    model, training, measured = (mapping(record.get(key)) for key in ("model", "training", "measure"))
    files, certificate = mapping(record.get("files")), mapping(record.get("certificate"))
    recipe = text(record.get("recipe")) or "q4_0"
    product = _product(files, recipe)
    left_out: list[str] = []
    machine = _pairs(record.get("machine") or measured.get("machine"))
    artifacts = _artifacts(measured, files, bool(machine), left_out)
    curve = [mapping(point) for point in sequence(training.get("curve"))]
    data = mapping(training.get("data"))
    weights = number(model.get("weights"))
    return View(
        name=text(model.get("name")) or run_dir.resolve().name,
        recipe=recipe,
        product=product,
        product_path=str(run_dir.resolve() / product) if product else "",
        created=_moment(text(record.get("created"))),
        command=text(record.get("command")),
        version=text(record.get("lowbit")),
        license=text(model.get("license")),
        weights=f"{weights:,.0f}" if weights else "",
        ratio=_ratio(measured, artifacts),
        artifacts=artifacts,
        compared=verdicts.of(measured) if artifacts else [],
        text_facts=_text_facts(measured, artifacts),
        phases=_phases(training, left_out),
        loss=_curve(curve, "loss"),
        kld=_curve(curve, "kld"),
        data_sources=[
            (text(s.get("name")), text(s.get("license"))) for s in map(mapping, sequence(data.get("sources")))
        ],
        data_tokens=[
            (label, f"{count:,.0f}")
            for label, key in (("tokens sampled", "sampled_tokens"), ("tokens of text", "text_tokens"))
            if (count := number(data.get(key)))
        ]
        + _how_trained(training),
        files=_files(files),
        proofs=[_proof(kind, mapping(raw)) for kind, raw in mapping(certificate.get("types")).items()],
        proved=_proved(mapping(certificate.get("totals"))),
        certificate=text(certificate.get("file")),
        plan=plan_view.read(record.get("plan")),
        source=_source(model),
        machine=machine,
        options=_pairs(record.get("options")),
        stages=[
            (text(stage.get("name")), format_duration(seconds))
            for stage in map(mapping, sequence(record.get("stages")))
            if (seconds := number(stage.get("seconds"))) is not None
        ],
        grids=_grids(mapping(record.get("grids"))),
        long=long_view.build(measured),
        tasks=task_view.build(measured),
        left_out=left_out,
    )


def _how_trained(training: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run decided for itself, where the options left it open."""
    rate = number(training.get("learning_rate"))
    facts = [("precision of the products", text(training.get("precision")))]
    facts.append(("peak learning rate", f"{rate:g}" if rate else ""))
    return [(label, value) for label, value in facts if value]


def _moment(iso: str) -> str:
    """'2026-11-23T12:00:00+00:00' -> '2026-11-23 12:00 UTC'; other texts as they are."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".rstrip()


def _product(files: dict[str, Any], recipe: str) -> str:
    """The file that ships: model-<recipe>.gguf if it was made."""
    wanted = f"model-{recipe}.gguf"
    return wanted if wanted in files else next((name for name in files if name.startswith("model-")), "")


def _artifacts(measured: dict[str, Any], files: dict[str, Any], machine: bool, left_out: list[str]) -> list[Artifact]:
    """The measured files in their usual order, the reference first, as far as the record vouches for them."""
    reference = mapping(measured.get("reference"))
    entries = [(entry, _role(entry.get("path"))) for entry in map(mapping, sequence(measured.get("artifacts")))]
    if reference:
        entries.insert(0, ({**reference, "fidelity": {"perplexity": reference.get("perplexity")}}, "reference"))
    found = []
    for entry, role in entries:
        file = _file_name(entry)
        known = mapping(files.get(file))
        runtime = text(mapping(entry.get("runtime")).get("name"))
        endpoint = runtime == "openai"  # what it runs cannot be hashed
        if not machine or not (endpoint or text(entry.get("sha256")) or text(known.get("sha256"))):
            missing = "machine" if not machine else "hash"
            left_out.append(f"The figures of {file or 'an artifact'}: the record does not give the {missing}.")
            continue
        memory = mapping(entry.get("memory"))
        found.append(
            Artifact(
                role=role,
                title=TITLES.get(role, file),
                file=file,
                runtime=_runtime(entry),
                size_bytes=number(entry.get("size_bytes", known.get("size_bytes"))),
                bits_per_weight=number(entry.get("bits_per_weight", known.get("bits_per_weight"))),
                fidelity=_figures(entry.get("fidelity"), {key: percent for key, (_, _, percent) in METRICS.items()}),
                speed=_figures(entry.get("speed"), dict.fromkeys(SPEEDS, False)),
                peak_memory=figure(memory.get("peak_bytes")),
            )
        )
    order = list(TITLES)
    return sorted(found, key=lambda a: order.index(a.role) if a.role in order else len(order))


def _file_name(entry: dict[str, Any]) -> str:
    """A file's name; of an endpoint the model's and the host's."""
    path = text(entry.get("path"))
    if path.startswith(("http://", "https://")):
        host = path.partition("://")[2].partition("/")[0]
        return f"{text(entry.get('model'))} at {host}".strip()
    return Path(path).name


def _runtime(entry: dict[str, Any]) -> str:
    """The runtime's name; of an endpoint the server's, where it is known."""
    runtime = mapping(entry.get("runtime"))
    name = text(runtime.get("name"))
    return (text(runtime.get("version")) or "endpoint") if name == "openai" else name


def not_measured(measured: dict[str, Any]) -> list[str]:
    """A line for each artifact of which something could not be measured."""
    entries = map(mapping, sequence(measured.get("artifacts")))
    return [f"{_file_name(entry)}: no {said}" for entry in entries if (said := text(entry.get("not_measured")))]


def measured_artifacts(measured: dict[str, Any]) -> list[Artifact]:
    """The files of a `lowbit measure` result, which names its own machine and hashes."""
    return _artifacts(measured, {}, bool(mapping(measured.get("machine"))), [])


def _figures(raw: Any, percents: dict[str, bool]) -> dict[str, Figure]:
    found = mapping(raw)
    shown = {key: figure(found.get(key), percent=percent) for key, percent in percents.items()}
    return {key: value for key, value in shown.items() if value is not None}


def _ratio(measured: dict[str, Any], artifacts: list[Artifact]) -> Figure | None:
    """Mean KLD of the model over that of naive Q4_0, with the interval of the paired bootstrap."""
    if not {"model", "naive"} <= {a.role for a in artifacts}:
        return None
    for pair in map(mapping, sequence(measured.get("pairs"))):
        if _role(pair.get("artifact")) == "model" and _role(pair.get("baseline")) == "naive":
            return figure(pair.get("kld_mean_ratio"))
    return None


def _role(path: Any) -> str:
    """'runs/x/naive-q4_0.gguf' -> 'naive'"""
    return Path(text(path)).name.removesuffix(".gguf").split("-")[0]


def _text_facts(measured: dict[str, Any], artifacts: list[Artifact]) -> list[tuple[str, str]]:
    labels = {"name": "text", "tokens": "tokens in it", "chunk": "tokens a chunk", "sha256": "its SHA-256"}
    labels |= {"kv type": "KV cache", "resamples": "bootstrap resamples", "bootstrap units": "stretches drawn from"}
    about = {
        **mapping(measured.get("text")),
        **_chosen(mapping(measured.get("options")), "chunk", "kv_type", "resamples", "bootstrap_units"),
    }
    about.pop("path", None)
    facts = [(labels.get(key, key), value) for key, value in _pairs(about)]
    scored = {f.n for a in artifacts for f in a.fidelity.values()}
    if len(scored) == 1:
        facts.append(("scored tokens (n)", f"{scored.pop():,}"))
    return facts


def _chosen(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: raw[key] for key in keys if key in raw}


def _phases(training: dict[str, Any], left_out: list[str]) -> list[Phase]:
    shown = []
    series = {"nearest": "naive", "calibrated": "calibrated", "distilled": "model"}
    for phase in map(mapping, sequence(training.get("phases"))):
        name = text(phase.get("name"))
        seconds, tokens = number(phase.get("seconds")), number(phase.get("tokens"))
        kld = figure(phase.get("kld"))
        if kld is None and phase.get("kld") is not None:
            left_out.append(f"The KLD of the phase {name!r}: the record does not give its interval and n.")
        shown.append(
            Phase(
                name=PHASES.get(name, name),
                series=series.get(name, "model"),
                kld=kld,
                duration=format_duration(seconds) if seconds is not None else "",
                tokens=f"{tokens:,.0f}" if tokens else "",
                detail=text(phase.get("detail")),
            )
        )
    return shown


def _curve(points: list[dict[str, Any]], key: str, most: int = 400) -> list[tuple[float, float]]:
    """(minutes, value) of the points that have one; long runs are averaged down to at most ``most`` points."""
    found = []
    for point in points:
        seconds, value = number(point.get("seconds")), number(point.get(key))
        if seconds is not None and value is not None and seconds >= 0:
            found.append((seconds / 60, value))
    size = -(-len(found) // most) or 1
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _files(files: dict[str, Any]) -> list[File]:
    shown = []
    for name, raw in files.items():
        entry = mapping(raw)
        size, bits = number(entry.get("size_bytes")), number(entry.get("bits_per_weight"))
        shown.append(
            File(
                name=name,
                size=f"{format_bytes(size)}" if size is not None else "",
                bits=f"{bits:.2f}" if bits is not None else "",
                sha256=text(entry.get("sha256")),
            )
        )
    return shown


def _proof(kind: str, counts: dict[str, Any]) -> Proof:
    blocks = number(counts.get("blocks")) or 0
    keys = ("exact", "within_scale_rounding", "off_lattice")
    return Proof(
        type=kind, blocks=f"{blocks:,.0f}", **{key: format_share(number(counts.get(key)) or 0, blocks) for key in keys}
    )


def _proved(totals: dict[str, Any]) -> str:
    """'100% of 12,345'; "" where the record has no certificate."""
    blocks, exact = number(totals.get("blocks")), number(totals.get("exact"))
    return f"{format_share(exact, blocks)} of {blocks:,.0f}" if blocks and exact is not None else ""


def _source(model: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {"name": "model", "license": "licence", "sha256": "SHA-256"}
    ordered = _chosen(model, "name", "architecture", "weights", "license", "source", "sha256")
    stored = mapping(model.get("files"))
    rest = {key: value for key, value in model.items() if key != "files"}
    facts = [(labels.get(key, key), value) for key, value in _pairs({**ordered, **rest})]
    return facts + [(f"SHA-256 of its {name}", text(digest)) for name, digest in stored.items()]


def _grids(grids: dict[str, Any]) -> list[tuple[str, str]]:
    """(grid, how many tensors are on it), most tensors first."""
    counts: dict[str, int] = {}
    for grid in grids.values():
        if isinstance(grid, str):
            counts[grid] = counts.get(grid, 0) + 1
    return [(grid, f"{n} tensor{'s' if n > 1 else ''}") for grid, n in sorted(counts.items(), key=lambda kv: -kv[1])]


def _pairs(raw: Any) -> list[tuple[str, str]]:
    """A mapping as (label, text) in its order; nulls and empty values left out."""
    return [
        (str(key).replace("_bytes", "").replace("_", " "), _plain(str(key), value))
        for key, value in mapping(raw).items()
        if value not in (None, "", [], {})
    ]


def _plain(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    amount = number(value)
    if amount is not None:
        if key.endswith("_bytes"):
            return format_bytes(amount)
        return f"{amount:,.0f}" if amount == int(amount) and abs(amount) >= 10_000 else f"{amount:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
