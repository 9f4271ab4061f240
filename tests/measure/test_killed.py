"""A long measurement that is killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def command(folder: Path, out: Path) -> list[str]:
    words = ["measure", str(folder / "good.gguf"), "--against", str(folder / "reference.gguf"), "--text"]
    words += [str(folder / "text.txt"), "--chunk", "64", "--chunks", "2", "--no-speed", "--threads", "1"]
    words += ["--kv", "q8_0", "--contexts", "512,640", "--kv-tokens", "1920", "--retrieval", "--haystacks", "1"]
    words += ["--depths", "0,100", "--json", str(out)]
    return [sys.executable, "-m", "lowbit", *words]


def figures(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    return {key: result[key] for key in ("artifacts", "kv", "retrieval")}


def test_killed_twice_it_ends_as_undisturbed(folder: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed.json"
    subprocess.run(command(folder, undisturbed), check=True, capture_output=True)
    out = tmp_path / "out.json"
    work = tmp_path / "out.json.work"
    cells = 0
    for more in (2, 2):
        child = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            give_up = time.monotonic() + 120
            while not work.exists() or work.read_bytes().count(b"\n") < 1 + cells + more:
                assert child.poll() is None and time.monotonic() < give_up
                time.sleep(0.002)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        assert not out.exists()
        cells = work.read_bytes().count(b"\n") - 1
    with open(work, "ab") as torn:
        torn.write(b'{"cell": "kv/640/2", "seconds": 0.1, "val')
    done = subprocess.run(command(folder, out), check=True, capture_output=True, text=True)
    assert f"Going on from {cells} finished parts" in done.stderr
    assert figures(out) == figures(undisturbed)
    assert not work.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.json"]
