"""A `lowbit serve` process with a real model."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil


class Served:
    """A `lowbit serve` process."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-m", "lowbit", "serve", *map(str, words), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("Serving on "):
                self.url = line.split()[2].rstrip(".")
                return
        raise AssertionError("".join(self.said))

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def health(self) -> int:
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)
