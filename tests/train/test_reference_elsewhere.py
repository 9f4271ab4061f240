"""A reference that is a file, or another process: trainings by it are those by the model itself."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from texts_to_train_on import random_words

import lowbit
from lowbit import record_file
from lowbit.cli import main
from lowbit.errors import BadFile, BadOption, LowbitError, NotFound, RuntimeFailed, Unsupported
from lowbit.reference import reference
from lowbit.train import TrainOptions
from lowbit.train.drafter import train_drafter
from lowbit.train.reference_file import ReferenceFile
from lowbit.train.reference_server import CONTENT, RemoteReference
from processes import together, train_one

LENGTH = 16
FEW: dict[str, Any] = {
    "steps": 6, "threads": 1, "sequence_length": LENGTH, "precision": "float32", "batch_size": 4, "learning_rate": 5e-4,
    "start": "nearest", "warmup_steps": 1,
}  # fmt: skip
OF_FILE: dict[str, Any] = {"sequence_length": LENGTH, "precision": "float32", "threads": 1}


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("prose") / "prose.txt", 3000)


@pytest.fixture(scope="module")
def model(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_llama(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def other_model(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "tiny"
    save_tiny_llama(folder, num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def file(model: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of as many sequences as six steps of four train on."""
    path = tmp_path_factory.mktemp("file") / "reference.bin"
    reference(model, path, data=str(prose), sequences=24, **OF_FILE)
    return path


def losses(record: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in record["curve"]]


def trained(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    return lowbit.train(model, out, options=TrainOptions(**{**FEW, **more})).record


@contextmanager
def answering(model: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``lowbit reference --port`` and its URL."""
    command = [sys.executable, "-m", "lowbit", "reference", str(model), "--port", "0", "--threads", "1", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield url[0], process
                    return
            raise AssertionError(said)
        finally:
            process.kill()


def test_a_training_by_a_file_or_a_process_is_the_one_by_the_model_itself(
    model: Path, prose: Path, file: Path, tmp_path: Path
) -> None:
    own = trained(model, tmp_path / "own", data=str(prose), targets="compact")
    by_file = trained(model, tmp_path / "file", reference=str(file), data=str(prose))
    with answering(model, "--precision", "float32") as (url, _):
        by_process = trained(model, tmp_path / "process", reference=url, data=str(prose))
    assert losses(own)[-1] < losses(own)[0]  # it learns
    for other in (by_file, by_process):
        assert losses(other) == pytest.approx(losses(own), abs=1e-5)
        assert other["curve"][-1]["kld"] == pytest.approx(own["curve"][-1]["kld"], abs=1e-5)
    assert "reference" not in own
    assert by_file["reference"]["kind"] == "file" and by_process["reference"]["kind"] == "process"
    assert by_file["reference"]["model"] == by_process["reference"]["model"]
    assert by_file["data"]["text_tokens"] == own["data"]["text_tokens"] > 0
    assert not (tmp_path / "file.work" / "reference").exists()  # nothing was asked


def test_compact_targets_train_as_exact_ones_do(model: Path, prose: Path, tmp_path: Path) -> None:
    """The loss is another: below the exact one, and by less than a twentieth for this vocabulary of 320."""
    exact, compact = (
        losses(trained(model, tmp_path / kind, data=str(prose), targets=kind)) for kind in ("hidden", "compact")
    )
    assert compact == pytest.approx(exact, rel=0.05)
    assert compact != exact


def test_several_processes_share_a_file_and_a_process(model: Path, prose: Path, file: Path, tmp_path: Path) -> None:
    alone = trained(model, tmp_path / "alone", reference=str(file))
    with answering(model, "--precision", "float32") as (url, _):
        for name, more in {"file": {"reference": str(file)}, "process": {"reference": url, "data": str(prose)}}.items():
            assert together(2, train_one, model, tmp_path / name, FEW | more) == [0, 0]
            record = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
            assert losses(record) == pytest.approx(losses(alone), abs=1e-5)


def test_a_file_killed_while_it_was_written_goes_on(model: Path, tmp_path: Path) -> None:
    path, prose = tmp_path / "reference.bin", random_words(tmp_path / "long.txt", 9_000)
    words = [
        "reference",
        str(model),
        "--data",
        str(prose),
        "--sequences",
        "150",
        "--sequence-length",
        "64",
        "--threads",
        "1",
        "-o",
    ]
    words += [str(path), "--precision", "float32"]
    going = path.with_name("reference.bin.partial")
    with subprocess.Popen([sys.executable, "-m", "lowbit", *words], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (going.exists() and going.stat().st_size > 500_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not path.exists()
    kept = going.read_bytes()
    assert main(["--quiet", *words]) == 0
    whole = path.read_bytes()
    assert whole.startswith(kept[: len(kept) // (64 * 287) * (64 * 287)]) and not going.exists()
    assert main(["--quiet", *words]) == 0  # it is there
    reference(model, tmp_path / "again", data=str(prose), sequences=150, **OF_FILE | {"sequence_length": 64})
    assert (tmp_path / "again").read_bytes() == whole


def test_what_does_not_belong_is_refused(
    model: Path, other_model: Path, prose: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, model: Path, **more: Any) -> None:
        with pytest.raises(BadOption, match=says) as error:
            trained(model, tmp_path / "out", reference=str(file), **more)
        assert "\n" not in str(error.value)

    refused("of another model; found tiny", other_model)
    refused(r"another length; found 16 tokens; expected 32\. Try --sequence-length 16", model, sequence_length=32)
    another = random_words(tmp_path / "another.txt", 3000, seed=1)
    refused(r"of other data; found prose.txt .* Leave --data out", model, data=str(another))
    refused("compact", model, targets="hidden")
    renamed = tmp_path / "renamed.txt"
    renamed.write_bytes(prose.read_bytes())
    trained(model, tmp_path / "renamed", reference=str(file), data=str(renamed), steps=1)
    with pytest.raises(BadOption, match="something else is there"):
        reference(other_model, file, data=str(prose), **OF_FILE)
    with pytest.raises(NotFound, match="no such reference"):
        trained(model, tmp_path / "out", reference=str(tmp_path / "absent"))
    with pytest.raises(BadFile, match="not a reference"):
        trained(model, tmp_path / "out", reference=str(prose))
    with pytest.raises(Unsupported, match="drafter"):
        train_drafter(model, "layers:1", tmp_path / "d", options=TrainOptions(reference=str(file)))
    for words in (["-o", str(tmp_path / "x"), "--port", "0"], []):
        assert main(["reference", str(model), *words]) == 2
    assert "a file to write, or a port" in capsys.readouterr().err


def with_header(path: Path, file: Path, **changes: Any) -> Path:
    """A file whose checksum is right and whose header says something else."""
    whole = file.read_bytes()
    end = 12 + int.from_bytes(whole[8:12], "little")
    text = json.dumps({**json.loads(whole[12:end]), **changes}).encode()
    body = whole[:8] + len(text).to_bytes(4, "little") + text + whole[end : -record_file.DIGEST]
    path.write_bytes(body + hashlib.sha256(body).digest())
    return path


def test_files_that_lie_or_are_damaged_are_refused(model: Path, file: Path, tmp_path: Path) -> None:
    start = with_header(tmp_path / "start", file, start_token=7)
    with pytest.raises(BadOption, match="its start token is another; found token 7"):
        trained(model, tmp_path / "out", reference=str(start))
    for changes in (
        {"sequences": 1 << 40},
        {"sequences": 23},
        {"length": 0},
        {"n_vocab": 3},
        {"model": 3},
        {"more": 1},
    ):
        with pytest.raises(BadFile):
            ReferenceFile(with_header(tmp_path / "bad", file, **changes))
    whole = bytearray(file.read_bytes())
    whole[-5000] ^= 1
    (tmp_path / "bad").write_bytes(whole)
    with pytest.raises(BadFile, match="its checksum is another"):
        ReferenceFile(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(file.read_bytes()[:-7])
    with pytest.raises(BadFile, match="truncated"):
        ReferenceFile(tmp_path / "bad")
    impossible = bytearray(file.read_bytes()[: -record_file.DIGEST])
    impossible[-4:] = b"\xff" * 4  # an entry's token
    (tmp_path / "bad").write_bytes(bytes(impossible) + hashlib.sha256(impossible).digest())
    with pytest.raises(BadFile, match="token id in row 15 of sequence 23"):
        ReferenceFile(tmp_path / "bad")


def test_hostile_files_are_refused_or_usable(file: Path, tmp_path: Path) -> None:
    """Some bytes changed, often with a checksum that is right again: one of our errors, or targets that are numbers."""
    good, rng, used = file.read_bytes(), random.Random(0), 0
    head = torch.nn.functional.log_softmax(torch.randn(1, 320, generator=torch.Generator().manual_seed(0)), -1)
    for _ in range(300):
        whole = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            whole[rng.choice([rng.randrange(300), rng.randrange(len(whole)), -rng.randrange(33, 3000)])] = (
                rng.randrange(256)
            )
        if rng.random() < 0.8:
            whole[-record_file.DIGEST :] = hashlib.sha256(whole[: -record_file.DIGEST]).digest()
        (tmp_path / "hostile").write_bytes(whole)
        try:
            held = ReferenceFile(tmp_path / "hostile")
        except LowbitError as error:
            assert "\n" not in str(error)
            continue
        targets = held.targets(torch.tensor([held.header.sequences - 1]), None, torch.device("cpu"))
        divergence, slope = targets.compare(slice(None), head.expand(held.header.length, 320).clone())
        assert not divergence.isnan().any() and not slope.isnan().any()
        used += 1
    assert 20 < used < 280


def test_a_process_answers_what_the_file_holds_and_refuses_the_rest(
    model: Path, other_model: Path, file: Path, tmp_path: Path
) -> None:
    held = ReferenceFile(file)
    with answering(model, "--precision", "float32") as (url, process):
        remote = RemoteReference(url, held.form)
        records = remote(held.sequences[4:7], 4)["records"]
        assert torch.equal(records, torch.from_numpy(np.array(held._records[4:7])))
        with pytest.raises(BadOption, match="of another model; found tiny"):
            trained(other_model, tmp_path / "out", reference=url, data=None)
        sha256 = remote.model["sha256"]
        good = {"model": sha256, "length": 4, "first": 0, "seed": 0}
        four = np.arange(4, dtype="<i4").tobytes()
        for status, params, body, kind in (
            (409, {**good, "model": "other"}, four, CONTENT),
            (400, {**good, "length": 3}, four, CONTENT),
            (400, {**good, "first": -1}, four, CONTENT),
            (400, good, np.full(4, 320, "<i4").tobytes(), CONTENT),
            (413, good, b"", CONTENT),
            (404, good, four, "text/plain"),  # as a web page may send it
            (200, good, four, CONTENT),
        ):
            answer = httpx2.post(f"{url}/records", params=params, content=body, headers={"Content-Type": kind})
            assert answer.status_code == status, answer.text
        process.kill()
        process.wait()
        with pytest.raises(RuntimeFailed, match="does not answer"):
            remote(held.sequences[:1], 0)
    with pytest.raises(RuntimeFailed, match=r"does not answer.*lowbit reference MODEL --port"):
        trained(model, tmp_path / "out", reference=url)


def test_a_training_goes_on_when_its_reference_is_back(
    model: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends while it is asked; another, on another port, is asked for the rest. Once all is said none is
    needed."""
    asked: list[int] = []
    call = RemoteReference.__call__
    data = {"data": str(prose), "targets": "compact"}

    def failing(self: RemoteReference, sequences: np.ndarray, first: int) -> Any:
        if first == 16 and not asked.count(16):
            asked.append(first)
            raise RuntimeFailed("the reference does not answer", where=self.url)
        asked.append(first)
        return call(self, sequences, first)

    monkeypatch.setattr(RemoteReference, "__call__", failing)
    with answering(model, "--precision", "float32") as (url, _), pytest.raises(RuntimeFailed):
        trained(model, tmp_path / "out", reference=url, **data)
    with answering(model, "--precision", "float32") as (url, _):
        again = trained(model, tmp_path / "out", reference=url, **data)
    own = trained(model, tmp_path / "own", **data)
    assert losses(again) == pytest.approx(losses(own), abs=1e-5)


def peak_of(model: Path, out: Path, *words: str) -> int:
    """Bytes resident at most in the process that trains; getrusage would count the process it was forked from too."""
    code = (
        "import re, sys; from lowbit.cli import main; status = main(sys.argv[1:]); "
        "print(re.search('VmHWM:[^0-9]*([0-9]+) kB', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    options = [
        "--steps",
        "1",
        "--sequence-length",
        "16",
        "--start",
        "nearest",
        "--precision",
        "float32",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-c", code, "--quiet", "train", str(model), "-o", str(out), *options, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read as Linux tells them")
def test_the_reference_takes_no_memory_of_the_training(
    save_tiny_llama: Callable[..., Any], prose: Path, tmp_path: Path
) -> None:
    """What a training holds of the reference beside the model that it trains is its output head, here 64 MiB."""
    save_tiny_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=256, vocab_size=65_536)
    reference(tmp_path / "model", tmp_path / "file", data=str(prose), sequences=8, **OF_FILE)
    head = 65_536 * 256 * 4
    own = peak_of(tmp_path / "model", tmp_path / "own", "--data", str(prose))
    by_file = peak_of(tmp_path / "model", tmp_path / "by-file", "--reference", str(tmp_path / "file"))
    with answering(tmp_path / "model", "--precision", "float32") as (url, _):
        by_process = peak_of(tmp_path / "model", tmp_path / "by-process", "--data", str(prose), "--reference", url)
    for elsewhere in (by_file, by_process):
        assert elsewhere < own - 0.8 * head
