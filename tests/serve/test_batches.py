"""/v1/files and /v1/batches: OpenAI's own client, unchanged, against the endpoint; restarts, limits and hostile ids."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "batch"))

from batch_server import BatchServer, answer  # noqa: E402
from jobs import request  # noqa: E402


class Endpoint:
    """A `lowbit serve` process in front of a server, with a folder of files; it can be killed and started again."""

    def __init__(self, upstream: str, folder: Path) -> None:
        self.upstream, self.folder = upstream, folder
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "lowbit", "serve", "--upstream", self.upstream, "--port", "0", "--files"]
        self.process = subprocess.Popen([*command, str(self.folder)], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("Serving on "):
                self.url = line.split()[2].rstrip(".")
                self.client = openai.OpenAI(base_url=self.url, api_key="-", max_retries=0, timeout=30)
                return
        raise AssertionError("".join(self.said))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture
def upstream() -> Iterator[BatchServer]:
    with BatchServer() as found:
        yield found


@pytest.fixture
def endpoint(upstream: BatchServer, tmp_path: Path) -> Iterator[Endpoint]:
    found = Endpoint(upstream.url, tmp_path / "files")
    yield found
    assert found.end() == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One for the tests that leave nothing behind."""
    with BatchServer() as server:
        found = Endpoint(server.url, tmp_path_factory.mktemp("shared") / "files")
        yield found
        assert found.end() == 0


def lines(said: list[str]) -> bytes:
    return "".join(json.dumps(request(f"id-{i}", text)) + "\n" for i, text in enumerate(said)).encode()


def ended(client: openai.OpenAI, id: str, seconds: float = 40.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        batch = client.batches.retrieve(id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"the batch is still {batch.status}: {batch.request_counts}")


def begun(client: openai.OpenAI, said: list[str], **more: Any) -> Any:
    file = client.files.create(file=("in.jsonl", lines(said)), purpose="batch")
    more = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
    return client.batches.create(input_file_id=file.id, **more)


def outputs(client: openai.OpenAI, id: str) -> dict[str, Any]:
    found = [json.loads(line) for line in client.files.content(id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def test_the_client_s_own_code_runs_unchanged(endpoint: Endpoint, tmp_path: Path) -> None:
    """As OpenAI's guide to batches has it."""
    client, said = endpoint.client, [f"item {i}" for i in range(25)] + ["status 400"]
    assert not endpoint.folder.exists() and client.files.list().data == [] and client.batches.list().data == []
    path = tmp_path / "batchinput.jsonl"
    path.write_bytes(lines(said))
    with open(path, "rb") as handle:
        file = client.files.create(file=handle, purpose="batch")
    assert file.id.startswith("file-") and file.filename == "batchinput.jsonl" and file.purpose == "batch"
    assert file.bytes == path.stat().st_size and file.object == "file" and file.status == "processed"
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
        metadata={"description": "nightly"},
    )  # fmt: skip
    assert batch.status == "validating" and batch.metadata == {"description": "nightly"} and batch.id[:6] == "batch_"
    assert batch.expires_at is not None and batch.expires_at - batch.created_at == 86400
    batch = ended(client, batch.id)
    assert batch.status == "completed" and batch.errors is None and batch.completed_at is not None
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (26, 25, 1)
    assert batch.output_file_id is not None and batch.error_file_id is not None
    out = outputs(client, batch.output_file_id)
    assert {k: line["response"]["body"]["choices"][0]["message"]["content"] for k, line in out.items()} == {
        f"id-{i}": answer(text) for i, text in enumerate(said[:25])
    }
    assert out["id-0"]["response"]["status_code"] == 200 and out["id-0"]["error"] is None
    [error] = outputs(client, batch.error_file_id).values()
    assert error["custom_id"] == "id-25" and error["error"]["message"]
    assert [entry.id for entry in client.batches.list(limit=1)] == [batch.id]
    assert {entry.purpose for entry in client.files.list()} == {"batch", "batch_output"}
    assert [entry.id for entry in client.files.list(purpose="batch")] == [file.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_lists_go_on_after_an_id(endpoint: Endpoint) -> None:
    made = [endpoint.client.files.create(file=("a", b"x"), purpose="batch").id for _ in range(5)]
    assert [file.id for file in endpoint.client.files.list(limit=2)] == made[::-1]  # the client asks for every page
    page = endpoint.client.files.list(limit=2, order="asc")
    assert [file.id for file in page.data] == made[:2] and page.has_next_page()
    with pytest.raises(openai.BadRequestError):
        endpoint.client.files.list(limit=0)


def test_a_batch_that_is_no_batch_fails_and_says_where(endpoint: Endpoint) -> None:
    wrong = lines(["a", "b"]) + b"no json\n" + lines(["c"])
    file = endpoint.client.files.create(file=("in.jsonl", wrong), purpose="batch")
    url = "/v1/chat/completions"
    batch = endpoint.client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    batch = ended(endpoint.client, batch.id)
    assert batch.status == "failed" and batch.errors is not None and batch.failed_at is not None
    assert [(e.code, e.line) for e in batch.errors.data or []] == [("invalid_json_line", 3), ("duplicate_custom_id", 4)]
    other = ended(endpoint.client, begun(endpoint.client, ["a"], endpoint="/v1/completions").id)
    assert other.status == "failed" and (other.errors.data or [])[0].code == "mismatched_endpoint"


def test_cancelled_in_the_middle(upstream: BatchServer, endpoint: Endpoint) -> None:
    upstream.delay = 0.05
    client = endpoint.client
    batch, later = begun(client, [f"item {i}" for i in range(2000)]), begun(client, ["waits"])
    while not client.batches.retrieve(batch.id).request_counts.completed:  # type: ignore[union-attr]
        time.sleep(0.05)
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at is not None and batch.cancelling_at is not None
    assert batch.output_file_id is not None and batch.error_file_id is not None and batch.request_counts is not None
    out, errors = outputs(client, batch.output_file_id), outputs(client, batch.error_file_id)
    assert len(out) + len(errors) == 2000 and len(out) == batch.request_counts.completed < 1500
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert ended(client, later.id).status == "completed"  # the next one is taken up
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(later.id)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_goes_on_after_a_restart(upstream: BatchServer, tmp_path: Path, number: int) -> None:
    upstream.delay, said = 0.02, [f"item {i}" for i in range(300)]
    endpoint = Endpoint(upstream.url, tmp_path / "files")
    batch = begun(endpoint.client, said)
    while not endpoint.client.batches.retrieve(batch.id).request_counts.completed > 20:  # type: ignore[union-attr]
        time.sleep(0.05)
    endpoint.end(number)
    before = len(upstream.asked)
    assert before < 300
    endpoint.start()
    try:
        done = ended(endpoint.client, batch.id)
        assert done.status == "completed" and done.output_file_id is not None
        assert len(outputs(endpoint.client, done.output_file_id)) == 300
        # What was answered is not asked again: only what was under way when it was killed.
        assert len(upstream.asked) <= 300 + 8 and len(set(upstream.asked)) == 300
    finally:
        assert endpoint.end() == 0


def test_a_window_that_passes(endpoint: Endpoint, upstream: BatchServer) -> None:
    upstream.delay = 0.05
    batch = begun(endpoint.client, [f"item {i}" for i in range(400)])
    while not endpoint.client.batches.retrieve(batch.id).request_counts.completed:  # type: ignore[union-attr]
        time.sleep(0.05)
    import sqlite3

    with sqlite3.connect(endpoint.folder / "index.sqlite", timeout=10) as db:  # nobody waits for an hour here
        db.execute("UPDATE batches SET record = json_set(record, '$.expires_at', 1)")
    db.close()
    done = ended(endpoint.client, batch.id)
    assert done.status == "expired" and done.error_file_id is not None and done.expired_at is not None
    errors = outputs(endpoint.client, done.error_file_id)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


def test_two_endpoints_do_not_share_a_folder(endpoint: Endpoint, upstream: BatchServer) -> None:
    endpoint.client.files.create(file=("a", b"x"), purpose="batch")
    other = Endpoint(upstream.url, endpoint.folder)
    try:
        assert any("another process has" in line for line in other.said)
        with pytest.raises(openai.InternalServerError, match="another process has"):
            other.client.files.create(file=("a", b"x"), purpose="batch")
        messages: Any = [{"role": "user", "content": "hi"}]
        assert other.client.chat.completions.create(model="m", messages=messages).choices  # all else is served
    finally:
        assert other.end() == 0


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 24, "batch_" + "0" * 24, "file-" + "g" * 24,
           "file-0123456789abcdef01234567/../x", "%00", "file-" + "a" * 9999, "index.sqlite", "lock"],
)  # fmt: skip
def test_no_id_leads_out_of_the_folder(shared: Endpoint, id: str) -> None:
    shared.client.files.create(file=("../../evil.jsonl", b"x"), purpose="batch")
    for path in ("files/{}", "files/{}/content", "batches/{}"):
        found = httpx.get(f"{shared.url}/{path.format(id)}")
        assert found.status_code in (400, 404, 414), found.text
        assert "root:" not in found.text
    assert httpx.delete(f"{shared.url}/files/{id}").status_code in (400, 404, 414)
    named = {path.name for path in shared.folder.rglob("*")}
    assert not any("evil" in name for name in named)
    assert shared.client.files.list().data[0].filename == "evil.jsonl"


@pytest.mark.parametrize(
    "form, status",
    [
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}, 400),
        ({"files": {"file": ("a", b"x")}}, 400),
        ({"files": {"file": ("a", b"")}, "data": {"purpose": "batch"}}, 400),
        ({"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}}, 400),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "batch" * 2000}}, 400),
        ({"json": {"purpose": "batch"}}, 415),
        ({"content": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
    ],
)  # fmt: skip
def test_uploads_that_are_refused(shared: Endpoint, form: dict[str, Any], status: int) -> None:
    found = httpx.post(f"{shared.url}/files", **form)
    assert found.status_code == status and found.json()["error"]["message"], found.text
    kept = shared.folder / "files"
    listed = {file.id for file in shared.client.files.list()}
    assert not kept.exists() or {path.name for path in kept.iterdir()} == listed  # nothing half-written


@pytest.mark.parametrize(
    "change", [{"endpoint": "/v1/embeddings"}, {"completion_window": "1s"}, {"completion_window": 24}, {"metadata": []},
               {"metadata": {"a": 1}}, {"metadata": {str(i): "" for i in range(17)}}, {"input_file_id": "file-x"},
               {"input_file_id": 3}, {"metadata": {"a": "b" * 513}}],
)  # fmt: skip
def test_batches_that_are_refused(shared: Endpoint, change: dict[str, Any]) -> None:
    file = shared.client.files.create(file=("a", lines(["a"])), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | change
    found = httpx.post(f"{shared.url}/batches", json=body)
    assert found.status_code == 400 and found.json()["error"]["param"] == next(iter(change)), found.text


def test_a_file_is_never_a_page(shared: Endpoint) -> None:
    file = shared.client.files.create(file=("a.html", b"<script>1</script>"), purpose="batch")
    found = httpx.get(f"{shared.url}/files/{file.id}/content")
    assert found.headers["content-type"] == "application/octet-stream" and found.content == b"<script>1</script>"
    assert found.headers["content-disposition"] == "attachment" and found.headers["x-content-type-options"] == "nosniff"
    evil = {"Origin": "http://evil.example"}
    refused = httpx.post(f"{shared.url}/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}, headers=evil)
    assert refused.status_code == 403  # a form is what a page of elsewhere could send


def test_sizes_are_bounded(upstream: BatchServer, tmp_path: Path) -> None:
    import asyncio

    from lowbit.serve.files import Files
    from lowbit.serve.store import Store

    async def go() -> list[int]:
        from aiohttp import web
        from aiohttp.test_utils import TestClient, TestServer

        from lowbit.serve import guard

        app = web.Application(middlewares=[guard.middleware(hosts=(), key=None)])
        Files(Store(tmp_path), file_bytes=1000, kept_bytes=2500).add_to(app)
        statuses = []
        async with TestClient(TestServer(app)) as client:
            for size in (1000, 1001, 900, 900, 500):
                form = {"purpose": "batch", "file": io.BytesIO(b"x" * size)}
                async with client.post("/v1/files", data=form) as response:
                    statuses.append(response.status)
        return statuses

    assert asyncio.run(go()) == [200, 413, 200, 413, 200]
    assert len([path for path in (tmp_path / "files").iterdir()]) == 3


def test_with_a_real_model(tmp_path: Path) -> None:
    """A model that is served here, from the upload to the answers."""
    from served_model import Served

    server = Served("smollm2-135m", "--ctx", "2048", "--slots", "2", "--files", str(tmp_path / "files"))
    try:
        with openai.OpenAI(base_url=server.url, api_key="-", max_retries=0, timeout=60) as client:
            batch = ended(client, begun(client, ["Say hello.", "Name a colour.", "What is 2 + 2?"]).id, 120)
            assert batch.status == "completed" and batch.output_file_id is not None
            out = outputs(client, batch.output_file_id)
            assert len(out) == 3 and all(
                line["response"]["body"]["usage"]["completion_tokens"] for line in out.values()
            )
    finally:
        assert server.end() == 0
        assert server.process.stderr is not None
        server.process.stderr.close()
    assert [path.name for path in (tmp_path / "files" / "batches").iterdir()] == [batch.id]
