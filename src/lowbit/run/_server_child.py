"""The process that llama.cpp's server runs in: ends when its parent does, however that ended.

The job comes as one line of JSON on standard input, which then stays open: its end is the parent's. What is said on
standard output is one line of JSON, {"url"} or {"error"}; the server's own log goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    """Serves until standard input ends."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    job = json.loads(line)
    say = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints is log
    if job.get("command"):
        _run_binary(job["command"], say)
    else:
        _run_library(job, say)


def _run_library(job: dict[str, Any], say: Any) -> None:
    threading.Thread(target=_wait_for_end, daemon=True).start()
    try:
        import xllamacpp

        server = xllamacpp.Server(_params(xllamacpp, job))
        _tell(say, {"url": server.listening_address})
    except Exception as error:
        _tell(say, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    while True:
        time.sleep(3600)


def _run_binary(command: list[str], say: Any) -> None:
    options: dict[str, Any] = {"preexec_fn": _die_with_parent} if sys.platform == "linux" else {}
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    except OSError as error:
        _tell(say, {"error": f"{error.strerror}: {command[0]}"})
        return
    _tell(say, {"started": child.pid})
    threading.Thread(target=_wait_for_end, args=(child,), daemon=True).start()
    os._exit(child.wait() & 0xFF)


def _wait_for_end(child: subprocess.Popen[bytes] | None = None) -> None:
    """Ends this process when standard input does, or another has become its parent: what the parent forked may hold
    the other end open."""
    parent = os.getppid()
    with contextlib.suppress(OSError, ValueError):
        while os.getppid() == parent:
            ready = select.select([0], [], [], 1.0)[0] if sys.platform != "win32" else [0]
            if ready and not os.read(0, 4096):
                break
    if child is not None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
        child.kill()
    os._exit(0)


def _die_with_parent() -> None:
    """Between fork and exec of the binary, whose parent is this process's main thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tell(say: Any, what: dict[str, Any]) -> None:
    say.write(json.dumps(what) + "\n")
    say.flush()


def _params(xllamacpp: Any, job: dict[str, Any]) -> Any:
    """common_params of llama.cpp. What is not set here stays at llama-server's own default, but for the context: it
    is not fitted to the memory (--fit), so that what was asked for is what is served."""
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.hostnames, params.port = ["127.0.0.1"], job["port"]
    params.n_ctx, params.n_parallel = job["context"], job["slots"]
    params.n_batch, params.n_ubatch = job["batch"], job["ubatch"]
    for pool in (params.cpuparams, params.cpuparams_batch):
        pool.n_threads = job["threads"]
    types = xllamacpp.ggml_type
    params.cache_type_k = getattr(types, f"GGML_TYPE_{job['type_k'].upper()}")
    params.cache_type_v = getattr(types, f"GGML_TYPE_{job['type_v'].upper()}")
    if job["flash_attention"] is not None:
        states = xllamacpp.llama_flash_attn_type
        name = "ENABLED" if job["flash_attention"] else "DISABLED"
        params.flash_attn_type = getattr(states, f"LLAMA_FLASH_ATTN_TYPE_{name}")
    params.swa_full, params.kv_unified = job["swa_full"], job["kv_unified"]
    if job["cache_ram"] is not None:
        params.cache_ram_mib = job["cache_ram"]
    if job["idle_cache"] is not None:
        params.cache_idle_slots = job["idle_cache"]
    params.model_alias = {job["alias"]}
    params.endpoint_props = params.endpoint_slots = True
    params.fit_params, params.ui = False, job["ui"]
    if job["api_key"]:
        params.api_keys = [job["api_key"]]
    params.verbosity = job["verbosity"]
    if job["mmproj"]:
        params.mmproj.path = job["mmproj"]
    if job["template"]:
        params.chat_template = Path(job["template"]).read_text(encoding="utf-8")
    if job["slot_folder"]:
        params.slot_save_path = job["slot_folder"].rstrip(os.sep) + os.sep
    if job["reasoning"]:
        formats = xllamacpp.common_reasoning_format
        params.reasoning_format = getattr(formats, f"COMMON_REASONING_FORMAT_{job['reasoning'].upper()}")
    if job["drafter"]:
        _add_drafter(xllamacpp, params, job)
    return params


def _add_drafter(xllamacpp: Any, params: Any, job: dict[str, Any]) -> None:
    draft = params.speculative.draft
    draft.mparams.path = job["drafter"]
    if job["draft_tokens"]:
        draft.n_max = job["draft_tokens"]
    for pool in (draft.cpuparams, draft.cpuparams_batch):
        pool.n_threads = job["threads"]
    kinds = xllamacpp.common_speculative_type
    params.speculative.types = [
        getattr(kinds, f"COMMON_SPECULATIVE_TYPE_{job['draft_type'].upper().replace('-', '_')}")
    ]
