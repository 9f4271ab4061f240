"""lowbit serve with a real model in a process of its own, through the clients that people use."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from pydantic import BaseModel
from served_model import Served

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]


class Person(BaseModel):
    name: str
    age: int


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    options: dict[str, Any] = {"model": name, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content and whole.usage is not None and whole.usage.completion_tokens <= 12
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.model_extra is not None and whole.model_extra["lowbit"]["tries"] == 1
    assert client.models.retrieve(name).id == name


def test_a_value_is_parsed(client: openai.OpenAI) -> None:
    said = [{"role": "user", "content": "Ann is three years old."}]
    found = client.chat.completions.parse(model="m", messages=said, response_format=Person, max_tokens=60, seed=1)  # type: ignore[arg-type]
    assert isinstance(found.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_come_comes(client: openai.OpenAI, choice: Any) -> None:
    found = client.chat.completions.create(
        model="m", messages=QUESTION, tools=[WEATHER], tool_choice=choice, max_tokens=60, temperature=0  # type: ignore[arg-type,list-item]
    )  # fmt: skip
    assert found.choices[0].finish_reason == "tool_calls"
    made = found.choices[0].message.tool_calls
    assert made and made[0].function.name == "get_weather"  # type: ignore[union-attr]
    assert "city" in json.loads(made[0].function.arguments)  # type: ignore[union-attr]


def test_a_result_is_read(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    talk = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny<|im_end|>"},
    ]
    found = client.chat.completions.create(model="m", messages=talk, tools=[WEATHER], max_tokens=20)  # type: ignore[arg-type,list-item]
    assert found.choices[0].message.content
    assert found.model_extra["lowbit"]["events"][0]["what"] == "special_tokens_escaped"  # type: ignore[index]


def test_text_and_responses(client: openai.OpenAI) -> None:
    text = client.completions.create(model="m", prompt="Once upon a time", max_tokens=8)
    assert text.choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(
        model="m", prompt="Once upon a time", max_tokens=8, stream=True) if c.choices)  # fmt: skip
    assert client.responses.create(model="m", input="Hello", max_output_tokens=8).output_text


def test_errors_are_of_their_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="m", messages=[])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.UnprocessableEntityError, match="cut off at the token limit"):
        client.chat.completions.create(
            model="m", messages=QUESTION, max_tokens=2, extra_body={"lowbit": {"tries": 1}},  # type: ignore[arg-type]
            response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}},
        )  # fmt: skip


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, headers=headers, data=b"{}" if method == "POST" else None)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_the_web_page_is_passed_on(served: Served) -> None:
    root = served.url.removesuffix("/v1")
    status, headers, page = get(root + "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"<html" in page
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    scripts = re.findall(rb'href="\./(_app/[^"]+\.js)"', page)
    assert scripts
    status, headers, packed = get(f"{root}/{scripts[0].decode()}", **{"Accept-Encoding": "gzip"})
    assert status == 200 and headers["Content-Encoding"] == "gzip"
    assert get(f"{root}/{scripts[0].decode()}")[2] == gzip.decompress(packed)
    assert get(f"{root}/{scripts[0].decode()}", **{"If-None-Match": headers["ETag"]})[0] == 304
    props = json.loads(get(root + "/props")[2])
    assert props["total_slots"] == 2 and props["model_path"] == "" and "site-packages" not in str(props)


@pytest.mark.parametrize(
    "method, path, status",
    [
        *(("GET", path, 404) for path in (
            "/slots", "/tools", "/models", "/lora-adapters", "/completion", "/sw.js", "/absent.js", "/cors-proxy?url=x",
            "/_app/../slots", "/_app/%2e%2e/slots", "/_app/..%2fslots", "//slots", "/v1/../slots", "/api/tags",
            "/_app/a/b/c/d/e/f.js", "/.json", "/v1/chat/completions/control", "/v1/streams/lookup",
        )),
        *(("POST", path, 404) for path in (
            "/slots/0?action=save", "/slots/0?action=erase", "/lora-adapters", "/completion", "/infill", "/tokenize",
            "/apply-template", "/embeddings", "/models/load", "/models/unload", "/rerank", "/v1/messages",
        )),
        ("POST", "/props", 405), ("POST", "/", 405), ("DELETE", "/v1/models", 405),
    ],
)  # fmt: skip
def test_nothing_else_of_the_server_behind_is_reachable(served: Served, method: str, path: str, status: int) -> None:
    connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=30)
    connection.putrequest(method, path)  # as it is, without putting it in order
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "2" if method == "POST" else "0")
    connection.endheaders(b"{}" if method == "POST" else None)
    assert connection.getresponse().status == status
    connection.close()


def test_the_server_behind_answers_nobody_else(served: Served) -> None:
    (child,) = served.children()
    (port,) = {c.laddr.port for c in child.net_connections() if c.status == psutil.CONN_LISTEN}
    for path in ("/v1/models", "/props", "/slots"):
        assert get(f"http://127.0.0.1:{port}{path}")[0] == 401
    assert not any("key" in word for word in child.cmdline())


def test_a_server_that_dies_is_started_again(served: Served, client: openai.OpenAI) -> None:
    (child,) = served.children()
    child.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (served.health() != 200 or served.children() in ([], [child])):
        time.sleep(0.2)
    assert client.chat.completions.create(model="m", messages=QUESTION, max_tokens=2).choices  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_behind(number: int) -> None:
    server = Served("smollm2-135m", "--ctx", "512")
    children = server.children()
    status = server.end(number)
    assert children and status == (0 if number != signal.SIGKILL else -9)
    assert server.process.stderr is not None
    server.process.stderr.close()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "expected a model, or the URL of an upstream"),
        (["smollm2-135m", "--upstream", "http://127.0.0.1:1/v1"], "expected a model, or the URL of an upstream"),
        (["nothing.gguf"], "nothing.gguf"),
        (["smollm2-135m", "--kv", "q9"], "q9"),
        (["smollm2-135m", "--drafter", "none.gguf"], "no such file for drafter"),
        (["smollm2-135m", "--host", "0.0.0.0"], "needs a key"),
        (["smollm2-135m", "--without", "everything"], "unknown layer"),
        (["--upstream", "http://127.0.0.1:1/v1", "--spend-cap", "1"], "without a fallback"),
    ],
    ids=lambda w: " ".join(w) if isinstance(w, list) else "",
)
def test_bad_options_are_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LOWBIT_API_KEY"}
    command = [sys.executable, "-m", "lowbit", "serve", *words, "--port", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
