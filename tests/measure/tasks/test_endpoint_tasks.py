"""Tasks on endpoints: llama.cpp's own server, and one that echoes log-probabilities as vLLM does."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.tasks import TaskOptions, open_tasks
from lowbit.run.llama_server import LlamaServer

OPTIONS = MeasureOptions(threads=1, speed=False, memory=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Echo(BaseHTTPRequestHandler):
    """Tokens are words; a word's log-probability is minus its length, and of the one generated -1."""

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self._send(200 if known else 404, {"data": [{"id": "echo"}]} if known else {"error": "no"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self._send(404, {"error": "no"})
        parts = body["prompt"].split(" ")
        tokens = [parts[0], *(f" {part}" for part in parts[1:]), "!"]
        logprobs = [None, *(-float(len(t)) for t in tokens[1:-1]), -1.0]
        shown = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [{} for _ in tokens]}
        text = "".join(tokens) if body.get("echo") else "!"
        self._send(200, {"choices": [{"text": text, "finish_reason": "length", "logprobs": shown}]})
        return None

    def _send(self, status: int, body: Any) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_choices_by_log_probability_where_the_server_echoes(echo: str, tmp_path: Path) -> None:
    path = tmp_path / "mc.jsonl"
    line = {"question": "Which is short?", "choices": ["tremendously", "a", "an ox"], "answer": 1}
    path.write_text(json.dumps(line) + "\n")
    result = measure(echo, tasks=TaskOptions(tasks=[str(path)]), options=OPTIONS)["tasks"][0]["results"][0]
    assert result["way"] == "log-likelihood of each choice"
    outcome = result["outcomes"][0]
    assert outcome["logprobs"] == [-13.0, -2.0, -6.0]  # with the space before it
    assert outcome["scores"] == {"acc": 1.0, "acc_norm": 0.0, "margin": 4.0}  # by length 13/12, 2/1, 6/5


def test_llama_cpps_server(smollm2: Path, tmp_path: Path) -> None:
    em = tmp_path / "em.jsonl"
    em.write_text(json.dumps({"prompt": "The capital of Italy is", "answers": ["Rome"]}) + "\n")
    names = ["facts", str(em), "json-schema"]
    tasks = TaskOptions(tasks=names, limit=2, max_tokens=24)
    with LlamaServer(smollm2, context=1024, threads=1) as server:
        over = measure(server.url, tasks=tasks, options=OPTIONS)["tasks"]
    here = measure(smollm2, tasks=tasks, options=OPTIONS)["tasks"]
    ways = [task["results"][0]["way"] for task in over]
    assert ways[0] == "asked for the letter" and "kept within" in ways[2]
    first = over[0]["results"][0]["outcomes"][0]["scores"]
    assert first["acc"] in (0.0, 1.0) and first["margin"] is None
    completions = [task[1]["results"][0]["outcomes"][0] for task in (over, here)]
    assert completions[0] == completions[1] and completions[0]["scores"]["contains"] == 1.0
    kept = [task[2]["results"][0]["outcomes"][0] for task in (over, here)]
    assert kept[0]["scores"]["schema_kept"] == kept[1]["scores"]["schema_kept"] == 1.0
    assert math.isfinite(kept[0]["scores"]["values_kept"])


def test_lm_evals_completions_against_the_server(smollm2: Path, tmp_path: Path) -> None:
    """lm-eval's own local-completions generates there; for choices it wants an echo that this server does not give."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    wanted = {"until": ["\n"], "max_gen_toks": 8}
    with LlamaServer(smollm2, context=512, threads=1) as server:
        theirs = LocalCompletionsAPI(base_url=f"{server.url}/completions", model=server.model, tokenizer_backend=None)
        request = Instance("generate_until", {}, ("The capital of Italy is", wanted), 0)
        said = theirs.generate_until([request], disable_tqdm=True)
    assert "Rome" in said[0]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["question", "choices", "answer", "prompt", "answers", "true", "false", "right", "wrong", "schema",
             "expected", "function", "ground_truth", "settings", "id", "group", "name", "parameters", "properties",
             "type", "role", "content", "shots", "required"]
        ),
        inner, max_size=5,
    ),
    max_leaves=14,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(_JSON.map(json.dumps).map(str.encode) | st.binary(max_size=24), min_size=1, max_size=3))
def test_any_file_is_read_or_refused_in_one_line(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        assert open_tasks(TaskOptions(tasks=[str(path)]))[0].items
    except LowbitError as error:
        assert "\n" not in str(error)
