"""What is said, in one line, where a batch cannot be put on a Ray cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from batch_server import free_port
from jobs import command, lowbit, write

from lowbit.batch.engines import EngineOptions, open_engine
from lowbit.model_server import ModelOptions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", ["word"])


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    return done.stderr


def test_ray_is_not_installed(source: Path) -> None:
    words = command("run", source, "--engine", "ray", "--model", "smollm2-135m")[3:]
    code = "import sys; sys.modules['ray'] = None; from lowbit.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert "ray is not installed" in one_line(done) and "pip install 'lowbit[ray]'" in done.stderr


def test_no_cluster_answers(source: Path) -> None:
    pytest.importorskip("ray")
    given = f"127.0.0.1:{free_port()}"
    said = one_line(
        lowbit("run", source, "--engine", "ray", "--model", "smollm2-135m", "--ray-address", given, "--quiet")
    )
    assert f"--ray-address {given}: no Ray cluster answers" in said and "ray start --head" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "ray", "--endpoint", "http://127.0.0.1:1/v1"], "no --endpoint"),
        (["--engine", "ray"], "expected --model"),
        (["--model", "smollm2-135m", "--ray-address", "127.0.0.1:1"], "expected --engine ray"),
        (["--engine", "ray", "--model", "smollm2-135m", "--ray-address", "nonsense"], "expected HOST:PORT"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str, source: Path) -> None:
    pytest.importorskip("ray")
    assert said in one_line(lowbit("run", source, *words, "--quiet"))


def test_a_batch_may_go_on_on_one_machine_and_the_other_way_round() -> None:
    pytest.importorskip("ray")
    options = EngineOptions(model="smollm2-135m", server=ModelOptions(kv_type="q8_0"))
    here, there = (asyncio.run(open_engine(options, name).deciding()) for name in ("local", "ray"))
    assert here == there and here["kv"] == "q8_0"


def test_it_is_no_engine_that_is_taken_by_itself() -> None:
    assert open_engine(EngineOptions(model="smollm2-135m")).name == "local"
