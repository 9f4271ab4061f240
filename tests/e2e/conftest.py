"""A tiny model with a real tokenizer, and the real command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# One set of options for every run, so that a resumed one is the same command.
FEW_STEPS = ("--minutes", "0.3", "--steps", "3", "--threads", "1", "--no-speed")


def run_lowbit(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    options = {"capture_output": True, "text": True, "timeout": 240, "check": False, "env": environment}
    return subprocess.run(command, **options | more)


@pytest.fixture(scope="session")
def lowbit_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """lowbit_command(*words, **of subprocess.run)"""
    return run_lowbit


@pytest.fixture(scope="session")
def few_steps() -> tuple[str, ...]:
    """Options of a training that is over in a second."""
    return FEW_STEPS


@pytest.fixture(scope="session")
def smol_folder(
    save_tiny_llama: Callable[..., Any],
    real_tokenizer: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two random layers with SmolLM2's own tokenizer and chat template, its head tied as SmolLM2's is."""
    folder = tmp_path_factory.mktemp("model") / "tiny-smol"
    save_tiny_llama(folder, tokenizer=False, vocab_size=49152, num_hidden_layers=2, tie_word_embeddings=True)
    for path in real_tokenizer("smollm2-135m").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def byte_folder(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers with a tokenizer of bytes: the quickest model there is."""
    folder = tmp_path_factory.mktemp("model") / "tiny-bytes"
    save_tiny_llama(folder, num_hidden_layers=2)
    return folder
