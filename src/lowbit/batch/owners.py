"""Who works on a batch: processes, told apart by host, pid and the time they began, since pids come again."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SILENT = 120.0  # seconds without a sign of life after which what a process had is taken over


@dataclass(frozen=True, slots=True)
class Owner:
    """host: name and pid namespace. start: of the process, in the system's own clock, "" where it does not tell.
    begun, heard: seconds of the epoch. beat: when it was heard, by its machine's monotonic clock."""

    id: int
    host: str
    pid: int
    start: str
    begun: float
    heard: float
    beat: float

    def alive(self) -> bool:
        """False of one that is gone or has been silent for long."""
        if self.host != host() or sys.platform == "win32":  # os.kill(pid, 0) would end it there
            return time.time() - self.heard <= SILENT
        if not exists(self.pid) or (self.start and started(self.pid) != self.start):
            return False
        # Not the time of day: it jumps, and a machine that slept would find all others silent.
        return time.monotonic() - self.beat <= SILENT


def own() -> tuple[str, int, str]:
    """Host, pid and start of this process."""
    return host(), os.getpid(), started(os.getpid())


def host() -> str:
    """Two containers may have one name and one file system, and each its own pids."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def started(pid: int) -> str:
    """Ticks since the machine's start, field 22 of /proc/PID/stat with the boot's own id; "" where there is none."""
    fields = _stat(pid)
    return f"{_boot()}:{fields[19]}" if len(fields) > 19 else ""


def _is_zombie(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] in ("Z", "X")


def _stat(pid: int) -> list[str]:
    """The fields after the command, which may hold anything, so that the state is the first."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return ""
