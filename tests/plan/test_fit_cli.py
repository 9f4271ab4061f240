"""`lowbit plan --ram`, family names and pages on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    out, err = capsys.readouterr()
    return status, out, err


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, out, _ = run(capsys, *words, "--json", "-")
    assert status == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_ram_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, "qwen3-4b", "--ram", "8GiB", "--runtime", "mlx", "--slots", "2", "--kv", "f16")
    [best] = found["best"]
    assert found["usable_bytes"] == found["room_bytes"] - found["margin_bytes"] == 8 * 2**30 - 8 * 2**30 // 3
    assert best["slots"] == 2 and best["limit"] == "memory" and best["total_bytes"] <= found["usable_bytes"]
    # The same context as a plan takes what was said of it.
    context = str(2 * best["context_per_slot"])
    plan = asked(capsys, "qwen3-4b", "--runtime", "mlx", "-c", context, "--slots", "2", "--kv", "f16")
    assert plan["total_bytes"] == best["total_bytes"]


def test_a_family_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "gemma-3", "--ram", "8GiB", "--runtime", "mlx", "--quiet")
    assert status == 0
    for word in ("gemma-3-270m", "gemma-3-27b", "mlx_affine4_g64", "2.7 GiB stay free"):
        assert word in out
    assert all(len(line) <= 180 for line in out.splitlines())


def test_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    status, out, _ = run(capsys, "gemma-3-1b", "--runtime", "vllm", "-c", "4096", "--html", str(page))
    assert status == 0 and "KV cache" in out and page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("gemma-4",), "several models"),
        (("gemma-4-31b", "--ram", "4GiB", "--runtime", "mlx"), "nothing fits; found 4.0 GiB"),
        (("gemma-3-1b", "--margin", "1GiB"), "--margin goes with --ram"),
        (("gemma-3-1b", "--ram", "1GiB", "--margin", "2GiB"), "the margin leaves no memory"),
        (("gemma-3-1b", "--ram", "4GiB", "-c", "4096"), "longest context"),
        (("gemma-3-1b", "--ram", "4GiB", "-ctk", "q8_0"), "longest context"),
        (("gemma-3-1b", "--ram", "8XB"), "expected a size such as 4GiB"),
        (("gemma-3-1b", "--ram", "8GiB", "--vram", "8GiB"), "not allowed with"),
        (("gema-3-1b", "--ram", "8GiB"), "Did you mean gemma-3-1b"),
        (("quux", "--ram", "8GiB"), "Public models have names here too: gemma-3"),
        (("gemma-3-1b", "--ram", "4GiB", "--runtime", "mlx", "--kv", "q8_0"), "mlx has no such KV type"),
        (("gemma-3-1b", "--ram", "4GiB", "--kv", "q8_0,zz"), "llama.cpp has no such KV type; found zz"),
        (("gemma-3-1b", "--ram", "4GiB", "--recipe", "mlx_affine4_g64"), "does not run this format; found mlx_aff"),
        (("gemma-3-1b", "--runtime", "ollama"), "expected one of litert-lm, llama.cpp, mlx, vllm"),
        (("gemma-3-1b", "--html", "/dev/null/page.html", "--runtime", "mlx"), "page.html"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    status, out, err = run(capsys, *words)
    assert status == 2 and not out and len(err.strip().splitlines()) == 1 and said in err
