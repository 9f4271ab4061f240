"""`lowbit measure` on artifacts of several runtimes at once, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lowbit

PROSE = "The rain had stopped, and the road to the village was empty. Nobody saw the thing go in again.\n"


def measured(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit", "--quiet", "measure", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_gguf_an_mlx_folder_and_a_hugging_face_folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(num_hidden_layers=2)
    gguf = lowbit.pack(folder, "q8_0", tmp_path / "model.gguf").path
    mlx = lowbit.pack(folder, "mlx_affine4_g32", tmp_path / "mlx-folder").path
    text = tmp_path / "text.txt"
    text.write_text(PROSE * 12)
    common = ("--against", folder, "--text", text, "--chunk", 64, "--chunks", 4, "--threads", 1, "--no-speed")
    done = measured(gguf, mlx, folder, *common, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    names = ["llama.cpp", "mlx", "transformers"]
    assert [entry["runtime"]["name"] for entry in result["artifacts"]] == names
    assert all(any(c.isdigit() for c in entry["runtime"]["version"]) for entry in result["artifacts"])
    eight, four, same = (entry["fidelity"]["kld_mean"]["value"] for entry in result["artifacts"])
    assert 0 <= same < eight < four  # the folder itself differs from its F32 in llama.cpp by the f16 cache alone
    assert same < 1e-5 and result["reference"]["runtime"]["name"] == "llama.cpp"
    assert [len(entry["sha256"]) for entry in result["artifacts"]] == [64] * 3
    assert len(result["pairs"]) == 3
    header, runtimes = (next(line for line in done.stdout.splitlines() if word in line) for word in ("gguf", "Runtime"))
    assert "mlx-folder" in header and all(name in runtimes for name in names)

    there = measured(folder, *common, "--reference-runtime", "transformers", "--json", "-")
    assert there.returncode == 0, there.stderr
    result = json.loads(there.stdout)
    assert result["reference"]["runtime"]["name"] == "transformers"
    assert result["artifacts"][0]["fidelity"]["kld_mean"]["value"] == 0


def test_wrong_runtimes_are_one_line(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text(PROSE * 12)
    common = ("--against", folder, "--text", text, "--chunk", 64, "--no-speed")
    for words, says in (
        ((folder, "--runtime", "llama.cpp"), "llama.cpp does not run this"),
        ((folder, "--runtime", "nonsense"), "expected one of litert-lm, llama.cpp, llama-server"),
        ((folder, "--kv-type", "q8_0"), "transformers has no option kv_type"),
        (("http://127.0.0.1:9",), "cannot be reached"),
    ):
        done = measured(*words, *common)
        assert done.returncode in (2, 3) and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
