"""Ray clusters for tests: nodes as `ray start` starts them, on loopback addresses of their own, and their ends.

Each node is a session of processes, so that kill -9 takes raylet, agents and workers together, as when a machine dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from batch_server import free_port

_MARK = "LOWBIT_TEST_CLUSTER"
_RAY = Path(sys.executable).with_name("ray")
# A node that dies is noticed in two seconds, not in twenty.
_HASTE = {
    "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2", "RAY_health_check_initial_delay_ms": "0",
}  # fmt: skip


class Cluster:
    """A context manager. address: of its head. Whatever happened, nothing of it is left afterwards."""

    def __init__(self, **head: object) -> None:
        self._mark, self._head = secrets.token_hex(8), head
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        # Sockets are in it, whose paths may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lb-", dir="/tmp"))
        self.address = f"127.0.0.2:{free_port()}"

    def __enter__(self) -> Self:
        try:
            port = self.address.rpartition(":")[2]
            self.start(
                "127.0.0.2", "--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats",
                f"--temp-dir={self.folder}", **self._head,
            )  # fmt: skip
            self.wait_for(1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for address in list(self._nodes):
            self.kill(address)
        for process in self.processes():  # a server is of a session of its own, and notices a little later
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, address: str, **more: object) -> None:
        """A further node; it is there some seconds later."""
        self.start(address, f"--address={self.address}", **more)

    def start(
        self, address: str, *words: str, cpus: int = 1, gpus: int = 0, hidden: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """hidden: a folder that the node shall not see, as if it were of another machine; wants root."""
        command = [
            str(_RAY), "start", "--block", f"--node-ip-address={address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
            "--object-store-memory=80000000", *words,
        ]  # fmt: skip
        if hidden is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", script, str(hidden), *command]
        given = {
            **os.environ,
            **_HASTE,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            _MARK: self._mark,
            **(environment or {}),
        }
        given.pop("RAY_ADDRESS", None)
        with open(self.folder / f"{address}.log", "wb") as log:
            self._nodes[address] = subprocess.Popen(
                command, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    def kill(self, address: str) -> None:
        """kill -9 of all that runs on a node, at once."""
        process = self._nodes.pop(address)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait_for(self, nodes: int, seconds: float = 60.0) -> None:
        """Until so many have a raylet that is ready."""
        deadline = time.monotonic() + seconds
        while True:
            logs = [path.read_text(errors="replace") for path in self.folder.glob("127.*.log")]
            if sum("Ray runtime started" in log for log in logs) >= nodes:
                return
            ended = [address for address, process in self._nodes.items() if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, "\n".join(logs)
            time.sleep(0.1)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What this cluster started, wherever it runs: those with ``name`` in their command lines."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def servers(self) -> list[psutil.Process]:
        """The models' servers."""
        return self.processes("_server_child")


def _end_with_parent() -> None:
    """`ray start --block` ends its node at SIGTERM: also where the tests themselves were killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def can_hide() -> bool:
    """Whether this process may mount."""
    words = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0
