"""vLLM's server as lowbit starts it, with a small server in its place: its command line, its coming up, its end.

NOT TESTED HERE: vLLM itself, which wants a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from standin_vllm import answer, install

from lowbit.batch.engines import EngineOptions
from lowbit.batch.engines._vllm import Vllm, command
from lowbit.batch.engines.base import Lost, NotReached
from lowbit.batch.items import Item
from lowbit.errors import BadOption, NotFound, RuntimeFailed
from lowbit.model_server import ModelOptions


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the server in vLLM's place was started with; it is on the PATH."""
    monkeypatch.setenv("PATH", f"{install(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_VLLM_LOG", str(tmp_path / "started"))
    return tmp_path / "started"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def item(said: str) -> Item:
    return Item("a", "/v1/chat/completions", {"messages": [{"role": "user", "content": said}]})


def test_its_command_line(tmp_path: Path) -> None:
    options = EngineOptions(model="/models/tiny", server=ModelOptions(kv_type="fp8", context=8192, template=Path("/t")))
    assert command(options, 4, 1234) == [
        "vllm", "serve", "/models/tiny", "--host", "127.0.0.1", "--port", "1234", "--served-model-name", "tiny",
        "--max-num-seqs", "4", "--max-model-len", "2048", "--kv-cache-dtype", "fp8", "--chat-template", "/t",
    ]  # fmt: skip
    plain = command(EngineOptions(model="/models/tiny"), 128, 1)
    assert plain[-2:] == ["--max-num-seqs", "128"], "the rest is vLLM's to choose"


@pytest.mark.parametrize(
    "given", [{"drafter": Path("d")}, {"llama_server": "x"}, {"swa_full": True}, {"kv_type": "q8_0"}]
)
def test_what_only_llama_cpp_has_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        Vllm(EngineOptions(model="/models/tiny", server=ModelOptions(**given)))  # type: ignore[arg-type]


def test_it_is_waited_for_answers_and_ends(log: Path, checkpoint: Path) -> None:
    async def work() -> None:
        async with Vllm(EngineOptions(model=str(checkpoint), slots=3)) as engine:
            assert await engine.ready() and engine.ended is None and engine.slots == 3
            bodies = await asyncio.gather(*(engine.ask(item(f"word {i}")) for i in range(6)))
            said = [body["choices"][0]["message"]["content"] for body in bodies]
            assert said == [answer(f"word {i}") for i in range(6)]

    asyncio.run(work())
    [started] = [json.loads(line) for line in log.read_text().splitlines()]
    assert started["words"][:2] == ["serve", str(checkpoint)]
    assert not psutil.pid_exists(started["pid"])
    assert not any("key" in word for word in started["words"]), "a list of processes would show it"


def test_one_that_does_not_come_up_says_why(log: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_VLLM", "refuses")
    with pytest.raises(RuntimeFailed, match=r"exit code 1.*ValueError: no such model"):
        asyncio.run(Vllm(EngineOptions(model=str(checkpoint))).__aenter__())


def test_where_it_is_not_installed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="vllm is not installed"):
        asyncio.run(Vllm(EngineOptions(model=str(checkpoint))).__aenter__())


def test_a_request_that_it_does_not_survive_is_lost_and_it_says_why(log: Path, checkpoint: Path) -> None:
    async def work() -> None:
        async with Vllm(EngineOptions(model=str(checkpoint))) as engine:
            with pytest.raises(Lost):
                await engine.ask(item("crash now"))
            for _ in range(100):
                if engine.ended is not None:
                    break
                await asyncio.sleep(0.05)
            assert engine.ended is not None and "exit code 3" in engine.ended and "CUDA error" in engine.ended
            assert not await engine.ready()
            with pytest.raises(NotReached) as found:
                await engine.ask(item("word"))
            assert found.value.final

    asyncio.run(work())


def test_it_does_not_outlive_the_process_that_started_it(log: Path, checkpoint: Path) -> None:
    code = (
        "import asyncio, sys\nfrom lowbit.batch.engines import EngineOptions\n"
        "from lowbit.batch.engines._vllm import Vllm\n"
        "async def work():\n    async with Vllm(EngineOptions(model=sys.argv[1])):\n        print('up', flush=True)\n"
        "        await asyncio.sleep(60)\nasyncio.run(work())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(checkpoint)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    pid, deadline = json.loads(log.read_text())["pid"], time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
