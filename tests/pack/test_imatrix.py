"""llama.cpp's imatrix files: both forms, what they mean, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.pack import imatrix
from lowbit.pack.imatrix import Entry, Imatrix

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"


@pytest.fixture
def sample() -> Imatrix:
    rng = np.random.default_rng(0)
    entries = {
        DENSE: Entry(rng.random((1, 8), np.float32) * 900, np.array([1024])),
        EXPERTS: Entry(np.stack([rng.random(4), np.zeros(4), rng.random(4)]).astype(np.float32), np.array([3, 0, 700])),
    }
    return Imatrix(name="a.gguf", entries=entries, datasets=("a.txt", "b.txt"), chunk_count=2, chunk_size=512)


def write_by_gguf_py(path: Path, *, kind: str = "imatrix", size: object = 512, **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    if isinstance(size, int):
        writer.add_uint32("imatrix.chunk_size", size)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", ".in_sum2").replace("_n_", ".counts"), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack(f"<ii{len(values)}f", calls, len(values), *values)]
    return b"".join(parts) + tail


def test_gguf_holds_all_of_it(sample: Imatrix, tmp_path: Path) -> None:
    imatrix.write(sample, tmp_path / "a.gguf")
    back = imatrix.read(tmp_path / "a.gguf")
    assert (back.datasets, back.chunk_count, back.chunk_size) == (("a.txt", "b.txt"), 2, 512)
    assert back.sha256 == sample.sha256
    assert back.entries.keys() == sample.entries.keys()
    for name, entry in sample.entries.items():
        np.testing.assert_array_equal(back.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(back.entries[name].counts, entry.counts)


def test_gguf_is_laid_out_as_llama_cpp_reads_it(sample: Imatrix, tmp_path: Path) -> None:
    imatrix.write(sample, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # ggml's order: columns first
    assert shapes == {
        f"{DENSE}.in_sum2": [8], f"{DENSE}.counts": [1], f"{EXPERTS}.in_sum2": [4, 3], f"{EXPERTS}.counts": [1, 3],
    }  # fmt: skip


def test_importance_is_the_mean_and_1_of_an_expert_never_seen(sample: Imatrix) -> None:
    dense, experts = sample.importance(DENSE), sample.importance(EXPERTS)
    assert dense is not None and experts is not None
    assert dense.dtype == experts.dtype == np.float32
    np.testing.assert_array_equal(dense, sample.entries[DENSE].sums / np.float32(1024))
    np.testing.assert_array_equal(experts[1], 1)
    np.testing.assert_array_equal(experts[2], sample.entries[EXPERTS].sums[2] / np.float32(700))
    assert sample.importance("blk.9.attn_q.weight") is None
    assert sample.importance_of(EXPERTS, (3, 5, 4)) is not None


@pytest.mark.parametrize("form", imatrix.FORMATS)
def test_another_reader_finds_the_same(sample: Imatrix, tmp_path: Path, form: str) -> None:
    imatrix.write(sample, tmp_path / "a", format=form)
    theirs = libgguf.load_imatrix(tmp_path / "a")
    assert theirs.keys() == sample.entries.keys()
    for name, found in theirs.items():
        wanted = sample.importance(name)
        assert wanted is not None
        np.testing.assert_allclose(np.asarray(found).reshape(-1), wanted.reshape(-1), rtol=1e-6)


def test_dat_holds_the_means(sample: Imatrix, tmp_path: Path) -> None:
    imatrix.write(sample, tmp_path / "a.dat", format="dat")
    back = imatrix.read(tmp_path / "a.dat")
    assert (back.datasets, back.chunk_count, back.chunk_size) == (("b.txt",), 2, 0)
    for name, shape in ((DENSE, (1, 8)), (EXPERTS, (3, 5, 4))):
        found, wanted = back.importance_of(name, shape), sample.importance_of(name, shape)
        assert found is not None and wanted is not None
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_dat_is_read_as_it_is_written_by_hand(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 7, 5) + b"c.txt"
    (tmp_path / "a.dat").write_bytes(dat((b"x", 4, [8.0, 2.0]), (b"y", 0, [3.0]), tail=tail))
    back = imatrix.read(tmp_path / "a.dat")
    assert (back.datasets, back.chunk_count) == (("c.txt",), 7)
    np.testing.assert_array_equal(back.importance("x"), [[2.0, 0.5]])
    np.testing.assert_array_equal(back.importance("y"), [[3.0]])
    (tmp_path / "a.dat").write_bytes(dat((b"x", 4, [8.0, 2.0])))  # the tail may lack
    assert imatrix.read(tmp_path / "a.dat").datasets == ()


def test_combined_files_are_one_longer_run(sample: Imatrix, tmp_path: Path) -> None:
    imatrix.write(sample, tmp_path / "a.dat", format="dat")
    both = imatrix.combine([sample, sample], name="c", chunk_size=512)
    assert (both.chunk_count, both.datasets) == (4, ("a.txt", "b.txt") * 2)
    np.testing.assert_array_equal(both.entries[EXPERTS].counts, [6, 0, 1400])
    np.testing.assert_array_equal(both.entries[DENSE].sums, 2 * sample.entries[DENSE].sums)
    old = imatrix.combine([imatrix.read(tmp_path / "a.dat"), sample], name="c", chunk_size=512)
    np.testing.assert_allclose(old.entries[DENSE].sums, 2 * sample.entries[DENSE].sums, rtol=1e-6)
    assert old.entries[EXPERTS].counts.tolist() == [1024 + 3, 1024, 1024 + 700]
    other = Imatrix(name="b", entries={DENSE: Entry(np.ones((1, 9), np.float32), np.array([1]))},
                    datasets=(), chunk_count=0, chunk_size=512)  # fmt: skip
    with pytest.raises(BadFile, match=r"b: blk.0.attn_q.weight: of another size"):
        imatrix.combine([sample, other], name="c", chunk_size=512)
    huge = Imatrix(name="h", entries={DENSE: Entry(np.full((1, 8), 3e38, np.float32), np.array([1]))},
                   datasets=(), chunk_count=0, chunk_size=0)  # fmt: skip
    with pytest.raises(BadFile, match=r"h: blk.0.attn_q.weight: the sums are not all numbers"):
        imatrix.combine([huge], name="c", chunk_size=512)


def test_a_model_of_other_sizes_or_layers_is_refused(tiny_llama: Any) -> None:
    with open_checkpoint(tiny_llama()) as model:
        matrices = [spec for spec in model.specs.values() if spec.gguf_name.startswith("blk.") and len(spec.shape) == 2]
        entries = {s.gguf_name: Entry(np.ones((1, s.shape[1]), np.float32), np.array([1])) for s in matrices}

        def of(entries: dict[str, Entry]) -> Imatrix:
            return Imatrix(name="im", entries=entries, datasets=(), chunk_count=1, chunk_size=512)

        of(entries).check_model(model)
        of({k: v for k, v in entries.items() if "attn_k" not in k}).check_model(model)
        of(entries | {"output.weight": entries["blk.0.attn_q.weight"]}).check_model(model)
        wide = Entry(np.ones((1, 65), np.float32), np.array([1]))
        for changed, says in (
            (entries | {"blk.1.attn_q.weight": wide}, r"im: blk.1.attn_q.weight: .*found 65 values; expected 64"),
            (entries | {"blk.3.attn_q.weight": wide}, r"im: blk.3.attn_q.weight: .*has no such weight"),
            (entries | {"blk.0.attn_norm.weight": wide}, r"im: blk.0.attn_norm.weight: .*has no such weight"),
            ({k: v for k, v in entries.items() if "blk.2." not in k}, r"im: nothing of layer 2"),
        ):
            with pytest.raises(BadFile, match=says):
                of(changed).check_model(model)


ONE = np.ones(1, np.float32)
GGUFS: dict[str, tuple[dict[str, Any], str]] = {
    "of a model": ({"kind": "model", "x__": ONE, "x_n_": ONE}, "not an importance matrix; found general.type model"),
    "empty": ({}, "empty"),
    "no counts": ({"x__": ONE}, r"x.counts: not there as F32; found nothing"),
    "no sums": ({"x_n_": ONE}, r"x.in_sum2: not there as F32; found nothing"),
    "doubles": ({"x__": np.ones(1), "x_n_": ONE}, r"x.in_sum2: not there as F32; found F64"),
    "more counts than sums": ({"x__": ONE, "x_n_": np.ones(2, np.float32)}, "1 sums, 2 counts"),
    "NaN": ({"x__": ONE * np.nan, "x_n_": ONE}, "the sums are not all numbers from 0 on"),
    "negative": ({"x__": -ONE, "x_n_": ONE}, "the sums are not all numbers from 0 on"),
    "infinite count": ({"x__": ONE, "x_n_": ONE * np.inf}, "the counts are not all numbers from 0 on"),
    "impossible count": ({"x__": ONE, "x_n_": ONE * np.float32(1e20)}, "an impossible count"),
    "no chunk size": ({"size": None, "x__": ONE, "x_n_": ONE}, "imatrix.chunk_size: not a number"),
    "chunks of nothing": ({"size": 0, "x__": ONE, "x_n_": ONE}, "imatrix.chunk_size: not a number"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_hostile_gguf(tmp_path: Path, case: str) -> None:
    content, says = GGUFS[case]
    with pytest.raises(BadFile, match=says):
        imatrix.read(write_by_gguf_py(tmp_path / "a.gguf", **content))


GOOD = dat((b"x", 4, [8.0, 2.0]), tail=struct.pack("<ii", 7, 5) + b"c.txt")
DATS = {
    "empty": b"",
    "text": b"It is a truth universally acknowledged, that a single man",
    "no entries": struct.pack("<i", 0),
    "a negative number of entries": struct.pack("<i", -1) + GOOD[4:],
    "two thousand million entries": struct.pack("<i", 2**31 - 1) + GOOD[4:],
    "one entry more": struct.pack("<i", 2) + GOOD[4:],
    "a name of two gigabytes": GOOD[:4] + struct.pack("<i", 2**31 - 1) + GOOD[8:],
    "a name of a negative length": GOOD[:4] + struct.pack("<i", -8) + GOOD[8:],
    "two thousand million values": GOOD[:13] + struct.pack("<i", 2**31 - 1) + GOOD[17:],
    "a negative number of values": GOOD[:13] + struct.pack("<i", -2) + GOOD[17:],
    "no values": dat((b"x", 4, [])),
    "NaN": dat((b"x", 4, [float("nan")])),
    "negative": dat((b"x", 4, [-1.0])),
    "a dataset of two gigabytes": GOOD[:-9] + struct.pack("<i", 2**31 - 1) + b"c.txt",
}


@pytest.mark.parametrize("case", DATS)
def test_a_hostile_dat(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.dat").write_bytes(DATS[case])
    with pytest.raises(BadFile, match=r"a\.dat"):
        imatrix.read(tmp_path / "a.dat")


def test_any_prefix_of_a_file_is_refused_or_read_whole(sample: Imatrix, tmp_path: Path) -> None:
    imatrix.write(sample, tmp_path / "a.gguf")
    path = tmp_path / "b"
    for raw, rest in ((GOOD, 13), ((tmp_path / "a.gguf").read_bytes(), 31)):  # a tail and padding that may lack
        for end in range(0, len(raw) - rest, 7):
            path.write_bytes(raw[:end])
            with pytest.raises(BadFile):
                imatrix.read(path)


def test_what_is_no_file_and_no_format(sample: Imatrix, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        imatrix.read(tmp_path / "none")
    with pytest.raises(NotFound, match="cannot read"):
        imatrix.read(tmp_path)
    with pytest.raises(BadOption, match="'csv'; expected one of gguf, dat"):
        imatrix.write(sample, tmp_path / "a.csv", format="csv")
    assert not (tmp_path / "a.csv").exists()
