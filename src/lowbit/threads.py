"""How many threads work, how they share it, and how they wait for each other."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lowbit.errors import BadOption
from lowbit.units import MIB

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_T = TypeVar("_T")


def wait_passively() -> None:
    """Call before the first library that brings OpenMP (torch, llama.cpp) is loaded; what the user set stays.

    Threads that spin while they wait stall a run next to a busy neighbour; OpenMP reads these when it loads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def in_order(jobs: Iterable[Callable[[], _T]], threads: int) -> Generator[_T]:
    """The jobs' results in their order, ``threads`` jobs at work at a time and twice as many results waiting at most.

    The first error in order is raised, and no job begins after that or after ``close``. With one thread the jobs run
    in the caller's. numpy, ggml, hashing and file access let other threads run meanwhile.
    """
    if threads == 1:
        for job in jobs:
            yield job()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lowbit")
    waiting: collections.deque[Future[_T]] = collections.deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_shares(n: int, threads: int, job: Callable[[int, int], None]) -> None:
    """Runs job(begin, end) over 0 to n, cut into a share a thread, all at once."""
    share = max(1, -(-n // max(1, threads)))
    jobs = (functools.partial(job, begin, min(begin + share, n)) for begin in range(0, n, share))
    for _ in in_order(jobs, threads):
        pass


def keep_freed_memory() -> None:
    """Call before work that takes and frees megabytes over and over, on any thread.

    glibc gives them back to the kernel each time, and taking them again costs a page fault for every 4 KiB: a tenth of
    the time of packing. After this a process holds on to up to 64 MiB. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 64 * MIB)


def thread_count(asked: int | None) -> int:
    """How many threads to use: what the user asks for, or by default one a core. Raises BadOption below 1."""
    if asked is not None and asked < 1:
        raise BadOption("bad value for threads", found=asked, expected="a whole number from 1 up")
    return available_cores() if asked is None else asked


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
