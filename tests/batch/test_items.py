"""Lines of IN: what is a request, what is none and why, and that each is found again by its place."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer, answer
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import contents, read, request

from lowbit import batch
from lowbit.batch.items import BatchLines, NoItem, Place, read_place
from lowbit.batch.options import BatchOptions
from lowbit.errors import BadFile
from lowbit.units import MIB

GOOD = json.dumps(request("a", "hello")).encode()


def places(path: Path, data: bytes) -> list[Place]:
    path.write_bytes(data)
    return list(BatchLines(path).places())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b"\x00", "not JSON"),
        (b'{"custom_id": "\xff"}', "not UTF-8 at byte 15"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"custom_id": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": NaN}', "not JSON: NaN is not JSON"),
        (b"{}", "custom_id is missing"),
        (b'{"custom_id": 1}', "custom_id must be a text"),
        (b'{"custom_id": ""}', "custom_id must be a text"),
        (b'{"custom_id": "\\ud800"}', "half a surrogate pair"),
        (b'{"custom_id": "' + b"x" * 2000 + b'"}', "longer than 1024 characters"),
        (b'{"custom_id": "b"}', "method must be POST; found none"),
        (b'{"custom_id": "b", "method": "GET"}', 'method must be POST; found "GET"'),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/embeddings"}', "url must be one of /v1/chat/completions"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": []}', "body must be an object"),
    ],
)
def test_a_line_that_is_no_request_says_why(line: bytes, said: str, tmp_path: Path) -> None:
    found = places(tmp_path / "in", GOOD + b"\n" + line + b"\n" + GOOD.replace(b'"a"', b'"c"'))
    assert [place.problem is None for place in found] == [True, False, True]
    assert said in str(found[1].problem) and found[1].line == 2


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_marks_and_ends_of_lines(start: bytes, end: bytes, last: bool, tmp_path: Path) -> None:
    path, lines = tmp_path / "in", [GOOD.replace(b'"a"', b'"%d"' % i) for i in range(3)]
    found = places(path, start + end.join(lines) + (end if last else b""))
    assert [place.custom_id for place in found] == ["0", "1", "2"]
    for place in found:
        item = BatchLines(path).item(read_place(path, place.offset, place.length), place.custom_id or "")
        assert item.body["messages"][0]["content"] == "hello"


def test_a_line_of_100_mb_is_stepped_over(server: BatchServer, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(source, "wb") as handle:
        handle.write(json.dumps(request("first", "one")).encode() + b"\n" + b'{"custom_id": "long", "x": "')
        for _ in range(100):
            handle.write(b"x" * MIB)
        handle.write(b'"}\n' + json.dumps(request("last", "two")).encode())
    batch.run(source, out, endpoint=server.url)
    assert contents(out) == {"first": answer("one"), "last": answer("two")}
    error = json.loads((tmp_path / "out.errors.jsonl").read_text())
    assert error["line"] == 2 and "longer than 32.0 MiB" in error["error"]["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_bad_lines_end_as_errors_and_the_others_are_done(server: BatchServer, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wrong = json.dumps(request("d", "x")).replace("POST", "PUT").encode()
    source.write_bytes(b"\n".join([GOOD, b"nonsense", GOOD, wrong]))
    ran = batch.run(source, out, endpoint=server.url)
    assert set(read(out)) == {"a", "d"} and read(out)["d"]["error"]["code"] == "invalid_line"
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["custom_id"]) for error in errors] == [(2, None), (3, None), (4, "d")]
    assert errors[1]["error"]["message"] == "line 3: custom_id 'a' is line 1's too"
    assert ran.status.errors == {"invalid_line": 3} and server.asked == ["hello"]
    other = tmp_path / "strict.jsonl"
    other.write_bytes(source.read_bytes())
    with pytest.raises(BadFile, match="line 2: not a request; found not JSON"):
        batch.run(other, out, endpoint=server.url, options=BatchOptions(strict=True))
    assert server.asked == ["hello"]
    batch.run(other, endpoint=server.url)  # nothing of the refused run is left in the way


@pytest.mark.parametrize(
    "data", [b"", b"\n\n", b"nonsense\nmore", b"\x00" * 100, "größe\n".encode("utf-16"), b"\x1f\x8b"]
)
def test_what_is_no_batch_at_all_is_refused(data: bytes, server: BatchServer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    with pytest.raises(BadFile, match=r"no items|not a batch: no line is a request; found line 1"):
        batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", endpoint=server.url)
    assert not server.asked and not (tmp_path / "out.jsonl").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NEARLY = st.fixed_dictionaries(
    {"custom_id": st.just("a") | JSON, "method": st.just("POST") | JSON,
     "url": st.just("/v1/chat/completions") | JSON, "body": JSON}
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.binary(max_size=40) | NEARLY.map(lambda v: json.dumps(v).encode()), max_size=4))
def test_any_bytes_are_requests_or_said_to_be_none(
    lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "in"
    end = 0
    for place in places(path, b"\n".join(lines)):
        assert end <= place.offset and place.offset + place.length <= path.stat().st_size
        end, raw = place.offset + place.length, read_place(path, place.offset, place.length)
        if place.problem is None:
            item: Any = BatchLines(path).item(raw, place.custom_id or "")
            assert isinstance(item.body, dict)
        else:
            with pytest.raises((NoItem, BadFile)):
                BatchLines(path).item(raw, place.custom_id or "no")
