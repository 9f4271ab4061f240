"""The total of `lowbit plan` against the measured peak of a process that runs the model.

    python benchmarks/plan_total.py [MODEL...] [--quick]

For each model (default: SmolLM2-135M and Gemma 3 270M, as packaged) and each setting a fresh process starts llama.cpp's
server (in process, by xllamacpp), fills the context of every slot with a prompt and generates 8 tokens in each. Its
peak is the kernel's (VmHWM): everything that was ever resident at once, Python, the library and the pages of the mapped
file included, each of which is a row of the plan. Ends with 1 where a total is off by more than 3%.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 1 << 20
GENERATED = 8
SETTINGS: list[dict[str, Any]] = [
    {"context": 512, "slots": 1},
    {"context": 1024, "slots": 1, "ubatch": 128},
    {"context": 2048, "slots": 1},
    {"context": 2048, "slots": 1, "kv_type_k": "q8_0", "kv_type_v": "q8_0"},
    {"context": 2048, "slots": 1, "kv_type_k": "q8_0", "kv_type_v": "q4_0"},
    {"context": 2048, "slots": 1, "flash_attention": False},
    {"context": 2048, "slots": 1, "swa_full": True, "kv_type_k": "f32", "kv_type_v": "f32"},
    {"context": 2048, "slots": 2},
    {"context": 2048, "slots": 2, "kv_unified": True},
    {"context": 2048},
    {"context": 4096, "slots": 4, "kv_type_k": "q8_0", "kv_type_v": "q8_0"},
    {"context": 4096, "slots": 1},
    {"context": 2048, "slots": 1, "mmap": False},
    {"context": 8192, "slots": 1, "swa_full": True},
]
QUICK = (0, 3, 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--quick", action="store_true", help="three settings only")
    parser.add_argument("--child", metavar="JOB", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return 0
    worst = 0.0
    for name in args.models:
        worst = max(worst, *of_model(name, [SETTINGS[i] for i in QUICK] if args.quick else SETTINGS))
    print(f"the largest difference is {worst:.2%}")
    return worst > 0.03


def of_model(name: str, every: list[dict[str, Any]]) -> list[float]:
    from lowbit.plan import PlanOptions, open_model, plan_open

    print(f"\n{name}\n{'plan':>10} {'peak':>11} {'off by':>7}  settings")
    differences = []
    with open_model(name) as model:
        for settings in every:
            plan = plan_open(model, PlanOptions(**settings))
            peak = measure(str(model.gguf), plan.settings, model.vocab_size)
            differences.append(abs(plan.total_bytes / peak - 1))
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            off = plan.total_bytes / peak - 1
            print(f"{plan.total_bytes / MIB:6.1f} MiB {peak / MIB:7.1f} MiB {off:+7.2%}  {said}", flush=True)
    return differences


def measure(path: str, planned: Mapping[str, Any], vocab: int) -> int:
    """Bytes of the peak of a fresh process. ``planned``: Plan.settings."""
    from lowbit.run._kv_types import KV_TYPES

    settings = {
        "n_ctx": planned["context"], "n_parallel": planned["slots"], "kv_unified": planned["kv_unified"],
        "n_batch": planned["batch"], "n_ubatch": planned["ubatch"], "swa_full": planned["swa_full"],
        "cache_type_k": KV_TYPES[planned["kv_type_k"]], "cache_type_v": KV_TYPES[planned["kv_type_v"]],
        "flash_attn_type": int(planned["flash_attention"]), "load_mode": 1 if planned["mmap"] else 0,
    }  # fmt: skip
    room = planned["context"] // planned["slots"]
    job = json.dumps({"path": path, "settings": settings, "room": room, "vocab": vocab})
    done = subprocess.run([sys.executable, __file__, "--child", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def child(job: dict[str, Any]) -> None:
    """Starts llama.cpp's server in this process, fills all slots, generates, and prints the peak."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["path"]
    for key, value in job["settings"].items():
        setattr(params, key, value)
    # What grows with use, up to limits of its own: the plan's notes speak of it, its total does not have it.
    params.cache_ram_mib, params.n_ctx_checkpoints = 0, 0
    server = xllamacpp.Server(params)
    rng = random.Random(0)
    for slot in range(params.n_parallel):
        prompt = [rng.randrange(100, job["vocab"] - 100) for _ in range(job["room"] - GENERATED - 8)]
        request = {"prompt": prompt, "n_predict": GENERATED, "temperature": 0, "id_slot": slot, "ignore_eos": True}
        answer = server.handle_completions(request)
        if answer["usage"]["completion_tokens"] != GENERATED:
            raise SystemExit(f"no {GENERATED} tokens: {str(answer)[:300]}")
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    sys.exit(main())
