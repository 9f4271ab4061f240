"""Threads wait passively in whatever lowbit loads, unless the user says otherwise; work is shared and kept in order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowbit import threads

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


def test_cores_counts_hardware_threads_of_a_core_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, core in enumerate(("0", "1", "0", "1")):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(core + "\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert threads.available_cores() == 2
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.available_cores() == 1


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_jobs(count: int) -> None:
    at_work, most, begun = 0, 0, 0
    lock = threading.Lock()

    def job(i: int) -> Callable[[], int]:
        def work() -> int:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.02 if i % 3 == 0 else 0.001)
            with lock:
                at_work -= 1
            return i

        return work

    def jobs() -> Iterator[Callable[[], int]]:
        nonlocal begun
        for i in range(30):
            begun += 1
            yield job(i)

    for i, result in enumerate(threads.in_order(jobs(), count)):
        assert result == i
        assert begun - i <= 2 * count + 1  # nobody runs far ahead: results are memory
    assert begun == 30 and most == count


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_in_order_is_raised(count: int) -> None:
    done: list[int] = []

    def fail(i: int) -> None:
        time.sleep(0.05 if i == 4 else 0)
        if i in (4, 5):
            raise ValueError(i)
        done.append(i)

    with pytest.raises(ValueError, match="4"):
        list(threads.in_order(((lambda i=i: fail(i)) for i in range(100)), count))
    assert {0, 1, 2, 3} <= {*done} and len(done) < 20
