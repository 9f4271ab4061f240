"""Packing goes on where it was killed, believes nothing of a file that is not its own, and ends with the same file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit import files, partial
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.safetensors_file import SafetensorsWriter
from lowbit.errors import BadOption
from lowbit.pack import gguf_container, model_folder
from lowbit.partial import Partial, PartialFolder, journal_of


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices a tensor, as a large model has."""
    monkeypatch.setattr(gguf_container, "_SLICE_WEIGHTS", 1 << 11)


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A BF16 checkpoint, so that recovery has something to look for."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_llama()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def whole_parts(out: Path) -> int:
    """How many tensors the journal calls whole."""
    journal = journal_of(partial_of(out))
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def interrupt(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *, after: int, **options: Any) -> None:
    """Packs until ``after`` tensors are whole, and in the journal, and is interrupted there."""
    real = Partial.finish_part
    left = after

    def finish_part(self: Partial, name: str) -> None:
        nonlocal left
        real(self, name)
        left -= 1
        if not left:
            self.sync()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partial, "finish_part", finish_part)
        lowbit.pack(model, options.pop("recipe", "q4_0"), out, **options)
    assert not out.exists()


@pytest.mark.parametrize("naive", [True, False])
def test_the_bytes_do_not_depend_on_the_threads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naive: bool
) -> None:
    made = set()
    for threads, weights in ((1, 1 << 22), (1, 1 << 9), (2, 1 << 11), (5, 1 << 9)):
        monkeypatch.setattr(gguf_container, "_SLICE_WEIGHTS", weights)
        packed = lowbit.pack(model, "q4_0", tmp_path / "x.gguf", naive=naive, threads=threads, certificate=True)
        assert packed.certificate is not None
        made.add((packed.path.read_bytes(), str(packed.certificate.to_json())))
    assert len(made) == 1


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(model: Path, tmp_path: Path, threads: int) -> None:
    with pytest.raises(BadOption, match=f"threads; found {threads}; expected a whole number from 1 up"):
        lowbit.pack(model, "q4_0", tmp_path / "x.gguf", threads=threads)
    assert not list(tmp_path.glob("x.gguf*"))


def killed_at(model: Path, out: Path, calls: int) -> bool:
    """Packs in a fork that kills itself at its ``calls``-th system call that writes, half-way through every other
    write. Whether it came so far."""
    child = os.fork()
    if not child:
        left = calls

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    if real is pwrite and calls % 2:
                        pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        pwrite = os.pwrite
        for name in ("pwrite", "fsync", "replace", "unlink", "ftruncate"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            lowbit.pack(model, "q4_0", out, threads=2)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_every_step(model: Path, tmp_path: Path, small_slices: None) -> None:
    expected = lowbit.pack(model, "q4_0", tmp_path / "undisturbed.gguf").path.read_bytes()
    out = tmp_path / "out" / "x.gguf"
    calls, seen = 1, set()
    while killed_at(model, out, calls):
        seen.add(whole_parts(out))
        assert not out.exists() or out.read_bytes() == expected  # killed between its name and the journal's end
        assert lowbit.pack(model, "q4_0", out).path.read_bytes() == expected
        assert [path.name for path in out.parent.iterdir()] == ["x.gguf"]
        shutil.rmtree(out.parent)
        calls += 1 if calls < 20 else 7
    assert calls > 60 and len(seen) > 5  # from the first write to the last name, at many states of the journal
    assert out.read_bytes() == expected


def test_killed_again_and_again(model: Path, tmp_path: Path, small_slices: None) -> None:
    """What is whole stays whole: each run begins with at least what the one before it had."""
    expected = lowbit.pack(model, "q4_0", tmp_path / "undisturbed.gguf").path.read_bytes()
    out, before = tmp_path / "x.gguf", 0
    for _ in range(100):
        if not killed_at(model, out, 40) or out.exists():  # killed after its last name is done too
            break
        assert whole_parts(out) >= before
        before = whole_parts(out)
    assert before > 0
    assert out.read_bytes() == expected


def test_nothing_whole_is_done_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    interrupt(monkeypatch, model, out, after=7)
    assert whole_parts(out) == 7
    encoded = []
    real = gguf_container.encoder

    def encoder(checkpoint: Checkpoint, spec: TensorSpec, *rest: Any, **more: Any) -> gguf_container.Encoder:
        encoded.append(spec.name)
        return real(checkpoint, spec, *rest, **more)

    monkeypatch.setattr(gguf_container, "encoder", encoder)
    capsys.readouterr()
    lowbit.pack(model, "q4_0", out)
    with open_checkpoint(model) as checkpoint:
        assert encoded == list(checkpoint.names[7:])
        assert f"{out}: going on, 7 of {len(checkpoint.names)} tensors are there\n" in capsys.readouterr().err


def test_what_the_journal_names_was_synced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_slices: None
) -> None:
    """At every moment: the tensors in the journal are among those whose bytes were all written before an fsync."""
    out = tmp_path / "x.gguf"
    expected = GgufFile(lowbit.pack(model, "q4_0", tmp_path / "undisturbed.gguf").path)
    ends = {entry.start: entry.n_bytes for entry in expected.entries.values()}
    with open_checkpoint(model) as checkpoint:
        starts = {name: expected.entries[spec.gguf_name].start for name, spec in checkpoint.specs.items()}
    written: dict[int, int] = {}
    synced: set[int] = set()
    real_write, real_sync = os.pwrite, os.fsync

    def check() -> None:
        journal = journal_of(partial_of(out))
        text = journal.read_text() if journal.exists() else ""
        assert {start for name, start in starts.items() if f'"{name}"' in text} <= synced

    def pwrite(handle: int, data: memoryview, at: int) -> int:
        check()
        start = max((start for start in ends if start <= at), default=0)
        written[start] = written.get(start, 0) + len(data)
        return real_write(handle, data, at)

    def fsync(handle: int) -> None:
        whole = {start for start, n in written.items() if n == ends.get(start)}
        real_sync(handle)
        check()
        synced.update(whole)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    lowbit.pack(model, "q4_0", out, threads=1)
    assert set(starts.values()) <= synced


def other_recipe(model: Path, out: Path) -> dict[str, Any]:
    return {"recipe": "q8_0"}


def naive_instead(model: Path, out: Path) -> dict[str, Any]:
    return {"naive": True}


def source_written(model: Path, out: Path) -> dict[str, Any]:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\0\0"
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {}


def another_file_of_that_name(model: Path, out: Path) -> dict[str, Any]:
    path = partial_of(out)
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)
    return {}


def no_partial_file(model: Path, out: Path) -> dict[str, Any]:
    partial_of(out).unlink()
    return {}


def a_shorter_one(model: Path, out: Path) -> dict[str, Any]:
    with open(partial_of(out), "r+b") as handle:
        handle.truncate(1000)
    return {}


def a_journal_of_noise(model: Path, out: Path) -> dict[str, Any]:
    journal_of(partial_of(out)).write_bytes(np.random.default_rng(0).bytes(5000))
    return {}


def an_empty_journal(model: Path, out: Path) -> dict[str, Any]:
    journal_of(partial_of(out)).write_bytes(b"")
    return {}


STALE = (
    other_recipe, naive_instead, source_written, another_file_of_that_name, no_partial_file, a_shorter_one,
    a_journal_of_noise, an_empty_journal,
)  # fmt: skip


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_what_is_not_its_own_is_discarded(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, Path], dict[str, Any]],
) -> None:
    out = tmp_path / "x.gguf"
    interrupt(monkeypatch, model, out, after=9)
    options = change(model, out)
    recipe = options.pop("recipe", "q4_0")
    expected = lowbit.pack(model, recipe, tmp_path / "undisturbed.gguf", **options).path.read_bytes()
    capsys.readouterr()
    assert lowbit.pack(model, recipe, out, **options).path.read_bytes() == expected
    assert "going on" not in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial*"))


def test_a_torn_line_and_unknown_ones_are_cut_off(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = lowbit.pack(model, "q4_0", tmp_path / "undisturbed.gguf").path.read_bytes()
    out = tmp_path / "x.gguf"
    spoilt: dict[int, Callable[[bytes], bytes]] = {
        3: lambda text: text[:-5],
        4: lambda text: text + b'{"whole": "no such tensor"}\n',
        5: lambda text: text + b"\xff",
    }
    for whole, spoil in spoilt.items():
        interrupt(monkeypatch, model, out, after=max(4, whole))
        journal = journal_of(partial_of(out))
        journal.write_bytes(spoil(journal.read_bytes()))
        capsys.readouterr()
        interrupt(monkeypatch, model, out, after=2)
        assert f"going on, {whole} of" in capsys.readouterr().err
        assert whole_parts(out) == whole + 2
        assert lowbit.pack(model, "q4_0", out).path.read_bytes() == expected
        out.unlink()


def test_an_error_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        assert path == partial_of(tmp_path / "x.gguf")
        raise BadOption("no")

    with open_checkpoint(model) as checkpoint, pytest.raises(BadOption):
        types = dict.fromkeys(checkpoint.names, "f32")
        gguf_container.write(checkpoint, types, tmp_path / "x.gguf", file_type="f32", naive=True, check=refuse)
    assert not list(tmp_path.glob("x.gguf*"))


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    with open(journal_of(partial_of(out)), "w") as journal:
        assert files.lock(journal)
        with pytest.raises(BadOption, match=r"x\.gguf: another run is writing this file"):
            lowbit.pack(model, "q4_0", out)
    lowbit.pack(model, "q4_0", out)


def test_a_journal_removed_while_it_was_being_claimed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may finish between our opening of the journal and our lock on it."""
    out, real = tmp_path / "x.gguf", files.lock
    journal = journal_of(partial_of(out))
    removed = []

    def lock(handle: Any) -> bool:
        if not removed:
            removed.append(journal.unlink())
        return real(handle)

    monkeypatch.setattr(partial.files, "lock", lock)
    lowbit.pack(model, "q4_0", out)
    assert removed and [path.name for path in tmp_path.glob("x.gguf*")] == ["x.gguf"]


def test_where_files_have_one_position(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no reads and writes at an offset."""
    expected = lowbit.pack(model, "q4_0", tmp_path / "x.gguf").path.read_bytes()
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "pwrite")
    assert lowbit.pack(model, "q4_0", tmp_path / "y.gguf", threads=3).path.read_bytes() == expected


def test_ctrl_c_says_that_it_goes_on(model: Path, tmp_path: Path) -> None:
    """A real signal to the real command, as soon as five tensors are whole."""
    code = (
        "import os, signal, sys\n"
        "from lowbit.cli import main\n"
        "from lowbit.partial import Partial\n"
        "real, names = Partial.finish_part, []\n"
        "def finish_part(self, name):\n"
        "    real(self, name)\n"
        "    names.append(name)\n"
        "    if len(names) == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "Partial.finish_part = finish_part\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "x.gguf"
    words = [sys.executable, "-c", code, "pack", str(model), "-o", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "lowbit: interrupted; the same command goes on from here"
    assert partial_of(out).exists() and journal_of(partial_of(out)).exists() and not out.exists()
    done = subprocess.run([sys.executable, "-m", "lowbit", *words[3:]], capture_output=True, text=True, check=True)
    assert out.exists() and not partial_of(out).exists() and not journal_of(partial_of(out)).exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


FOLDERS = ["mlx", "compressed-tensors"]


def folder_killed_at(model: Path, out: Path, to: str, calls: int) -> bool:
    """``killed_at`` for a folder: at a system call that writes through Python."""
    child = os.fork()
    if not child:
        left = calls

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        for name in ("fsync", "replace", "mkdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        SafetensorsWriter.add_parts = counted(SafetensorsWriter.add_parts)  # type: ignore[method-assign]
        try:
            lowbit.pack(model, None, out, to=to, threads=1, certificate=True)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("to", FOLDERS)
def test_a_folder_killed_at_many_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Several shards; whatever a kill leaves, the next run ends with the same files and nothing beside them."""
    monkeypatch.setattr(partial, "_NOTE_EVERY", 0.0)
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 200_000)
    expected = files_of(lowbit.pack(model, None, tmp_path / "out", to=to, certificate=True).path)
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    shutil.rmtree(tmp_path / "out")
    out, seen = tmp_path / "out", set()
    calls = 1
    while folder_killed_at(model, out, to, calls):
        seen.add(whole_parts(out))
        lowbit.pack(model, None, out, to=to, certificate=True)
        assert files_of(out) == expected, calls
        left = {path.name for path in tmp_path.iterdir()} - {"out", "llama"}
        assert all(name.endswith(".old") for name in left), left  # killed between two names: ours, and never in the way
        shutil.rmtree(out)
        calls += 5 if calls < 21 else 17
    assert calls > 100 and len(seen) > 5


@pytest.mark.parametrize("to", FOLDERS)
def test_a_folder_goes_on_with_what_is_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Interrupted after ten tensors, the next run writes the others only; but not on top of something else."""
    monkeypatch.setattr(partial, "_NOTE_EVERY", 0.0)
    out, real, written = tmp_path / "out", PartialFolder.finish_part, list[str]()

    def finish_part(self: PartialFolder, name: str, *more: Any) -> None:
        real(self, name, *more)
        written.append(name)
        if stop_at == len(written):
            raise KeyboardInterrupt

    def begun(**options: Any) -> None:
        nonlocal stop_at
        written.clear()
        stop_at = 10
        with pytest.raises(KeyboardInterrupt):
            lowbit.pack(model, None, out, to=to, **options)
        stop_at = -1
        written.clear()

    stop_at = -1
    monkeypatch.setattr(PartialFolder, "finish_part", finish_part)
    lowbit.pack(model, None, out, to=to)
    expected, n = files_of(out), len(written)
    shutil.rmtree(out)
    begun()
    lowbit.pack(model, None, out, to=to)
    assert (len(written), files_of(out)) == (n - 10, expected)
    shutil.rmtree(out)
    # Cut short behind the journal's back, by one byte or by all; or begun under other options.
    for at in (-1, None):
        begun()
        [shard] = partial_of(out).glob("*.safetensors")
        size = shard.stat().st_size
        os.truncate(shard, size + at if at else 0)
        lowbit.pack(model, None, out, to=to)
        assert n - 10 < len(written) <= n
        assert files_of(out) == expected
        shutil.rmtree(out)
    begun(naive=True)
    lowbit.pack(model, None, out, to=to)
    assert (len(written), files_of(out)) == (n, expected)
    # What has the partial folder's name and no journal is not gone on with, and an error leaves nothing.
    shutil.rmtree(out)
    partial_of(out).mkdir()
    (partial_of(out) / "model.safetensors").write_bytes(b"x" * 100)
    lowbit.pack(model, None, out, to=to)
    assert files_of(out) == expected
    shutil.rmtree(out)
    monkeypatch.setattr(PartialFolder, "finish_part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lowbit.pack(model, None, out, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_two_runs_at_one_folder(model: Path, tmp_path: Path) -> None:
    with partial.resumable_folder(tmp_path / "x", (), {}, marker="y"), pytest.raises(BadOption, match="another run"):
        lowbit.pack(model, None, tmp_path / "x", to="mlx")
