"""A batch on a Ray cluster of nodes: whatever dies in the middle, nothing is lost, and nothing is there twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import command, contents, read, write
from ray_nodes import Cluster, can_hide
from standin_vllm import answer, install

from lowbit import batch
from lowbit.batch.engines import _ray_place
from lowbit.batch.engines._ray_worker import Worker, request
from lowbit.batch.items import Item
from lowbit.batch.options import BatchOptions
from lowbit.batch.table import TableOptions
from lowbit.checkpoint.resolve import resolve
from lowbit.errors import BadOption, RuntimeFailed
from lowbit.files import sha256
from lowbit.model_server import ModelOptions

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: nodes want addresses of their own")

THINGS = ("a car", "the sky", "an apple", "a rose", "the sea", "a cat", "snow", "coal")
WHAT = ("colour", "size", "use", "name")
SAID = [f"Name a {what} that {thing} can have. One word." for what in WHAT for thing in THINGS]
ITEMS = len(SAID)
BODY = {"temperature": 0, "max_tokens": 6}
SERVER = ("--slots", 1, "--ctx", 512, "--threads", 1)  # one at a time: then no answer depends on what was beside it
B, C = "127.0.0.3", "127.0.0.4"


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one machine answers, undisturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    source = write(folder / "in.jsonl", SAID, **BODY)
    batch.run(source, folder / "out.jsonl", model="smollm2-135m", options=BatchOptions(slots=1),
              model_options=ModelOptions(context=512, threads=1))  # fmt: skip
    found = contents(folder / "out.jsonl")
    assert len(found) == ITEMS and len(set(found.values())) > ITEMS // 4
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its head has a core, and says that it has a GPU; a small server is there in vLLM's place."""
    folder = tmp_path_factory.mktemp("bin")
    path = {"PATH": f"{install(folder)}{os.pathsep}{os.environ['PATH']}", "STANDIN_VLLM_LOG": str(folder / "started")}
    with Cluster(gpus=1, environment=path) as found:
        yield found


def start(cluster: Cluster, source: Path, out: Path) -> subprocess.Popen[str]:
    words = command(
        "run",
        source,
        "-o",
        out,
        "--model",
        "smollm2-135m",
        "--engine",
        "ray",
        "--ray-address",
        cluster.address,
        *SERVER,
    )
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(cluster: Cluster, source: Path, out: Path, model: str = "smollm2-135m") -> batch.Ran:
    return batch.run(
        source, out, model=model, engine="ray", ray_address=cluster.address,
        options=BatchOptions(slots=1, patience=60), model_options=ModelOptions(context=512, threads=1),
    )  # fmt: skip


def says(process: subprocess.Popen[str], what: str) -> str:
    """What it says until that comes."""
    assert process.stderr is not None
    said = ""
    while what not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def until(true: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def done(source: Path) -> int:
    path = source.with_name(source.name + ".lowbit-batch") / "journal.sqlite"
    return batch.status(source).completed if path.exists() else 0


def told(source: Path) -> dict[str, dict[str, Any]]:
    return {one["url"].removeprefix("node "): one for one in batch.status(source).servers}


def test_a_node_dies_and_another_comes_late(
    cluster: Cluster, model: Path, quiet: dict[str, str], tmp_path: Path
) -> None:
    """The one that comes does not have the model, and its cache has another file in its place."""
    source, out = write(tmp_path / "in.jsonl", SAID, **BODY), tmp_path / "out.jsonl"
    cluster.add(B)
    cluster.wait_for(2)
    process = start(cluster, source, out)
    said = says(process, f"Worker on {B}")
    begun = done(source)
    until(lambda: done(source) > begun + 3, "nothing is answered")
    cluster.kill(B)
    assert done(source) < ITEMS
    cache = tmp_path / "cache"
    sent = cache / "lowbit" / "shipped" / sha256(model) / model.name
    sent.parent.mkdir(parents=True)
    sent.write_bytes(b"x" * model.stat().st_size)
    for server in cluster.servers():  # the head does not answer while the new node comes
        server.suspend()
    cluster.add(C, hidden=model.parent if can_hide() else None, environment={"XDG_CACHE_HOME": str(cache)})
    said += says(process, f"Worker on {C}")
    for server in cluster.servers():
        server.resume()
    on_stdout, rest = process.communicate(timeout=200)
    assert process.returncode == 0, said + rest
    assert not on_stdout and "ray" not in (said + rest).lower(), "Ray has no place in the terminal"
    assert contents(out) == quiet and len(read(out)) == ITEMS
    found = told(source)
    assert found[B]["answered"] > 0 and found[B]["state"] == "gone" and found[C]["answered"] > 0
    if can_hide():
        assert sha256(sent) == sha256(model), "what was in its place is replaced"
        assert sorted(path.name for path in sent.parent.iterdir()) == [model.name]
    with contextlib.closing(sqlite3.connect(source.with_name("in.jsonl.lowbit-batch") / "journal.sqlite")) as db:
        assert db.execute("SELECT max(tries) FROM items").fetchone()[0] == 2, "one was under way on the node that died"


def test_runner_server_and_worker_are_killed_one_is_stopped_and_the_batch_paused(
    cluster: Cluster, quiet: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", SAID, **BODY), tmp_path / "out.jsonl"
    process = start(cluster, source, out)
    until(lambda: done(source) > 3, "nothing is answered")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 3 < done(source) < ITEMS
    until(lambda: not cluster.servers(), "a server outlives its batch")
    monkeypatch.setattr(_ray_place, "_PATIENCE", 5.0)
    happened: list[str] = []

    def disturb() -> None:
        for name, signal_ in (("_server_child", signal.SIGKILL), ("ray::Worker", signal.SIGKILL),
                              ("ray::Worker", signal.SIGSTOP), ("pause", None)):  # fmt: skip
            before = done(source)
            until(lambda before=before: done(source) > before + 2, f"nothing is answered after {happened}")
            if signal_ is None:
                batch.pause(source)
                until(lambda: not cluster.servers(), "the model stays in memory")
                batch.resume(source)
            else:
                for worker in cluster.processes(name):
                    worker.send_signal(signal_)
            happened.append(name)

    thread = threading.Thread(target=disturb)
    thread.start()
    ran = run(cluster, source, out)
    thread.join()
    assert happened == ["_server_child", "ray::Worker", "ray::Worker", "pause"]
    assert ran.status.completed == ITEMS and contents(out) == quiet
    until(lambda: not cluster.servers(), "a server outlives its batch")


def test_a_checkpoint_is_served_where_the_gpus_are(cluster: Cluster, tmp_path: Path) -> None:
    """By vLLM's stand-in, which does not survive one of the requests; that ends as a failure, and no other."""
    folder = tmp_path / "tiny-checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    said = [*(f"word {i}" for i in range(12)), "crash", *(f"more {i}" for i in range(12))]
    source, out = write(tmp_path / "in.jsonl", said), tmp_path / "out.jsonl"
    run(cluster, source, out, str(folder))
    found = read(out)
    assert {i for i, line in found.items() if line["error"]} == {"12"}
    assert found["12"]["error"]["code"] == "server_crashed"
    assert contents(out) == {str(i): answer(text) for i, text in enumerate(said) if text != "crash"}
    assert told(source)["127.0.0.2, GPU 0"]["answered"] == len(said) - 1


def test_a_check_that_only_the_runner_has(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is made on the spot goes along; of a module's function only the name does."""
    (tmp_path / "only_here.py").write_text("def check(value):\n    return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import check  # type: ignore[import-not-found]

    item = Item("a", "/v1/chat/completions", {}, check=lambda value: f"not {value}")
    assert Worker()._check(request(item)["check"])(3) == "not 3"
    source = tmp_path / "in.csv"
    source.write_text("text\nword\n")
    with pytest.raises(RuntimeFailed, match="does not have what --schema names: No module named 'only_here'"):
        batch.run(
            source, tmp_path / "out.jsonl", model="smollm2-135m", engine="ray", ray_address=cluster.address,
            table=TableOptions(template="{{ text }}", check=check), model_options=ModelOptions(context=512),
        )  # fmt: skip
    assert batch.status(source).in_flight == 0


def test_a_cluster_of_another_version(cluster: Cluster, tmp_path: Path) -> None:
    """What the head says of itself is changed, as if another Ray had started it."""
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    key, space = b"CLUSTER_METADATA", b"cluster"
    before = client.internal_kv_get(key, space)
    assert before is not None
    other = json.loads(before) | {"ray_version": "2.9.0"}
    client.internal_kv_put(key, json.dumps(other).encode(), True, space)
    try:
        with pytest.raises(BadOption, match=r"another Ray or Python; found Ray 2\.9\.0, .*expected Ray .*as here"):
            run(cluster, write(tmp_path / "in.jsonl", SAID), tmp_path / "out.jsonl")
    finally:
        client.internal_kv_put(key, before, True, space)


def test_the_head_dies(cluster: Cluster, tmp_path: Path) -> None:
    """The last test: the batch ends in a line, in time, before Ray would end its process; nothing committed is lost."""
    source = write(tmp_path / "in.jsonl", SAID, **BODY)
    code = (
        "import sys\nfrom lowbit.batch.engines import ray\nray._HEADLESS = 3.0\n"
        "from lowbit.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = ["run", source, "--model", "smollm2-135m", "--engine", "ray", "--ray-address", cluster.address, *SERVER]
    process = subprocess.Popen([sys.executable, "-c", code, *command(*words)[3:]], stderr=subprocess.PIPE, text=True)
    until(lambda: done(source) > 3, "nothing is answered")
    cluster.kill("127.0.0.2")
    _, said = process.communicate(timeout=50)
    assert process.returncode == 3, said
    assert "the head of the cluster did not answer" in said.splitlines()[-1] and "goes on from here" in said
    assert batch.status(source).in_flight == 0 and done(source) > 3
