"""vLLM's server on a machine with a GPU: a Hugging Face checkpoint or a compressed-tensors folder, asked over HTTP.

Written against vLLM's documentation (https://docs.vllm.ai/en/stable/cli/serve/): ``vllm serve FOLDER --host --port
--served-model-name --max-num-seqs --max-model-len --chat-template``, VLLM_API_KEY, GET /health. It was never run with
vLLM itself, for want of a GPU; the tests run it with a small server in vLLM's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar, Self

from lowbit.batch.engines.base import Caller, CarefulUpstream, Engine, EngineOptions, NotReached
from lowbit.batch.items import Item
from lowbit.errors import BadOption, NotFound, RuntimeFailed
from lowbit.harness import Harness, UpstreamFailed
from lowbit.run.llama_server import free_port

_SLOTS = 128  # requests at a time: vLLM makes batches of what there is
_PATIENCE = 1800.0  # seconds to load, and to compile for the GPU
_EVERY = 0.25  # seconds between two looks
_CHILD = "from lowbit.run._server_child import main; main()"  # ends with this process, however that ends
_LAST = 4096  # bytes of the log that are looked at for its last words
# Of --model's server: what vLLM has no counterpart for.
_FOREIGN = ("drafter", "mmproj", "llama_server", "swa_full", "kv_unified")


class Vllm(Engine):
    """Not found by name: the engine ``ray`` starts it where a node has GPUs. options.model: a folder."""

    name: ClassVar[str] = "vllm"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        check(options)
        self._child: subprocess.Popen[bytes] | None = None
        self._caller: Caller | None = None
        self._log: Path | None = None
        self.url = ""

    @classmethod
    def suits(cls, options: EngineOptions) -> bool:
        return False

    @property
    def slots(self) -> int:
        return self.options.slots or self.options.server.slots or _SLOTS

    async def deciding(self) -> dict[str, Any]:
        return {"model": self.options.model, "kv": self.options.server.kv_type}

    async def __aenter__(self) -> Self:
        """Raises NotFound (no vllm here), RuntimeFailed with vLLM's last words."""
        key, port = secrets.token_urlsafe(24), free_port()
        self._start(command(self.options, self.slots, port), key)
        upstream = CarefulUpstream(f"http://127.0.0.1:{port}/v1", key=key, model=_served(self.options))
        self.url = upstream.url
        self._caller = Caller(upstream, Harness(upstream, self.options.harness), here=True)
        try:
            await self._wait()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._caller is not None:
            await self._caller.upstream.close()
        if self._child is not None:
            await asyncio.to_thread(_end, self._child)
        if self._log is not None:
            self._log.unlink(missing_ok=True)
        self._caller = self._child = self._log = None

    async def ask(self, item: Item) -> dict[str, Any]:
        assert self._caller is not None
        if self.ended is not None:
            raise NotReached(self.ended, final=True)
        return await self._caller.ask(item)

    async def ready(self) -> bool:
        assert self._caller is not None
        return self.ended is None and await self._healthy()

    @property
    def ended(self) -> str | None:
        """It is not started again here: whoever has this engine makes another."""
        if self._child is None or self._child.poll() is None:
            return None
        return f"vllm ended (exit code {self._child.returncode}): {self._last_words()}"

    def _start(self, words: list[str], key: str) -> None:
        program = shutil.which(words[0])
        if program is None:
            raise NotFound("vllm is not installed on this node", where=socket.gethostname(), hint="pip install vllm")
        with tempfile.NamedTemporaryFile(prefix="lowbit-vllm-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            # A key in the environment is in no list of processes.
            environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, "VLLM_API_KEY": key}
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"command": [program, *words[1:]]}).encode() + b"\n")
        self._child.stdin.flush()

    async def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not await self._healthy():
            if self.ended is not None:
                raise RuntimeFailed(self.ended, where=self.options.model)
            if time.monotonic() > deadline:
                raise RuntimeFailed("vllm does not answer in time", where=self.options.model,
                                    found=self._last_words(), expected=f"within {_PATIENCE:.0f} s")  # fmt: skip
            await asyncio.sleep(_EVERY)

    async def _healthy(self) -> bool:
        """vLLM's /health answers with 200 and no body."""
        assert self._caller is not None
        upstream = self._caller.upstream
        try:
            await upstream.get("/health", 10.0, root=upstream.root)
        except UpstreamFailed as error:
            return error.code == "upstream_malformed"  # no JSON, and no error either
        return True

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        with contextlib.suppress(OSError), open(self._log, "rb") as handle:
            handle.seek(max(0, self._log.stat().st_size - _LAST))
            lines = [line.strip() for line in handle.read().decode("utf-8", "replace").splitlines() if line.strip()]
            return next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")[-300:]
        return ""


def check(options: EngineOptions) -> None:
    """Raises BadOption where the options ask for what vLLM does not have."""
    if options.model is None:
        raise BadOption("which model?", expected="--model FOLDER")
    if given := [name for name in _FOREIGN if getattr(options.server, name)]:
        raise BadOption(f"--{given[0].replace('_', '-')} is llama.cpp's", where=options.model,
                        expected="a GGUF for it, or a checkpoint, which vLLM serves, without it")  # fmt: skip
    if options.server.kv_type not in ("f16", "fp8"):
        raise BadOption("vLLM has no such KV cache", found=options.server.kv_type, expected="f16 (as the model), fp8")


def command(options: EngineOptions, slots: int, port: int) -> list[str]:
    """``vllm serve`` for the options. slots: requests at a time. It takes the GPU that it sees."""
    server = options.server
    words = ["vllm", "serve", str(options.model), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", _served(options), "--max-num-seqs", str(slots)]
    if server.context is not None:  # --ctx is of all slots together, as llama-server has it
        words += ["--max-model-len", str(max(1, server.context // slots))]
    if server.kv_type != "f16":
        words += ["--kv-cache-dtype", server.kv_type]
    if server.template is not None:
        words += ["--chat-template", str(server.template)]
    return words


def _served(options: EngineOptions) -> str:
    return Path(str(options.model)).name


def _end(child: subprocess.Popen[bytes]) -> None:
    """Its watcher ends vLLM when standard input does; what vLLM started itself is of the same group."""
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(15)
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
