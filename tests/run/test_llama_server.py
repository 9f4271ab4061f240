"""llama.cpp's server as a child: it answers what llama.cpp in this process computes, and it never outlives us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lowbit import run
from lowbit.errors import BadFile, BadOption, NotFound, RuntimeFailed, Unsupported
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.run.llama_server import LlamaServer

PROMPT = "Then the rain went in and the thing"
TALK = [{"role": "user", "content": "the rain"}]


@pytest.fixture(scope="module")
def server(tiny: Path) -> LlamaServer:
    with LlamaServer(tiny, context=512, slots=2, threads=1) as server:
        yield server


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether a process ends; a zombie has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_it_says_what_it_is(server: LlamaServer, tiny: Path) -> None:
    with LlamaCpp(tiny, context=128, threads=1) as model:
        assert (server.n_vocab, server.n_weights) == (model.n_vocab, model.n_weights)
        assert server.model_bytes == pytest.approx(model.model_bytes, rel=0.01)
    assert (server.name, server.server, server.context, server.path) == ("llama-server", "llama-server", 256, tiny)
    assert server.version and server.version.startswith("xllamacpp ")
    assert [slot["n_ctx"] for slot in server.slots()] == [256, 256]
    assert server.props()["total_slots"] == 2 and server.models() == [tiny.name]
    assert server.url.startswith("http://127.0.0.1:") and server.url.endswith("/v1")
    assert any("listening" in line for line in server.log_tail(100))


def test_its_tokens_and_prompts_are_llama_cpps(server: LlamaServer, tiny: Path) -> None:
    with LlamaCpp(tiny, context=128, threads=1) as model:
        for text in (PROMPT, "<|im_end|> 你好 🙂", ""):
            assert server.tokenize(text) == model.tokenize(text)
            assert server.detokenize(model.tokenize(text)) == text
        assert server.tokenize("<|im_end|>", parse_special=True) == [2]
        assert server.rendered(TALK) == model.rendered(TALK) and server.prompt_of(TALK) == model.prompt_of(TALK)


def test_it_generates_what_llama_cpp_does(server: LlamaServer, tiny: Path) -> None:
    with LlamaCpp(tiny, context=128, threads=1) as model:
        ids = model.tokenize(PROMPT)
        made = list(model.generate(ids, 12, ignore_end=True))
        assert list(server.generate(ids, 12, ignore_end=True)) == made
        assert list(server.generate(ids, 12, ignore_end=True, stop={made[3]})) == made[: made.index(made[3])]
        assert len(list(server.generate(ids, ignore_end=True))) == 256 - len(ids)  # llama-server stops one earlier
        text = "".join(model.chat(TALK, 8))
        assert "".join(server.chat(TALK, 8)) == text
        assert server.ask(TALK, 8, temperature=0)["choices"][0]["message"]["content"] == text
    whole = server.complete(PROMPT, 6, logprobs=3)
    assert whole.text == "".join(server.stream(PROMPT, 6))
    assert (whole.prompt_tokens, whole.completion_tokens, whole.finish_reason) == (len(ids), 6, "length")
    assert [len(token.top) for token in whole.tokens] == [3] * 6
    assert all(token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob for token in whole.tokens)


def test_its_log_probabilities_are_of_the_whole_vocabulary(server: LlamaServer, tiny: Path) -> None:
    """Its float32 sum leaves them all wrong by the same little."""
    with LlamaCpp(tiny, context=128, threads=1) as model:
        ids = model.tokenize(PROMPT)
        [(_, rows)] = model.logits(ids, len(ids) - 1)
    row = rows[0].astype(np.float64) - rows[0].max()
    row -= np.log(np.exp(row).sum())
    for k in (5, len(row)):
        found = server.next_tokens(ids, k)
        assert len(found) == k and found[0][0] == row.argmax()
        assert max(abs(row[token] - logprob) for token, logprob in found) < 2e-3


def test_slots_are_saved_and_restored(tiny: Path, tmp_path: Path) -> None:
    with LlamaServer(tiny, context=128, threads=1, slot_folder=tmp_path) as server:
        first = server.complete_native(PROMPT * 2, 4, id_slot=0)
        assert server.save_slot(0, "warm.bin")["n_saved"] > 0 and (tmp_path / "warm.bin").stat().st_size > 0
        server.erase_slot(0)
        assert server.restore_slot(0, "warm.bin")["n_restored"] > 0
        again = server.complete_native(PROMPT * 2, 4, id_slot=0)
        assert again["tokens"] == first["tokens"] and again["timings"]["prompt_n"] < first["timings"]["prompt_n"]


def test_options_reach_the_server(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    options = {
        "context": 512,
        "slots": 2,
        "kv_unified": True,
        "kv_type": "q8_0:q4_0",
        "template": template,
        "swa_full": True,
    }
    with run.open_artifact(
        tiny, "llama-server", threads=1, drafter=tiny, draft_tokens=3, alias="me", verbosity=4, **options
    ) as server:
        assert isinstance(server, LlamaServer)
        assert [slot["n_ctx"] for slot in server.slots()] == [512, 512] and server.model == "me"
        assert server.rendered(TALK) == "[the rain]"
        timings = server.complete_native(PROMPT, 12, ignore_eos=True)["timings"]
        assert timings["draft_n"] > 0 and timings["draft_n_accepted"] > 0
        log = "\n".join(server.log_tail(1000))
        assert "q8_0" in log and "q4_0" in log


def test_several_threads_at_once(server: LlamaServer) -> None:
    alone = server.complete(PROMPT, 8).text
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(server.complete(PROMPT, 8).text)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 6


def test_it_ends_with_close(tiny: Path) -> None:
    server = LlamaServer(tiny, context=256, threads=1)
    pid, log = server.pid, server.log_path
    assert log.exists() and server.alive()
    server.close()
    server.close()
    assert gone(pid) and not log.exists() and not server.alive()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "forgotten"])
def test_it_ends_with_its_parent(tiny: Path, end: signal.Signals | None) -> None:
    code = f"""
import time
from lowbit.run.llama_server import LlamaServer
server = LlamaServer({str(tiny)!r}, context=256, threads=1)
print(server.pid, flush=True)
{"time.sleep(60)" if end else ""}
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if end:
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(end)
    parent.wait(30)
    assert gone(pid)


def test_a_server_that_was_killed_is_one_line(tiny: Path) -> None:
    with LlamaServer(tiny, context=256, threads=1) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)
        with pytest.raises(RuntimeFailed) as error:
            server.complete(PROMPT, 4)
        assert "\n" not in str(error.value)
        # A killed process can be waited for a moment after it is gone from the list.
        deadline = time.monotonic() + 5
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.alive()


def test_what_cannot_be_served_is_said_before(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-100])
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(NotFound):
        LlamaServer(tmp_path / "absent.gguf")
    with pytest.raises(BadFile, match="not a GGUF"):
        LlamaServer(tmp_path / "text.gguf")
    with pytest.raises((RuntimeFailed, BadFile)) as error:
        LlamaServer(tmp_path / "cut.gguf", threads=1)
    assert "\n" not in str(error.value) and "cut.gguf" in str(error.value)
    with pytest.raises(NotFound, match="binary"):
        LlamaServer(tiny, llama_server="no-such-llama-server")


@pytest.mark.parametrize(
    "options",
    [
        {"context": -1}, {"slots": 0}, {"ubatch": 0}, {"threads": 0}, {"kv_type": "q3_k"}, {"port": 70000},
        {"kv_type": "q8_0", "flash_attention": False}, {"reasoning": "loud"}, {"extra": ("--x",)},
        {"drafter": "absent.gguf"}, {"mmproj": "absent.gguf"}, {"template": "absent.jinja"}, {"slot_folder": "absent"},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(tiny: Path, options: dict[str, object]) -> None:
    with pytest.raises((BadOption, NotFound)):
        LlamaServer(tiny, **options)


def test_what_an_endpoint_cannot_give(server: LlamaServer) -> None:
    with pytest.raises(Unsupported, match="whole vocabulary"):
        next(server.logits([1, 2]))


BINARY = """#!{python}
import os, sys, time
args = sys.argv[1:]
value = lambda flag: args[args.index(flag) + 1]
if "--fail" in args:
    print("E failing as it was asked to", file=sys.stderr)
    sys.exit(3)
import xllamacpp
NUMBERS = ("--port", "-c", "-np")
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = value("-m"), *map(int, map(value, NUMBERS))
params.hostnames, params.model_alias = [value("--host")], {{value("-a")}}
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(value("-t"))
params.endpoint_props, params.fit_params = "--props" in args, False
server = xllamacpp.Server(params)
open({pid!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""


def test_a_binary_is_run_and_watched_over(tiny: Path, tmp_path: Path) -> None:
    """A program of llama-server's arguments; it too ends with close(), and says why it does not start."""
    binary, pid = tmp_path / "llama-server", tmp_path / "pid"
    binary.write_text(BINARY.format(python=sys.executable, pid=str(pid)))
    binary.chmod(0o755)
    with LlamaServer(tiny, context=256, threads=1, llama_server=binary, start_timeout=60) as server:
        assert server.complete(PROMPT, 3).completion_tokens == 3 and server.context == 256
        served_by = int(pid.read_text())
        assert served_by != server.pid
    assert gone(served_by)
    with pytest.raises(RuntimeFailed, match="failing as it was asked to"):
        LlamaServer(tiny, threads=1, llama_server=binary, extra=("--fail",), start_timeout=60)


def test_the_child_ends_without_a_job() -> None:
    code = "from lowbit.run._server_child import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input=b"", capture_output=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stdout == b""
    lost = json.dumps({"command": ["/no/such/llama-server"]}).encode() + b"\n"
    done = subprocess.run([sys.executable, "-c", code], input=lost, capture_output=True, timeout=30, check=False)
    assert "No such file" in json.loads(done.stdout)["error"]
