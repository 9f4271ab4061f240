"""examples/own_trainer.py: Hugging Face's Trainer trains a prepared model, and the file holds what it computed with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lowbit.checkpoint import open_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_trainer.py"


def test_the_file_holds_what_was_trained(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, out, text = tiny_llama(), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    words = [sys.executable, str(EXAMPLE), str(folder), str(text), "-o", str(out), "--steps", "6", "--length", "32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    gguf = out / "model-q4_0.gguf"
    assert done.stdout.splitlines()[-1] == str(gguf)
    name, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    saved = out / "checkpoint"
    with open_checkpoint(folder) as before, open_checkpoint(saved) as trained, open_checkpoint(gguf) as file:
        assert (trained.read(norm) != before.read(norm)).any()
        for each in trained.names:
            assert np.array_equal(trained.read(each), file.read(each)), each
        # Trained, and on the grid: other values than plain rounding of the start gives.
        from lowbit import grid

        q4_0 = grid.get("q4_0")
        plain = q4_0.dequantize(q4_0.quantize(before.read(name)))
        assert (trained.read(name) != plain).any()
