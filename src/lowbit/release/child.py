"""What may take the whole process with it runs in a child: llama.cpp answers some pairs of files by aborting.

``call(name, ...)`` runs the function of that name in _child_tasks.py in a fresh interpreter and gives its result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from lowbit import errors
from lowbit.errors import LowbitError, RuntimeFailed

_MARK = "lowbit-child:"
_SECONDS = 1800.0


def call(task: str, **arguments: Any) -> Any:
    """The task's result, JSON. Raises the LowbitError that the task raised, RuntimeFailed where the child died."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lowbit.release._child_tasks", task],
            input=json.dumps(arguments),
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeFailed(
            "the runtime did not come to an end", found=f"still at work after {_SECONDS:.0f} s"
        ) from None
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if done.returncode < 0 or line is None:
        said = [text for text in done.stderr.splitlines() if text.strip()]
        found = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise RuntimeFailed("the runtime died of it", found=f"{said[-1].strip()[:200]} ({found})" if said else found)
    answer = json.loads(line.removeprefix(_MARK))
    if "error" in answer:
        kind = getattr(errors, answer["kind"], RuntimeFailed)
        raise kind(answer["error"]) if issubclass(kind, LowbitError) else RuntimeFailed(answer["error"])
    return answer["result"]


def answer(result: Any = None, error: LowbitError | None = None) -> None:
    """In the child: the last line of its output."""
    told = {"result": result} if error is None else {"error": str(error), "kind": type(error).__name__}
    sys.stdout.write(f"\n{_MARK}{json.dumps(told)}\n")
    sys.stdout.flush()
