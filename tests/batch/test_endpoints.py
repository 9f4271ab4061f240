"""One job over several servers: each gets what it can take, and one that fails costs nothing but its share."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_server import BatchServer, free_port
from jobs import contents, expected, lowbit, write

from lowbit import batch
from lowbit.batch.engines import EngineOptions, open_engine
from lowbit.batch.options import BatchOptions
from lowbit.errors import BadOption, RuntimeFailed

SAID = [f"item {i}" for i in range(60)]
FOUR = BatchOptions(slots=4, patience=20)


def test_the_faster_server_gets_more_and_slots_are_respected(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    with BatchServer(delay=0.2) as slow, BatchServer(delay=0.02) as fast:
        batch.run(source, out, endpoint=[slow.url, fast.url], options=BatchOptions(slots=2))
        assert len(fast.asked) > 2 * len(slow.asked) > 0
        assert slow.most <= 2 and fast.most <= 2
        assert sorted(slow.asked + fast.asked) == sorted(SAID)
    assert contents(out) == expected(SAID)


def test_a_dead_server_is_rested_and_named_and_its_items_go_to_others(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with BatchServer(delay=0.05) as server:
        ran = batch.run(source, out, endpoint=[dead, server.url], options=FOUR)
        assert sorted(server.asked) == sorted(SAID)
    assert contents(out) == expected(SAID) and ran.status.completed == 60
    told = {one["url"]: one for one in ran.status.servers}
    assert told[dead]["state"] == "rests" and told[dead]["answered"] == 0 and told[dead]["why"]
    assert told[server.url]["state"] == "answers"
    done = lowbit("status", source)
    assert f"{dead}: 0 answered, 4 at a time, rests" in done.stdout


def test_servers_are_told_by_their_urls_and_without_passwords(tmp_path: Path) -> None:
    """Also where the model was named, which is one for both."""
    source = write(tmp_path / "in.jsonl", SAID)
    with BatchServer() as one, BatchServer() as other:
        with_password = other.url.replace("://", "://me:secret@")
        given = [one.url, with_password]
        ran = batch.run(source, tmp_path / "out.jsonl", endpoint=given, endpoint_model="m")
    assert {told["url"] for told in ran.status.servers} == {one.url, other.url}
    assert "secret" not in open_engine(EngineOptions(endpoints=(with_password,))).place()  # which the journal keeps
    kept = b"".join(path.read_bytes() for path in ran.folder.rglob("*") if path.is_file())
    assert b"secret" not in kept


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    with BatchServer(delay=0.02) as busy, BatchServer(delay=0.02) as other:
        busy.busy = 1000
        batch.run(source, out, endpoint=[busy.url, other.url], options=FOUR)
        assert len(other.asked) == 60 and len(busy.asked) < 12, "asked again and again"
    assert contents(out) == expected(SAID)


def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl"
    port, log = free_port(), tmp_path / "log"
    script = Path(__file__).with_name("batch_server.py")
    process = subprocess.Popen([sys.executable, str(script), str(port), str(log)], env={"DELAY": "0.05"})
    try:
        with BatchServer(delay=0.05) as server:
            dying = f"http://127.0.0.1:{port}/v1"
            runner = subprocess.Popen(
                [sys.executable, "-m", "lowbit", "batch", "run", str(source), "-o", str(out), "--slots", "4",
                 "--endpoint", dying, "--endpoint", server.url], stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while not log.exists() or len(log.read_text().splitlines()) < 6:
                time.sleep(0.02)
            process.kill()
            assert runner.wait(60) == 0
            answered = log.read_text().splitlines() + server.asked
    finally:
        process.kill()
        process.wait()
    assert contents(out) == expected(SAID)
    assert set(answered) == set(SAID)
    assert len(answered) <= 60 + 4, "no more than were under way are asked twice"


def test_a_server_that_comes_back_gets_its_share_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", [f"item {i}" for i in range(150)]), tmp_path / "out.jsonl"
    with BatchServer(delay=0.1) as one, BatchServer(delay=0.1) as two:
        one.busy = 2
        batch.run(source, out, endpoint=[one.url, two.url], options=FOUR)
        assert len(one.asked) > 20
    assert len(contents(out)) == 150


def test_all_dead_is_an_error_that_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", SAID)
    dead = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    with pytest.raises(RuntimeFailed, match="no answer any more"):
        batch.run(source, endpoint=dead, options=BatchOptions(slots=2, patience=1.5))


def test_different_models_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", SAID)
    with BatchServer() as one, BatchServer() as two:
        two.model = "other"
        with pytest.raises(BadOption, match="different models"):
            batch.run(source, endpoint=[one.url, two.url])
        assert batch.run(source, endpoint=[one.url, two.url], endpoint_model="m").status.completed == 60


def test_a_server_that_tells_its_slots_is_given_no_more(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", SAID)
    with BatchServer(delay=0.02) as server:
        server.slots = 3
        ran = batch.run(source, endpoint=server.url)
        assert server.most == 3 and ran.status.slots is None, "nothing is left to probe"
