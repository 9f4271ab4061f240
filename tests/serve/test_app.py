"""The endpoint over HTTP: OpenAI's forms, honest statuses, who may ask."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from endpoint import Endpoint, served
from scripted import Scripted

from lowbit.errors import BadOption
from lowbit.harness import UpstreamFailed
from lowbit.serve import ServeOptions, running

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

    ask(Scripted("hi"), asking)


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


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "//x/y"])
def test_nothing_is_fetched_for_a_request(url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}]}
    upstream = Scripted("hi")
    status, found = ask(upstream, lambda e: e.post("/chat/completions", body))
    assert status == 400 and found["error"]["param"] == "messages[0]" and not upstream.sent


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
