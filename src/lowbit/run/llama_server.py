"""llama.cpp's server as a child process on a free port of this machine, asked over HTTP.

``with LlamaServer("model.gguf", slots=4, context=16384) as server: server.url``. It is the server of the package
xllamacpp, or a llama-server binary. It ends with close(), and with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import NotFound, RuntimeFailed
from lowbit.run import _looks, _trial
from lowbit.run._http import HttpFailed
from lowbit.run._server_options import ServerOptions
from lowbit.run.base import Suits
from lowbit.run.llama_cpp import check_file
from lowbit.run.openai import OpenAi
from lowbit.threads import available_cores

_CHILD = "from lowbit.run._server_child import main; main()"
_LOG_TAIL = 64 * 1024


class LlamaServer(OpenAi):
    """A started server. A context manager; close() ends the process.

    path:    the GGUF file
    options: of ServerOptions

    url is the endpoint up to /v1, and everything of ``OpenAi`` works on it. pid is the server's process (with a binary
    the one that watches over it); log_path its log, which close() removes.

    Raises NotFound, BadFile, BadOption, and RuntimeFailed with the server's last words where it does not come up.
    """

    name: ClassVar[str] = "llama-server"
    uses_threads: ClassVar[bool] = True
    options_class: ClassVar[type] = ServerOptions

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        return Suits.BY_NAME if _looks.is_file_of(target, ".gguf", b"GGUF") else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        try:
            return f"xllamacpp {metadata.version('xllamacpp')}"
        except metadata.PackageNotFoundError:
            return None

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self.options = ServerOptions(**options)
        self.file = Path(path)
        for given in (self.file, self.options.drafter):
            if given is not None:
                check_file(Path(given))
                _trial.check(Path(given))
        if self.options.mmproj is not None:
            check_file(Path(self.options.mmproj))
            _trial.check(Path(self.options.mmproj), mmproj=True)
        self.binary = _binary(self.options.llama_server)
        self.threads = self.options.threads or available_cores()
        self._log = tempfile.NamedTemporaryFile(prefix="lowbit-server-", suffix=".log", delete=False)  # noqa: SIM115
        self.log_path = Path(self._log.name)
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: Any = weakref.finalize(self, _nothing)
        try:
            root = self._start()
            super().__init__(
                f"{root}/v1", model=self.options.alias or self.file.name, timeout=3600.0, api_key=self.options.api_key
            )
        except BaseException:
            self._stop()
            self._log.close()
            self.log_path.unlink(missing_ok=True)
            raise
        self.path = self.file

    @property
    def version(self) -> str | None:
        return self._version if self.binary and self._version else self.installed()

    @property
    def pid(self) -> int:
        return self._running().pid

    def close(self) -> None:
        super().close()
        self._stop()
        self._log.close()
        self.log_path.unlink(missing_ok=True)

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._child is not None and self._child.poll() is None

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of the server's log."""
        with contextlib.suppress(OSError), open(self.log_path, "rb") as handle:
            handle.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL))
            return handle.read().decode("utf-8", "replace").splitlines()[-lines:]
        return []

    # What only llama-server has

    def props(self) -> dict[str, Any]:
        """GET /props: default_generation_settings, total_slots, chat_template, modalities, ... Raises HttpFailed."""
        found: dict[str, Any] = self._http.get("/props")
        return found

    def slots(self) -> list[dict[str, Any]]:
        """GET /slots: one object a slot, with id, n_ctx and is_processing. Raises HttpFailed."""
        found: list[dict[str, Any]] = self._http.get("/slots")
        return found

    def save_slot(self, slot: int, filename: str) -> dict[str, Any]:
        """Saves a slot's cache to a file of ``slot_folder``; {"n_saved", ...}. Raises HttpFailed."""
        return self._slot(slot, "save", filename=filename)

    def restore_slot(self, slot: int, filename: str) -> dict[str, Any]:
        """Loads what ``save_slot`` saved into a slot; {"n_restored", ...}. Raises HttpFailed."""
        return self._slot(slot, "restore", filename=filename)

    def erase_slot(self, slot: int) -> dict[str, Any]:
        """Empties a slot's cache. Raises HttpFailed."""
        return self._slot(slot, "erase")

    def _slot(self, slot: int, action: str, **body: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._http.post(f"/slots/{slot}?action={action}", body)
        return found

    def complete_native(self, prompt: str | Sequence[int], max_tokens: int = 16, **body: Any) -> dict[str, Any]:
        """POST /completion, llama-server's own: "content", "tokens", "timings" (with draft_n and draft_n_accepted where
        a drafter is at work), "tokens_cached", ... Greedy unless ``body`` says otherwise. Raises HttpFailed."""
        given = prompt if isinstance(prompt, str) else [int(t) for t in prompt]
        greedy = {"temperature": 0.0, "return_tokens": True}
        found: dict[str, Any] = self._http.post(
            "/completion", {"prompt": given, "n_predict": max_tokens, **greedy, **body}
        )
        return found

    @property
    def chat_template(self) -> str | None:
        found = self._props.get("chat_template")
        return found if isinstance(found, str) and found else None

    def rendered(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt as llama.cpp's own template engine renders it (POST /apply-template). Raises HttpFailed."""
        found = self._http.post("/apply-template", {"messages": [dict(m) for m in messages], **variables})
        if not isinstance(found, dict) or not isinstance(text := found.get("prompt"), str):
            raise HttpFailed("no prompt", where=self._http.root + "/apply-template", found=str(found)[:120])
        return text

    def prompt_of(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        return self.tokenize(self.rendered(messages, **variables), add_special=True, parse_special=True)

    # The process

    def _start(self) -> str:
        """Starts it and waits until it answers; its address."""
        port = self.options.port or (free_port() if self.binary else 0)
        job = self.options.job(self.file, self.threads)
        if self.binary:
            job = {"command": [self.binary, *self.options.arguments(self.file, self.threads, port)]}
        environment = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", **os.environ, "GGML_NO_BACKTRACE": "1"}
        if self.options.api_key:
            environment["LLAMA_API_KEY"] = self.options.api_key
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which then ends it
        )
        self._child = child
        self._stop = weakref.finalize(self, _end, child)
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
        said = self._first_words(child)
        if "error" in said:
            self._failed("the server does not start", said["error"])
        root = said.get("url") or f"http://127.0.0.1:{port}"
        self._wait_for_health(root)
        return str(root)

    def _first_words(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        import selectors

        assert child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(self.options.start_timeout):
                self._failed("the server does not start in time", f"{self.options.start_timeout:g} s")
        line = child.stdout.readline()
        if not line:
            status = child.wait()
            self._failed("the server's process ended", f"signal {-status}" if status < 0 else f"exit code {status}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _wait_for_health(self, root: str) -> None:
        from lowbit.run._http import Http

        deadline = time.monotonic() + self.options.start_timeout
        http = Http(root, timeout=10)
        try:
            while True:
                with contextlib.suppress(HttpFailed):
                    if http.get("/health").get("status") == "ok":
                        return
                if not self.alive():
                    status = self._running().wait()
                    self._failed("the server's process ended", f"exit code {status}")
                if time.monotonic() > deadline:
                    self._failed("the server does not answer in time", f"{self.options.start_timeout:g} s")
                time.sleep(0.05)
        finally:
            http.close()

    def _failed(self, what: str, found: object) -> None:
        GgufFile(self.file)  # of a damaged file it tells what and where; the server only that it failed
        last = [line for line in self.log_tail(40) if line.strip()]
        telling = [line for line in last if " E " in line or "error" in line.lower()] or last[-1:]
        said = "; ".join([str(found), *(line.strip()[-300:] for line in telling[-2:])])
        raise RuntimeFailed(what, where=self.file, found=said)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            self._closed()
        return self._child


def _end(child: subprocess.Popen[bytes]) -> None:
    """Closes its standard input, which it ends upon, and sees that it does."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _nothing() -> None:
    """Before there is a process."""


def _binary(given: str | os.PathLike[str] | None) -> str | None:
    """A path, or a name on PATH."""
    if given is None:
        return None
    found = shutil.which(os.fspath(given))
    if found is None:
        raise NotFound("no such llama-server binary", where=given, hint="Give its path, or leave it out")
    return found


def free_port() -> int:
    """Of this machine, for a server that cannot find one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


RUNTIME = LlamaServer
