"""How many threads to use when the user does not say: the physical cores that this process may run on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Physical cores within this process's affinity mask and cgroup quota; at least 1.

    Two hardware threads of one core count once: llama.cpp's kernels saturate a core's vector units with one thread.
    Where the topology is not known (not Linux), the logical count.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return max(1, os.cpu_count() or 1)
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota() or len(cores)))


def _core_of(cpu: int) -> tuple[str, str]:
    topology = _CPUS / f"cpu{cpu}" / "topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def _quota() -> int | None:
    """Whole cores that the container's CPU quota allows, or None when there is no quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            return max(1, int(quota) // int(period))
    return None
