"""Endpoints as they are and as they fail: llama.cpp's server for real, and one on this machine that misbehaves."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_server import events, send, serving

from lowbit import run
from lowbit.errors import BadOption, LowbitError, RuntimeFailed, Unsupported
from lowbit.run._http import Http, HttpFailed, key_for
from lowbit.run.llama_server import LlamaServer
from lowbit.run.openai import OpenAi

COMPLETION = {
    "choices": [{"text": "abc", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1},
}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[LlamaServer]:
    with LlamaServer(tiny, context=512, slots=2, threads=1) as server:
        yield server


def test_a_running_llama_server_is_opened_by_its_url(server: LlamaServer) -> None:
    for url in (server.url, server.url.removesuffix("/v1"), server.url + "/"):
        with run.open_artifact(url) as endpoint:
            assert isinstance(endpoint, OpenAi) and endpoint.name == "openai"
            assert (endpoint.server, endpoint.context, endpoint.n_vocab) == ("llama-server", 512 // 2, server.n_vocab)
            assert endpoint.version and endpoint.version.startswith("llama-server")
            ids = endpoint.tokenize("the rain")
            found, expected = endpoint.next_tokens(ids, 4), server.next_tokens(ids, 4)
            assert [token for token, _ in found] == [token for token, _ in expected]
            # A prompt that the cache holds in part is computed in another batch.
            assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < 1e-4
            assert list(endpoint.generate(ids, 5)) == list(server.generate(ids, 5))
            assert "".join(endpoint.chat([{"role": "user", "content": "in"}], 4)) == "".join(
                server.chat([{"role": "user", "content": "in"}], 4)
            )
        with pytest.raises(RuntimeFailed):
            endpoint.models()


def failing(call: Callable[[OpenAi], Any], timeout: float = 5.0, **answers: Any) -> LowbitError:
    """What the call raises, one line, with a server that answers so; a path's / is written __."""
    with serving({path.replace("__", "/"): answer for path, answer in answers.items()}) as url:
        with OpenAi(url, timeout=timeout) as endpoint, pytest.raises(LowbitError) as error:
            call(endpoint)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
        return error.value


def complete(endpoint: OpenAi) -> Any:
    return endpoint.complete("x")


def streamed(endpoint: OpenAi) -> Any:
    return "".join(endpoint.chat([{"role": "user", "content": "x"}]))


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, b'{"error": {"message": "out\\nof memory", "type": "x"}}', "the server failed; found 500 out of memory"),
        (500, b"<html>oops</html>", "500 <html>oops</html>"),
        (503, b'{"error": "loading"}', "503 loading"),
        (400, b'{"detail": [{"loc": ["a"]}]}', "the server refuses; found 400"),
        (404, b"", "404"),
        (401, b'{"message": "no key"}', "OPENAI_API_KEY"),
        (302, b"", "302"),
        (200, b"", "answered nothing"),
        (200, b"  \n", "answered nothing"),
        (200, b'{"choices": [', "no JSON"),
        (200, b"not json", "no JSON; found not json"),
        (200, b"[" * 100_000, "no JSON"),
        (200, b"null", "has no choices"),
        (200, b"[]", "has no choices"),
        (200, b'{"choices": []}', "has no choices"),
        (200, b'{"choices": [3]}', "has no choices"),
        (200, b'{"choices": [{"index": 0}]}', "without text"),
        (200, b'{"choices": [{"text": null}]}', "without text"),
    ],
)
def test_bad_answers_are_one_line(status: int, body: bytes, says: str) -> None:
    error = failing(complete, __v1__completions=lambda handler, _: send(handler, body, status))
    assert says in str(error)
    if status != 200:
        assert isinstance(error, HttpFailed) and error.status == status and error.exit_code == 3


def test_retry_after_is_told() -> None:
    error = failing(complete, __v1__completions=lambda h, _: send(h, b"{}", 429, Retry_After="7"))
    assert isinstance(error, HttpFailed) and (error.status, error.retry_after) == (429, 7)


GOOD = json.dumps({"choices": [{"delta": {"content": "ab"}}]})


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD], "ended in the middle"),
        ([], "ended in the middle"),
        ([GOOD, "{broken"], "no JSON object; found {broken"),
        ([GOOD, "[1]"], "no JSON object"),
        ([GOOD, '{"error": {"message": "slot lost"}}'], "the server broke off; found slot lost"),
    ],
)
def test_broken_streams_are_one_line(lines: list[str], says: str) -> None:
    assert says in str(failing(streamed, __v1__chat__completions=lambda handler, _: events(handler, *lines)))


def test_odd_events_of_a_whole_stream_are_passed_over() -> None:
    odd = [
        "{}",
        '{"choices": null}',
        '{"choices": [7]}',
        '{"choices": [{"delta": null}]}',
        GOOD,
        '{"usage": {}}',
        "[DONE]",
    ]
    with serving({"/v1/chat/completions": lambda h, _: events(h, *odd)}) as url, OpenAi(url) as endpoint:
        assert streamed(endpoint) == "ab"


def test_no_stream_where_one_was_asked_for() -> None:
    assert "sends no stream" in str(failing(streamed, __v1__chat__completions=COMPLETION))


def test_a_connection_that_breaks() -> None:
    def half(handler: Any, _: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.close_connection = True

    assert "broke off" in str(failing(complete, __v1__completions=half))


def test_a_slow_server() -> None:
    begin = time.monotonic()
    slow = failing(complete, 0.3, __v1__completions=lambda h, _: (time.sleep(1.5), send(h, b"{}")))
    assert "took too long" in str(slow)
    stalled = failing(streamed, 0.3, __v1__chat__completions=lambda h, _: events(h, GOOD, pause=1.5))
    assert "took too long" in str(stalled) and time.monotonic() - begin < 10


def test_an_answer_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.run._http._LARGEST", 1 << 16)
    monkeypatch.setattr("lowbit.run._http._LARGEST_EVENT", 1 << 16)
    assert "has no end" in str(failing(complete, __v1__completions=lambda h, _: send(h, b" " * (1 << 18))))
    endless = failing(streamed, __v1__chat__completions=lambda h, _: events(h, "x" * (1 << 18)))
    assert "has no end" in str(endless)


@pytest.mark.parametrize(
    ("models", "kind", "says"),
    [
        ({"data": []}, Unsupported, "no model"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, BadOption, "several models; found a, b"),
        ({"models": []}, HttpFailed, "no list of models"),
        ([], HttpFailed, "no list of models"),
        ({"data": [{"id": 3}, 4]}, Unsupported, "no model"),
    ],
)
def test_bad_lists_of_models(models: Any, kind: type[LowbitError], says: str) -> None:
    with serving({"/v1/models": models}) as url, pytest.raises(kind, match=says):
        OpenAi(url)


def test_nothing_listens() -> None:
    with serving({}) as url:
        pass
    with pytest.raises(RuntimeFailed, match="cannot be reached") as error:
        OpenAi(url)
    assert error.value.exit_code == 3
    for bad in ("http://", "http:///v1", "http://[bad", "http://host:port"):
        with pytest.raises(LowbitError):
            OpenAi(bad)
    with pytest.raises(BadOption, match="timeout"):
        OpenAi(url, timeout=0)


def test_the_key_goes_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def look(handler: Any, _: Any) -> None:
        seen.append(handler.headers.get("Authorization"))
        send(handler, json.dumps(COMPLETION).encode())

    with serving({"/v1/completions": look}) as url:
        for variable, value in ((None, "sk-1"), ("OTHER", "sk-2")):
            monkeypatch.setenv(variable or "OPENAI_API_KEY", value)
            with OpenAi(url, api_key_env=variable) as endpoint:
                endpoint.complete("x")
        monkeypatch.delenv("OPENAI_API_KEY")
        with OpenAi(url) as endpoint:
            endpoint.complete("x")
        monkeypatch.delenv("OTHER")
        with pytest.raises(BadOption, match="OTHER"):
            OpenAi(url, api_key_env="OTHER")
    assert seen == ["Bearer sk-1", "Bearer sk-2", None]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-3")
    assert key_for("https://api.example/v1") == key_for("http://[::1]:1/v1") == key_for("http://localhost/v1") == "sk-3"
    assert key_for("http://192.168.1.5:8000/v1") is None and key_for("http://127.0.0.1.example/v1") is None
    assert key_for("http://192.168.1.5:8000/v1", "OPENAI_API_KEY") == "sk-3"


def test_what_is_sent_and_what_comes_back() -> None:
    asked: list[Any] = []

    def answer(handler: Any, body: Any) -> None:
        asked.append(body)
        logprobs = {
            "tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -0.5, "c": -1.0}],
        }  # fmt: skip
        choice = {"text": "ab", "finish_reason": "length", "logprobs": logprobs}
        send(handler, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode())

    with serving({"/v1/completions": answer}) as url, OpenAi(url) as endpoint:
        assert endpoint.server is endpoint.version is None and endpoint.context == 0
        found = endpoint.complete("a", 1, logprobs=2, echo=True, stop=["\n"], temperature=0.5, seed=3, grammar="g")
        for call in (
            lambda: endpoint.tokenize("a"), lambda: endpoint.detokenize([1]), lambda: list(endpoint.generate([1])),
            lambda: endpoint.next_tokens([1], 2), lambda: endpoint.n_vocab, lambda: endpoint.logits([1]),
        ):  # fmt: skip
            with pytest.raises(Unsupported):
                call()
    assert asked == [
        {
            "model": "a-model", "prompt": "a", "max_tokens": 1, "temperature": 0.5, "top_p": 1.0, "stop": ["\n"],
            "seed": 3, "logprobs": 2, "echo": True, "grammar": "g",
        }
    ]  # fmt: skip
    first, second = found.tokens
    assert math.isnan(first.logprob) and (second.text, second.logprob) == ("b", -0.5)
    assert [(t.text, t.logprob) for t in second.top] == [("b", -0.5), ("c", -1.0)]
    assert (found.text, found.finish_reason, found.prompt_tokens, found.completion_tokens) == ("ab", "length", 1, 1)
    assert found.seconds > 0


def test_the_form_of_vllm() -> None:
    """Ids instead of text, prompts of ids, tokenization: as its server's documentation has them."""

    def complete(handler: Any, body: Any) -> None:
        assert body["prompt"] == [5, 6] and body["return_tokens_as_token_ids"] is True
        top = {"token_id:7": -0.25, "token_id:9": -2.0}
        logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-0.25], "top_logprobs": [top]}
        send(handler, json.dumps({"choices": [{"text": "x", "logprobs": logprobs}]}).encode())

    models = {"data": [{"id": "m", "max_model_len": 4096}]}
    answers = {
        "/version": {"version": "0.11.2"}, "/v1/models": models, "/v1/completions": complete,
        "/tokenize": {"tokens": [5, 6], "count": 2}, "/detokenize": {"prompt": "ab"},
    }  # fmt: skip
    with serving(answers) as url, OpenAi(url) as endpoint:
        assert (endpoint.version, endpoint.context) == ("vllm 0.11.2", 4096)
        assert endpoint.next_tokens([5, 6], 2) == [(7, -0.25), (9, -2.0)]
        assert endpoint.tokenize("ab") == [5, 6] and endpoint.detokenize([5, 6]) == "ab"


@pytest.mark.parametrize("answer", [{"tokens": ["a"]}, {"tokens": 3}, [], None, {"content": 5}])
def test_bad_tokenizations(answer: Any) -> None:
    props = {"total_slots": 1}
    for call in (lambda e: e.tokenize("a"), lambda e: e.detokenize([1]), lambda e: e.next_tokens([1], 2)):
        failing(call, __props=props, __tokenize=answer, __detokenize=answer, __completion=answer)


def test_random_json_is_no_fault_of_ours() -> None:
    """Whatever JSON a server sends: an answer, or one line."""
    rng = random.Random(0)
    words = ["choices", "text", "logprobs", "content", "tokens", "token_logprobs", "top_logprobs", "token", "logprob",
             "usage", "finish_reason", "id", "completion_probabilities", "prompt_tokens"]  # fmt: skip

    def value(depth: int) -> Any:
        kind = rng.randrange(9 if depth else 5)
        if kind >= 7:
            return {rng.choice(words): value(depth - 1) for _ in range(rng.randrange(1, 5))}
        if kind >= 5:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return [None, True, -1.5, 10**400, "text"][kind]

    def answer(handler: Any, _: Any) -> None:
        found = value(5)
        if rng.random() < 0.8:
            found = {"choices": [{"text": "x", "logprobs": value(4)}], "usage": value(1), "tokens": value(2)}
            found["completion_probabilities"] = [{"top_logprobs": value(3)}]
        send(handler, json.dumps(found).encode())

    props = {"total_slots": 1, "default_generation_settings": {"n_ctx": 64}}
    answers = {"/props": props, **dict.fromkeys(("/v1/completions", "/completion", "/tokenize"), answer)}
    with serving(answers) as url, OpenAi(url) as endpoint:
        whole = 0
        for _ in range(150):
            for call in (
                lambda: endpoint.complete("x"),
                lambda: endpoint.next_tokens([1], 2),
                lambda: endpoint.tokenize(""),
            ):
                try:
                    call()
                    whole += 1
                except LowbitError as error:
                    assert "\n" not in str(error)
        assert 50 < whole < 450


def test_http_is_bounded_in_where_it_goes() -> None:
    with serving({"/a": lambda h, _: send(h, b"{}", 307, Location="http://127.0.0.1:9/")}) as url:
        http = Http(url)
        with pytest.raises(HttpFailed, match="307"):
            http.get("/a")
        http.close()
        assert http.closed
