"""The reference in a file: measured from it, made in pieces, refused where it does not belong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import prose, write_tiny

from lowbit.errors import BadFile, BadOption, CannotWrite, NotFound
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.reference_cache import Header, ReferenceCache
from lowbit.run.llama_cpp import LlamaCpp

FAST = MeasureOptions(chunk=64, threads=1, speed=False, memory=False, cache_error=0.01)


def run(folder: Path, *names: str, options: MeasureOptions = FAST, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"against": folder / "reference.gguf", "text": folder / "text.txt", **changes}
    return measure([folder / name for name in names], options=options, **arguments)


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "reference.cache"
    run(folder, "good.gguf", reference_cache=path)
    return path


def test_figures_from_a_cache_are_those_without(folder: Path, cache: Path) -> None:
    exact = run(folder, "good.gguf", "bad.gguf")
    found = run(folder, "good.gguf", "bad.gguf", reference_cache=cache)
    assert found["reference"]["perplexity"] == exact["reference"]["perplexity"]
    assert found["reference"]["sha256"] == exact["reference"]["sha256"]
    assert found["reference"]["cache"]["path"] == str(cache)
    for one, other in zip(exact["artifacts"], found["artifacts"], strict=True):
        for name in ("perplexity", "top1", "rms_delta_p", "tokens"):
            assert other["fidelity"][name] == pytest.approx(one["fidelity"][name])
        kld, kept = one["fidelity"]["kld_mean"]["value"], other["kld_from_cache"]
        assert abs(other["fidelity"]["kld_mean"]["value"] - kld) <= kept["error"]
        assert kept["certain_low"] <= kld <= kept["certain_high"]
        assert kept["within"] == (kept["error"] <= 0.01)
        assert "kld_from_cache" not in one
    strict = MeasureOptions(chunk=64, threads=1, speed=False, memory=False, cache_error=1e-9)
    assert (
        run(folder, "bad.gguf", reference_cache=cache, options=strict)["artifacts"][0]["kld_from_cache"]["within"]
        is False
    )


def test_the_reference_is_not_needed_once_the_cache_is_there(folder: Path, cache: Path, tmp_path: Path) -> None:
    with_it = run(folder, "good.gguf", reference_cache=cache)
    without = run(folder, "good.gguf", against=None, reference_cache=cache)
    assert without["artifacts"] == with_it["artifacts"]
    assert without["reference"]["sha256"] == with_it["reference"]["sha256"]
    with pytest.raises(BadOption, match="not there"):
        run(folder, "good.gguf", against=None, reference_cache=tmp_path / "absent.cache")
    with pytest.raises(BadOption, match="needs a reference"):
        run(folder, "good.gguf", against=None)


def test_the_same_inputs_give_the_same_file_on_any_number_of_threads(folder: Path, cache: Path, tmp_path: Path) -> None:
    options = MeasureOptions(chunk=64, threads=2, speed=False, memory=False)
    run(folder, "good.gguf", reference_cache=tmp_path / "again.cache", options=options)
    assert (tmp_path / "again.cache").read_bytes() == cache.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_stopped_goes_on(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    logits = LlamaCpp.logits

    def stopping(self: LlamaCpp, tokens: np.ndarray, start: int = 0) -> Any:
        ran.append(1)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return logits(self, tokens, start)

    monkeypatch.setattr(LlamaCpp, "logits", stopping)
    path = tmp_path / "reference.cache"
    with pytest.raises(KeyboardInterrupt):
        run(folder, "good.gguf", reference_cache=path)
    assert not path.exists()
    going = path.with_name("reference.cache.partial")
    with open(going, "ab") as handle:
        handle.write(b"half a record")
    with ReferenceCache(cache) as whole:
        chunks = whole.header.chunks
    run(folder, "good.gguf", reference_cache=path)
    assert len(ran) == 4 + (chunks - 3) + chunks  # three chunks were not run again; then the artifact
    assert path.read_bytes() == cache.read_bytes()
    assert not going.exists()


def test_what_another_run_left_is_not_gone_on_with(folder: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "reference.cache"
    path.with_name("reference.cache.partial").write_bytes(b"something else")
    run(folder, "good.gguf", reference_cache=path)
    assert path.read_bytes() == cache.read_bytes()


def test_two_processes_do_not_make_one_file(folder: Path, tmp_path: Path) -> None:
    from lowbit import files

    path = tmp_path / "reference.cache"
    with open(path.with_name("reference.cache.partial"), "wb") as other:
        assert files.lock(other)
        with pytest.raises(CannotWrite, match="another process"):
            run(folder, "good.gguf", reference_cache=path)


def test_a_part_of_the_text_can_be_measured(folder: Path, cache: Path, tmp_path: Path) -> None:
    few = MeasureOptions(chunk=64, chunks=3, threads=1, speed=False, memory=False)
    assert run(folder, "good.gguf", reference_cache=cache, options=few)["text"]["chunks"] == 3
    run(folder, "good.gguf", reference_cache=tmp_path / "few.cache", options=few)
    with pytest.raises(BadFile, match="fewer chunks"):
        run(folder, "good.gguf", reference_cache=tmp_path / "few.cache")


def test_a_cache_that_does_not_belong_is_refused_and_left_alone(folder: Path, cache: Path, tmp_path: Path) -> None:
    before = cache.read_bytes()
    (tmp_path / "other.txt").write_text(prose(2000, seed=1), encoding="utf-8")
    write_tiny(tmp_path / "wider.gguf", extra_tokens=5)
    halves = MeasureOptions(chunk=32, threads=1, speed=False, memory=False)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("another reference", {"against": folder / "bad.gguf"}),
        ("another text", {"text": tmp_path / "other.txt"}),
        ("other chunks", {"options": halves}),
    ]
    for said, changes in cases:
        with pytest.raises(BadFile, match=said) as error:
            run(folder, "good.gguf", reference_cache=cache, **changes)
        assert "Remove it or name another file" in str(error.value)
    with pytest.raises(BadFile, match="vocabulary"):
        measure(tmp_path / "wider.gguf", text=folder / "text.txt", reference_cache=cache, options=FAST)
    assert cache.read_bytes() == before


def test_a_cache_of_another_version_of_the_runtime_is_refused(folder: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "older.cache"
    _with_header(cache, path, lambda header: header["reference"]["runtime"].update(version="2025.1.0"))
    with pytest.raises(BadFile, match="another version"):
        run(folder, "good.gguf", reference_cache=path)


def test_damaged_files_are_refused(cache: Path, tmp_path: Path) -> None:
    whole = cache.read_bytes()
    path = tmp_path / "bad.cache"
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for raw, said in (
        (b"", "not a reference cache"),
        (b"GGUF" + whole[4:], "not a reference cache"),
        (whole[:-1], "truncated"),
        (whole + b"\0", "truncated or too long"),
        (bytes(changed), "checksum"),
        (whole[:8] + b"\xff\xff\xff\xff" + whole[12:], "header is too long"),
        (whole[:12] + b"x" + whole[13:], "not JSON"),
    ):
        path.write_bytes(raw)
        with pytest.raises(BadFile, match=said) as error:
            ReferenceCache(path)
        assert "\n" not in str(error.value)
    with pytest.raises(NotFound):
        ReferenceCache(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_vocab", 1 << 40), ("n_vocab", "3"), ("chunk", 0), ("chunks", 1 << 62), ("bos", -1), ("text", 3), ("more", 1)],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(
    name: str, value: Any, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lying.cache"
    _with_header(cache, path, lambda header: header.update({name: value}))
    with pytest.raises(BadFile):
        ReferenceCache(path)


def _with_header(cache: Path, path: Path, change: Any) -> None:
    """The cache with another header and a checksum that is right again."""
    whole = cache.read_bytes()
    length = int.from_bytes(whole[8:12], "little")
    header = json.loads(whole[12 : 12 + length])
    change(header)
    text = json.dumps(header, sort_keys=True, ensure_ascii=False).encode()
    body = whole[:8] + len(text).to_bytes(4, "little") + text + whole[12 + length : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


def test_the_header_says_what_it_is_of(cache: Path, folder: Path) -> None:
    with ReferenceCache(cache) as opened:
        header = opened.header
        assert header == Header.read(open(cache, "rb"), cache)  # noqa: SIM115
        assert header.text["name"] == "text.txt"
        assert header.reference["runtime"]["name"] == "llama.cpp"
        assert header.settings == {}
        assert opened.bytes_a_token <= 300 + 2000 / (header.chunks * header.scored)


def test_the_command_line(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lowbit.cli import main

    words = ["measure", str(folder / "good.gguf"), "--text", str(folder / "text.txt"), "--chunk", "64", "--no-speed"]
    assert main([*words, "--threads", "1", "--reference-cache", str(cache)]) == 0
    assert "the reference cache moves its mean KLD" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 2
    assert "--against" in capsys.readouterr().err
