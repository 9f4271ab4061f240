"""Threads wait passively in whatever lowbit loads, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"


@pytest.mark.parametrize("load", ["import lowbit.train", "from lowbit import ggml; ggml.library()"])
@pytest.mark.parametrize(("given", "expected"), [({}, "passive 0"), ({"OMP_WAIT_POLICY": "active"}, "active 0")])
def test_set_before_openmp_loads(load: str, given: dict[str, str], expected: str) -> None:
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    # The import of the heavy library finds the variables set: it is stopped at the door to look.
    watch = (
        "import builtins, sys, os\n"
        "real = builtins.__import__\n"
        "def watching(name, *rest, **more):\n"
        "    if name == 'torch' and 'torch' not in sys.modules: print('seen', os.environ.get('OMP_WAIT_POLICY'))\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = watching\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{watch}{load}\n{SHOW}"], capture_output=True, text=True, check=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == expected
    assert set(lines[:-1]) <= {f"seen {expected.split()[0]}"}
    assert bool(lines[:-1]) == ("train" in load)
