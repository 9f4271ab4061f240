"""The endpoint over HTTP: OpenAI's forms, honest statuses, who may ask."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from endpoint import Endpoint, served
from scripted import Scripted

from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.harness import UpstreamFailed
from lowbit.serve import ServeOptions, running
from lowbit.serve.keys import key_in

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def ask(upstream: Any, asking: Any, options: ServeOptions | None = None) -> Any:
    async def go() -> Any:
        async with served(upstream, options) as endpoint:
            return await asking(endpoint)

    return asyncio.run(go())


def test_a_completion() -> None:
    status, found = ask(Scripted("Hi."), lambda e: e.post("/chat/completions", HELLO))
    assert status == 200 and found["choices"][0]["message"]["content"] == "Hi." and found["lowbit"]["tries"] == 1


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream(usage: bool) -> None:
    body = HELLO | ({"stream_options": {"include_usage": True}} if usage else {})
    events = ask(Scripted("Hi there."), lambda e: e.events("/chat/completions", body))
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == "Hi there."
    assert [bool(c["choices"]) for c in chunks].count(False) == int(usage)
    assert chunks[-1]["lowbit"]["tries"] == 1


def test_a_failure_before_the_first_chunk_has_its_status() -> None:
    body = HELLO | {"stream": True, "response_format": FORMAT}
    status, found = ask(Scripted("nonsense"), lambda e: e.post("/chat/completions", body))
    assert status == 422 and found["error"]["code"] == "output_not_json" and found["lowbit"]["tries"] == 3


class Busy(Scripted):
    async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        raise web.HTTPTooManyRequests(headers={"Retry-After": "3600"})


def test_how_long_to_wait_is_passed_on() -> None:
    async def asking(endpoint: Endpoint) -> tuple[int, str | None]:
        async with endpoint.session.post(f"{endpoint.url}/chat/completions", json=HELLO) as response:
            return response.status, response.headers.get("Retry-After")

    assert ask(Busy(), asking) == (429, "3600")


def test_a_failure_after_it_is_an_event() -> None:
    class Breaks(Scripted):
        async def stream(self, body: dict[str, Any], seconds: float) -> Any:
            async for chunk in super().stream(body, seconds):
                if (chunk["choices"][0]["delta"] or {}).get("content") == "f":
                    raise UpstreamFailed("gone")
                yield chunk

    events = ask(Breaks("abcdef", piece=1), lambda e: e.events("/chat/completions", HELLO))
    assert json.loads(events[-2])["error"]["code"] == "upstream_unreachable" and events[-1] == "[DONE]"


@pytest.mark.parametrize(
    "path, body, status, code",
    [
        ("/chat/completions", {"messages": []}, 400, "invalid_request"),
        ("/chat/completions", [], 400, "invalid_request"),
        ("/chat/completions", HELLO | {"lowbit": {"dialect": "nobody's"}}, 400, "invalid_request"),
        ("/chat/completions", HELLO | {"stream": "yes"}, 400, "invalid_request"),
        ("/completions", {"prompt": ""}, 400, "invalid_request"),
        ("/nowhere", {}, 404, "not_found"),
    ],
)
def test_bad_requests(path: str, body: Any, status: int, code: str) -> None:
    found = ask(Scripted("hi"), lambda e: e.post(path, body))
    assert (found[0], found[1]["error"]["code"]) == (status, code)


def test_a_page_of_another_origin_cannot_ask() -> None:
    async def asking(endpoint: Endpoint) -> None:
        plain = {"data": json.dumps(HELLO), "headers": {"Content-Type": "text/plain"}}
        async with endpoint.session.post(endpoint.url + "/chat/completions", **plain) as response:
            assert response.status == 415
        async with endpoint.session.get(endpoint.url + "/models", headers={"Host": "rebound.example"}) as response:
            assert response.status == 403

        headers = {"Content-Type": "application/json", "Origin": endpoint.root}
        for origin, status in ((endpoint.root, 200), ("https://app.example", 403), ("null", 403)):
            found, _ = await endpoint.post("/chat/completions", HELLO, headers=headers | {"Origin": origin})
            assert found == status
            async with endpoint.session.options(
                endpoint.url + "/chat/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
            ) as response:
                assert response.status in (403, 405) and "Access-Control-Allow-Origin" not in response.headers

    ask(Scripted("hi"), asking)


@pytest.mark.parametrize("origins, told", [(("https://App.example/",), "https://app.example"), (("*",), "*")])
def test_a_page_that_was_named_can(origins: tuple[str, ...], told: str) -> None:
    async def asking(endpoint: Endpoint) -> None:
        headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        async with endpoint.session.options(endpoint.url + "/chat/completions", headers=headers) as response:
            assert response.status == 204 and response.headers["Access-Control-Allow-Origin"] == told
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        for more in ({}, {"stream": True}):
            async with endpoint.session.post(
                endpoint.url + "/chat/completions", json=HELLO | more, headers=headers
            ) as response:
                assert response.status == 200 and response.headers["Access-Control-Allow-Origin"] == told
        if told != "*":
            other = {"Origin": "https://other.example"}
            async with endpoint.session.get(endpoint.url + "/models", headers=other) as response:
                assert response.status == 403 and "Access-Control-Allow-Origin" not in response.headers

    ask(Scripted("hi"), asking, ServeOptions(port=0, origins=origins))


@pytest.mark.parametrize("shown", [False, True])
def test_bodies_are_not_logged_unless_asked(
    shown: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever goes wrong, at the most talkative level."""

    class Faulty(Scripted):
        async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
            raise UpstreamFailed("the model's server: gone")

    def fault(harness: Any, body: dict[str, Any]) -> Any:
        raise KeyError(body["messages"][0]["content"])

    async def asking(endpoint: Endpoint) -> list[str]:
        said, body = [], {"messages": [{"role": "user", "content": "mellon-7"}], "lowbit": {"tries": 1}}
        for more in ({}, {"max_tokens": "mellon-7"}, {"response_format": {"type": "mellon-7"}}):
            said.append(json.dumps((await endpoint.post("/chat/completions", body | more))[1]))
        async with endpoint.session.post(
            endpoint.url + "/responses", data=b'{"input": "mellon-7"', headers={"Content-Type": "application/json"}
        ) as response:
            said.append(await response.text())
        _, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.root.rpartition(":")[2]))
        writer.write(b"mellon-7 {}\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.close()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lowbit.harness.Harness.complete", fault)
            status, found = await endpoint.post("/chat/completions", body)
        assert status == 500 and "mellon-7" not in json.dumps(found)
        return said

    with caplog.at_level(logging.DEBUG):
        said = ask(Faulty("hi"), asking, ServeOptions(port=0, log_bodies=shown))
    logged, out = caplog.text, capfd.readouterr()
    assert "KeyError" in logged and "mellon-7" not in logged and "mellon-7" not in out.out
    assert ("mellon-7" in out.err) == shown
    assert all("mellon-7" not in text for text in said)


def test_keys_are_never_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    class Refuses(Scripted):
        async def chat(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
            raise web.HTTPUnauthorized(text='{"error": {"message": "Incorrect API key: sk-upstream-1"}}')

    async def asking(endpoint: Endpoint) -> tuple[int, str]:
        headers = {"Authorization": "Bearer sk-mine-2"}
        status, found = await endpoint.post("/chat/completions", HELLO, headers=headers)
        wrong = await endpoint.post("/chat/completions", HELLO, headers={"Authorization": "Bearer sk-wrong-3"})
        return status, json.dumps([found, wrong])

    with caplog.at_level(logging.DEBUG):
        options = ServeOptions(port=0, key="sk-mine-2", upstream_key="sk-upstream-1")
        status, found = ask(Refuses("hi"), asking, options)
    told = found + caplog.text + "".join(capfd.readouterr())
    assert status == 502 and "Incorrect API key" in found and "sk-" not in told


@pytest.mark.parametrize("text, fine", [("sesame\n", True), ("", False), ("open sesame", False), ("a\nb", False)])
def test_the_key_comes_from_a_file(text: str, fine: bool, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8")
    if fine:
        assert key_in(file) == "sesame"
    else:
        with pytest.raises(BadFile) as caught:
            key_in(file)
        assert not text or text not in str(caught.value)
    with pytest.raises(NotFound):
        key_in(tmp_path / "absent")


def test_only_who_has_the_key_is_served() -> None:
    async def asking(endpoint: Endpoint) -> None:
        for key, status in ((None, 401), ("wrong", 401), ("sesame", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            found, _ = await endpoint.post("/chat/completions", HELLO, headers=headers)
            assert found == status
        async with endpoint.session.get(endpoint.root + "/health") as response:
            assert response.status == 200

    ask(Scripted("hi"), asking, ServeOptions(port=0, key="sesame"))


def test_other_hosts_need_a_key() -> None:
    async def go() -> None:
        async with running("http://127.0.0.1:1/v1", ServeOptions(host="0.0.0.0", port=0)):
            pass

    with pytest.raises(BadOption, match="key"):
        asyncio.run(go())


AWAY = "http://169.254.169.254/latest"
PARTS = [
    *(
        {"type": "image_url", "image_url": {"url": url}}
        for url in (AWAY, "file:///etc/passwd", "//x/y", " HtTp://x/", "x")
    ),
    {"type": "image_url", "image_url": AWAY},
    {"type": "image_url", "IMAGE_URL": {"Url": AWAY}},
    {"type": "image_url", "image_url": [{"url": "data:,"}, {"url": AWAY}]},
    {"type": "text", "text": "see", "image_url": {"url": AWAY}},
    {"type": "input_image", "image_url": AWAY},
    {"type": "input_audio", "input_audio": {"data": AWAY, "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": AWAY}},
    {"type": "video_url", "video_url": {"url": AWAY}},
    {"type": "input_video", "input_video": {"url": "ftp://x/"}},
    {"type": "file", "file": {"file_data": "gopher://x/"}},
    {"type": "input_file", "file_url": AWAY},
    {"type": "image", "source": {"type": "url", "url": AWAY}},
    {"type": "image", "image": AWAY},
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_nothing_is_fetched_for_a_request(part: dict[str, Any]) -> None:
    async def asking(endpoint: Endpoint) -> None:
        for message in ({"content": [part]}, {"content": [{"type": "text", "text": "x"}, {"type": "x", "x": [part]}]}):
            for path, name in (("/chat/completions", "messages"), ("/responses", "input")):
                status, found = await endpoint.post(path, {name: [{"role": "user", **message}]})
                assert status == 400 and found["error"]["param"] == f"{name}[0]"
        status, found = await endpoint.post("/chat/completions", {"messages": [{"role": "user", "images": [AWAY]}]})
        assert status == 400 and found["error"]["param"] == "messages[0]"

    upstream = Scripted("hi")
    ask(upstream, asking)
    assert not upstream.sent


def test_a_url_in_text_is_text() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "//uQxAAA", "format": "mp3"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,//8="}}
    call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": '{"url": "http://x/"}'}}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "http://x/"}, sound, image]},
            {"role": "assistant", "content": "http://x/", "annotations": [{"url": "http://x/"}], "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "https://x/"},
        ]
    }
    assert ask(Scripted("hi"), lambda e: e.post("/chat/completions", body))[0] == 200


def test_a_large_body_is_refused() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}]}
    status, found = ask(
        Scripted("hi"), lambda e: e.post("/chat/completions", body), ServeOptions(port=0, body_bytes=2000)
    )
    assert status == 413 and found["error"]["code"] == "body_too_large"


def test_metrics_and_health() -> None:
    async def asking(endpoint: Endpoint) -> None:
        await endpoint.post("/chat/completions", HELLO | {"response_format": FORMAT})
        async with endpoint.session.get(endpoint.root + "/metrics") as response:
            page = await response.text()
        assert 'lowbit_harness_events_total{layer="repair",what="json_extracted"} 1.0' in page
        assert 'lowbit_requests_total{path="/v1/chat/completions",status="200"} 1.0' in page
        assert "lowbit_requests_open 1.0" in page  # this one

    ask(Scripted('```json\n{"a": 1}\n```'), asking)
