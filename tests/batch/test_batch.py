"""A batch from IN to OUT, against a server over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batch_server import BatchServer
from jobs import SCHEMA, contents, expected, read, request, write

from lowbit import batch
from lowbit.batch.options import BatchOptions
from lowbit.errors import BadFile, BadOption, RuntimeFailed
from lowbit.harness import HarnessOptions

SAID = [f"word {i}" for i in range(40)]


def test_every_item_is_answered_once_and_in_order(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    ran = batch.run(source, out, endpoint=server.url, options=BatchOptions(slots=3))
    assert ran.stop == "completed" and ran.exit_code == 0 and ran.errors is None
    assert contents(out) == expected(SAID)
    assert list(read(out)) == [str(i) for i in range(40)]
    assert sorted(server.asked) == sorted(SAID)
    line = read(out)["7"]
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["response"]["status_code"] == 200 and line["response"]["request_id"].startswith("req_")
    assert line["response"]["body"]["lowbit"]["tries"] == 1


def test_run_again_nothing_is_asked_again(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    batch.run(source, out, endpoint=server.url)
    before = out.read_bytes()
    out.unlink()
    server.asked.clear()
    batch.run(source, out, endpoint=server.url)
    assert server.asked == [] and out.read_bytes() == before


def test_lines_added_at_the_end_are_taken_in(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    batch.run(source, out, endpoint=server.url)
    server.asked.clear()
    with open(source, "a") as handle:
        handle.write("\n" + json.dumps(request("new", "more")) + "\nno request")
    batch.run(source, out, endpoint=server.url)
    assert server.asked == ["more"] and list(read(out))[-1] == "new"
    error = json.loads((tmp_path / "out.errors.jsonl").read_text())
    assert error["line"] == 43 and error["error"]["code"] == "invalid_line"


def test_another_file_of_the_same_name_is_refused(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    batch.run(source, out, endpoint=server.url)
    write(source, SAID[::-1])
    with pytest.raises(BadFile, match=r"not the file that this batch was begun with.*--restart"):
        batch.run(source, out, endpoint=server.url)
    batch.run(source, out, endpoint=server.url, options=BatchOptions(restart=True))
    assert contents(out) == expected(SAID[::-1])


def test_other_options_are_refused(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    batch.run(source, out, endpoint=server.url)
    with pytest.raises(BadOption, match=r"another tries.*found 5; expected 3.*--tries"):
        batch.run(source, out, endpoint=server.url, options=BatchOptions(harness=HarnessOptions(tries=5)))
    with pytest.raises(BadOption, match=r"another endpoint model.*other; expected m.*--endpoint-model.*--restart"):
        batch.run(source, out, endpoint=server.url, endpoint_model="other")


def test_failures_are_in_out_and_apart(server: BatchServer, tmp_path: Path) -> None:
    said = ["fine", "bad json at all", "status 500", "status 400", "fine too"]
    source, out = write(tmp_path / "in.jsonl", said), tmp_path / "out.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    lines[1]["body"]["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    source.write_text("\n".join(json.dumps(line) for line in lines))
    ran = batch.run(source, out, endpoint=server.url)
    found = read(out)
    assert {i: line["response"]["status_code"] for i, line in found.items()} == {
        "0": 200, "1": 422, "2": 502, "3": 400, "4": 200,
    }  # fmt: skip
    assert ran.errors is not None
    errors = {line["custom_id"]: line for line in map(json.loads, ran.errors.read_text().splitlines())}
    assert set(errors) == {"1", "2", "3"} and errors["1"]["line"] == 2
    assert errors["1"]["trace"]["tries"] == 3 and errors["1"]["trace"]["events"]
    assert server.asked.count("status 500") == 3 and server.asked.count("status 400") == 1
    assert ran.status.errors["output_not_json"] == 1
    server.asked.clear()
    batch.run(source, out, endpoint=server.url, options=BatchOptions(retry_failed=True))
    assert set(server.asked) >= {"status 500", "status 400"} and "fine" not in server.asked


def test_a_server_that_is_busy_or_down_is_waited_for(server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID[:8]), tmp_path / "out.jsonl"
    server.busy, server.bare = 5, True
    batch.run(source, out, endpoint=server.url, options=BatchOptions(slots=2))
    assert contents(out) == expected(SAID[:8])
    server.down = True
    with pytest.raises(RuntimeFailed, match=r"no answer any more.*goes on from here"):
        batch.run(
            write(tmp_path / "down.jsonl", SAID[:8]), endpoint=server.url, options=BatchOptions(slots=2, patience=1.0)
        )
    server.down = False
    batch.run(tmp_path / "down.jsonl", out, endpoint=server.url)
    assert contents(out) == expected(SAID[:8])


def test_the_other_urls(server: BatchServer, tmp_path: Path) -> None:
    chat, source, out = request("chat", "hello"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"prompt": "once"}}
    new = {"custom_id": "new", "method": "POST", "url": "/v1/responses", "body": {"input": "hello"}}
    source.write_text("\n".join(json.dumps(line) for line in (chat, text, new)))
    ran = batch.run(source, out, endpoint=server.url)
    found = {custom_id: line["response"]["body"] for custom_id, line in read(out).items()}
    assert found["text"]["choices"][0]["text"].startswith("answer")
    assert found["new"]["output"][0]["content"][0]["text"] == found["chat"]["choices"][0]["message"]["content"]
    assert ran.status.usage == {"prompt_tokens": 9, "completion_tokens": 13}


def test_never_more_under_way_than_slots(server: BatchServer, tmp_path: Path) -> None:
    server.delay = 0.02
    batch.run(write(tmp_path / "in.jsonl", SAID), endpoint=server.url, options=BatchOptions(slots=5))
    assert server.most == 5


def test_a_pipe_is_standard_input(server: BatchServer, tmp_path: Path) -> None:
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    text = write(tmp_path / "in.jsonl", SAID[:3]).read_text()
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,)).start()
    batch.run(tmp_path / "pipe", tmp_path / "out.jsonl", endpoint=server.url)
    assert contents(tmp_path / "out.jsonl") == expected(SAID[:3])


def test_results_never_replace_what_is_asked(server: BatchServer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.errors.jsonl", SAID[:3])
    for out in (source, tmp_path / "in.jsonl"):
        with pytest.raises(BadOption, match="would replace what is asked"):
            batch.run(source, out, endpoint=server.url)
    assert not server.asked


def test_numbers_and_letters_that_json_or_utf8_have_not(server: BatchServer, tmp_path: Path) -> None:
    import math

    from lowbit.batch.runner import _as_json

    raw = _as_json({"a": [math.nan, 1.5, {"b": math.inf}], "c": "\ud800é"})
    assert json.loads(raw.decode()) == {"a": [None, 1.5, {"b": None}], "c": "\ud800é"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "{url}/wrong"])
def test_a_wrong_url_ends_the_run_and_not_the_items(url: str, server: BatchServer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID[:8]), tmp_path / "out.jsonl"
    with pytest.raises(RuntimeFailed, match=r"no answer any more.*Cannot connect|answered 404.*Is the URL"):
        batch.run(source, out, endpoint=url.format(url=server.url), options=BatchOptions(patience=0.5))
    assert batch.status(source).waiting == 8 and not out.exists()
    batch.run(source, out, endpoint=server.url)
    assert contents(out) == expected(SAID[:8])
