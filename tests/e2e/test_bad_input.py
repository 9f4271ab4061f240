"""Bad input through the real command line: exit 2, one line that names the culprit, and nothing left or overwritten.

Most commands run in this process, which is quicker and the same code; what a process of its own adds is tested in one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit import console
from lowbit.cli import main
from lowbit.pack.imatrix import Entry, Imatrix
from lowbit.pack.imatrix import write as write_imatrix

VERBS = ("inspect", "pack", "measure", "train", "ship")
READERS = ("pack", "measure", "train", "ship")  # inspect shows what it cannot use, and says so under "problem"
MATRIX = "model.layers.0.mlp.down_proj.weight"
Edit = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    code: int
    out: str
    errors: str


@dataclass(frozen=True)
class Materials:
    """Good input: a model folder, the same as a GGUF, a text, and a place for output with room beside it."""

    folder: Path
    gguf: Path
    text: Path
    place: Path

    def words(self, verb: str, model: object, *more: object) -> list[str]:
        """A quick command line of ``verb`` on ``model``, its output under ``self.out(verb)``."""
        out = self.out(verb)
        little = ("--chunk", 64, "--chunks", 1, "--threads", 1, "--no-speed")
        words: dict[str, tuple[object, ...]] = {
            "inspect": (model, "--json", out),
            "pack": (model, "-o", out),
            "measure": (self.gguf, "--against", model, "--text", self.text, *little, "--json", out),
            "train": (model, "-o", out, "--minutes", 0.02, "--steps", 1),
            "ship": (model, "--out", out, "--minutes", 0.02, "--steps", 1, "--no-speed"),
        }
        return [str(word) for word in ("--quiet", verb, *words[verb], *more)]

    def out(self, verb: str) -> Path:
        return self.place / {"pack": "out.gguf", "train": "out", "ship": "out"}.get(verb, "out.json")


@pytest.fixture(scope="session")
def good_gguf(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    return lowbit.pack(byte_folder, "q4_0", path).path.read_bytes()


@pytest.fixture
def good(byte_folder: Path, good_gguf: bytes, tmp_path: Path) -> Materials:
    """Copies that a test may break."""
    shutil.copytree(byte_folder, tmp_path / "model")
    (tmp_path / "good.gguf").write_bytes(good_gguf)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 40, encoding="utf-8")
    (tmp_path / "place").mkdir()
    return Materials(tmp_path / "model", tmp_path / "good.gguf", tmp_path / "text.txt", tmp_path / "place")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no trace of --quiet in other tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield
    console.set_quiet(False)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[[list[str]], Done]:
    """call(words) runs one command line in this process, with what it writes captured at the file descriptors."""

    def run(words: list[str]) -> Done:
        capfd.readouterr()
        code = main(words)
        return Done(code, *capfd.readouterr())

    return run


def check_line(done: Done, *says: object) -> None:
    """Exit 2 and, on standard error alone, one line of ours that says every one of ``says``."""
    assert done.code == 2, done.errors
    assert done.out == ""
    assert "Traceback" not in done.errors
    assert done.errors.endswith("\n")
    [line] = done.errors.splitlines()
    assert line.startswith("lowbit: ") and line.isprintable() and len(line) < 1000
    missing = [str(word) for word in says if str(word) not in line]
    assert not missing, line


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(good: Materials, call: Callable[[list[str]], Done], verb: str, words: list[str], *says: object) -> None:
    """The command fails with such a line, into an empty place and over what an earlier command left, and adds nothing
    to either."""
    check_line(call(words), *says)
    assert snapshot(good.place) == {}
    out = good.out(verb)
    if out.suffix:
        out.write_bytes(b"earlier")
    else:
        out.mkdir()
        (out / "notes.txt").write_bytes(b"earlier")
    before = snapshot(good.place)
    check_line(call(words), *says)
    assert snapshot(good.place) == before


# Safetensors


def with_header(change: Callable[[dict[str, Any]], object]) -> Edit:
    """An edit of a safetensors file's header; the length before it follows."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit


def with_entry(**changes: Any) -> Edit:
    return with_header(lambda header: header[MATRIX].update(changes))


BAD_SAFETENSORS: dict[str, tuple[Edit, str]] = {
    "empty": (lambda data: b"", "not a safetensors file"),
    "cut in the length": (lambda data: data[:5], "not a safetensors file"),
    "cut in the header": (lambda data: data[:300], "does not fit"),
    "cut in the data": (lambda data: data[: len(data) // 2], "truncated"),
    "cut by a byte": (lambda data: data[:-1], "truncated"),
    "a byte too many": (lambda data: data + b"x", "bytes after the last tensor"),
    "a header of 2^63 bytes": (lambda data: struct.pack("<Q", 2**63) + data[8:], "9,223,372,036,854,775,808"),
    "a header shorter than it is": (lambda data: struct.pack("<Q", 40) + data[8:], "not JSON"),
    "a page of HTML": (lambda data: b"<!DOCTYPE html><html>Not found</html>", "does not fit"),
    "an offset past the end": (with_entry(data_offsets=[2**40, 2**40 + 64 * 160 * 4]), "leaves a hole"),
    "an offset on another tensor": (with_entry(data_offsets=[0, 64 * 160 * 4]), "overlaps"),
    "offsets backwards": (with_entry(data_offsets=[64, 0]), MATRIX),
    "a negative offset": (with_entry(data_offsets=[-4, 0]), MATRIX),
    "a size of 2^61": (with_entry(shape=[2**61, 2]), MATRIX),
    "a shape of more": (with_entry(shape=[64, 161]), MATRIX),
    "a dtype of fewer bytes": (with_entry(dtype="F16"), MATRIX),
    "an unknown dtype": (with_entry(dtype="Q9"), "unknown dtype; found 'Q9'"),
    "a name that steers the terminal": (
        with_header(lambda h: h.update({"x\n\x1b[2J\x07": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}})),
        "shape and byte count disagree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_safetensors(good: Materials, call: Callable[[list[str]], Done], case: str, verb: str) -> None:
    edit, says = BAD_SAFETENSORS[case]
    path = good.folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    where = path if MATRIX not in says else f"{path}: {MATRIX}"
    refused(good, call, verb, good.words(verb, good.folder), where, says)


# Shards

INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def sharded(good: Materials) -> Path:
    """The good folder with its tensors in two shards, every second one in the other."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(good.folder / "model.safetensors")
    (good.folder / "model.safetensors").unlink()
    weight_map = {}
    for i, shard in enumerate(SHARDS):
        names = sorted(tensors)[i::2]
        save_file({name: tensors[name] for name in names}, good.folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (good.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return good.folder


def with_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change to the index's map of tensors to shards."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def hold_it_twice(folder: Path) -> None:
    """Both shards hold MATRIX, of which the index can name one."""
    from safetensors.numpy import load_file, save_file

    tensors = [load_file(folder / shard) for shard in SHARDS]
    holder = next(i for i, held in enumerate(tensors) if MATRIX in held)
    save_file(tensors[1 - holder] | {MATRIX: tensors[holder][MATRIX] + 1}, folder / SHARDS[1 - holder])


def overlap(folder: Path) -> None:
    """In the second shard, one tensor's bytes are said to begin inside another's."""

    def change(header: dict[str, Any]) -> None:
        first, second, *_ = sorted((v for k, v in header.items() if k[0] != "_"), key=lambda v: v["data_offsets"])
        second["data_offsets"] = [offset - first["data_offsets"][1] + 4 for offset in second["data_offsets"]]

    path = folder / SHARDS[1]
    path.write_bytes(with_header(change)(path.read_bytes()))


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a shard missing": (lambda f: (f / SHARDS[1]).unlink(), SHARDS[1], "a shard is missing"),
    "a shard cut": (lambda f: os.truncate(f / SHARDS[1], 4000), SHARDS[1], ""),
    "a shard empty": (lambda f: os.truncate(f / SHARDS[0], 0), SHARDS[0], "not a safetensors file"),
    "the index missing": (lambda f: (f / INDEX).unlink(), SHARDS[1], "several .safetensors files and no"),
    "the index cut": (lambda f: os.truncate(f / INDEX, 40), INDEX, "not JSON with a weight_map"),
    "no map": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), INDEX, "not a map of tensors"),
    "a tensor in two shards": (hold_it_twice, MATRIX, "a shard holds a tensor that the index places elsewhere"),
    "tensors that overlap": (overlap, SHARDS[1], "overlaps another tensor"),
    "a tensor in the wrong shard": (
        with_map(lambda m: m.update({MATRIX: next(s for s in SHARDS if s != m[MATRIX])})), MATRIX, "its shard lacks",
    ),
    "a tensor in no shard": (with_map(lambda m: m.pop(MATRIX)), MATRIX, "a shard holds a tensor that the index places"),
    "a shard outside of the folder": (
        with_map(lambda m: m.update({MATRIX: "../model.safetensors"})), INDEX, "a file outside the folder",
    ),
    "a shard at the root": (
        with_map(lambda m: m.update({MATRIX: "/dev/zero.safetensors"})), INDEX, "a file outside the folder",
    ),
    "a shard that is a number": (with_map(lambda m: m.update({MATRIX: 1})), INDEX, "a file outside the folder"),
}  # fmt: skip


def test_good_shards(good: Materials, call: Callable[[list[str]], Done], sharded: Path) -> None:
    assert call(good.words("pack", sharded)).code == 0


@pytest.mark.parametrize("verb", ["inspect", "pack", "ship"])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_shards(good: Materials, call: Callable[[list[str]], Done], sharded: Path, case: str, verb: str) -> None:
    edit, where, says = BAD_SHARDS[case]
    edit(sharded)
    refused(good, call, verb, good.words(verb, sharded), sharded, where, says)


def set_values(folder: Path, change: Callable[[np.ndarray], object]) -> None:
    """Changes the float32 values of MATRIX in place."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8 : 8 + length])[MATRIX]["data_offsets"]
    values = np.frombuffer(data, "<f4", (end - begin) // 4, 8 + length + begin)
    change(values)
    path.write_bytes(data)


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_value_that_is_no_number(good: Materials, call: Callable[[list[str]], Done], value: float, verb: str) -> None:
    set_values(good.folder, lambda values: values.__setitem__(5000, value))
    words = good.words(verb, good.folder)
    says = (good.folder, MATRIX, "the weights are not finite; found", "expected finite numbers")
    if verb in ("pack", "measure"):
        refused(good, call, verb, words, *says)
    else:  # these have begun by then
        check_line(call(words), *says)
        assert not list(good.place.rglob("*.partial")) and not list(good.place.rglob("*.gguf"))
        assert not (good.out("train") / "model.safetensors").exists()


@pytest.mark.parametrize("verb", READERS)
def test_weights_that_are_integers(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    path = good.folder / "model.safetensors"
    path.write_bytes(with_entry(dtype="I32")(path.read_bytes()))
    check_line(call(good.words(verb, good.folder)), path, MATRIX, "found I32", "expected F32, F16 or BF16")
    assert not list(good.place.rglob("*.partial")) and not list(good.place.rglob("*.gguf"))


# config.json


def with_config(remove: str | None = None, **changes: Any) -> Edit:
    def edit(data: bytes) -> bytes:
        config = json.loads(data) | changes
        config.pop(remove, None)
        return json.dumps(config).encode()

    return edit


BAD_CONFIGS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "empty": (lambda data: b"", ("not valid JSON",)),
    "cut": (lambda data: data[:50], ("not valid JSON",)),
    "binary": (lambda data: bytes(range(256)), ("not valid JSON",)),
    "a list": (lambda data: b"[]", ("not a JSON object",)),
    "an unknown key": (with_config(residual_scale=0.5), ("unknown key residual_scale",)),
    "a missing key": (with_config(remove="num_hidden_layers"), ("missing key num_hidden_layers", "expected")),
    "no model_type": (with_config(remove="model_type"), ("missing key model_type",)),
    "text for a number": (with_config(hidden_size="64"), ("hidden_size", "found '64'", "expected")),
    "a list for a number": (with_config(vocab_size=[320]), ("vocab_size", "found [320]", "expected")),
    "a number for a truth value": (with_config(tie_word_embeddings=3), ("tie_word_embeddings", "found 3")),
    "a negative size": (with_config(intermediate_size=-160), ("intermediate_size", "found -160", "expected")),
    "another architecture": (
        with_config(architectures=["MambaForCausalLM"], model_type="mamba"),
        ("unsupported architecture", "found MambaForCausalLM", "expected one of", "LlamaForCausalLM"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config(good: Materials, call: Callable[[list[str]], Done], case: str, verb: str) -> None:
    edit, says = BAD_CONFIGS[case]
    path = good.folder / "config.json"
    path.write_bytes(edit(path.read_bytes()))
    refused(good, call, verb, good.words(verb, good.folder), path, *says)


@pytest.mark.parametrize("case", ["empty", "cut", "binary", "a list"])
def test_inspect_wants_json_too(good: Materials, call: Callable[[list[str]], Done], case: str) -> None:
    edit, says = BAD_CONFIGS[case]
    path = good.folder / "config.json"
    path.write_bytes(edit(path.read_bytes()))
    refused(good, call, "inspect", good.words("inspect", good.folder), path, *says)


def test_inspect_shows_what_lowbit_cannot_use(good: Materials, call: Callable[[list[str]], Done]) -> None:
    edit, says = BAD_CONFIGS["another architecture"]
    path = good.folder / "config.json"
    path.write_bytes(edit(path.read_bytes()))
    done = call(["inspect", str(good.folder), "--json", "-"])
    assert done.code == 0
    problem = json.loads(done.out)["problem"]
    assert all(word in problem for word in (str(path), *says))


@pytest.mark.parametrize("verb", VERBS)
def test_no_config(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    (good.folder / "config.json").unlink()
    refused(good, call, verb, good.words(verb, good.folder), good.folder, "expected config.json")


@pytest.mark.parametrize("verb", ["pack", "train", "ship"])
def test_rows_that_are_not_whole_blocks(
    good: Materials, call: Callable[[list[str]], Done], save_tiny_llama: Callable[..., Any], verb: str
) -> None:
    folder = good.place.parent / "rows-of-48"
    save_tiny_llama(folder, hidden_size=48, num_hidden_layers=1)
    words = good.words(verb, folder)
    says = ("model.embed_tokens.weight", "found rows of 48", "expected a multiple of 32", "--recipe f16")
    refused(good, call, verb, words, *says)


# GGUF


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def overwritten(after: bytes, skip: int, new: bytes) -> Edit:
    """``new`` over what stands ``skip`` bytes behind ``after``."""

    def edit(data: bytes) -> bytes:
        at = data.index(after) + len(after) + skip
        return data[:at] + new + data[at + len(new) :]

    return edit


HUGE = struct.pack("<Q", 2**62)
EMBEDDING = key("token_embd.weight")  # behind it: n_dims (4 bytes), two dims (8 each), type (4), offset (8)
TWICE = b"\x1b[2Jral.type"
BAD_GGUF: dict[str, tuple[Edit, str]] = {
    "empty": (lambda data: b"", "expected"),
    "another magic": (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    "cut in the version": (lambda data: data[:6], "ends inside the version"),
    "cut in the counts": (lambda data: data[:20], "tensor count"),
    "cut in a key": (lambda data: data[:40], "tensor count"),
    "cut in the vocabulary": (lambda data: data[:3000], "tokenizer.ggml.tokens"),
    "cut in the tensor table": (lambda data: data[: data.index(EMBEDDING) + 30], "ends inside token_embd.weight"),
    "cut in the data": (lambda data: data[: len(data) * 2 // 3], "truncated"),
    "cut by a byte": (lambda data: data[:-1], "output.weight: a tensor lies past the end of the file"),
    "a tensor count of 2^62": (overwritten(b"GGUF", 4, HUGE), "tensor count"),
    "a tensor too many": (overwritten(b"GGUF", 4, struct.pack("<Q", 22)), "tensor 21"),
    "a key count of 2^62": (overwritten(b"GGUF", 12, HUGE), "key count"),
    "a string of 2^62 bytes": (overwritten(key("general.name"), 4, HUGE), "general.name"),
    "a key of 2^62 bytes": (overwritten(b"GGUF", 20, HUGE), "key 0"),
    "an array of 2^62 items": (overwritten(key("tokenizer.ggml.tokens"), 8, HUGE), "tokenizer.ggml.tokens"),
    "a dimension of 2^62": (overwritten(EMBEDDING, 4, HUGE), "token_embd.weight"),
    "a product of 2^64": (overwritten(EMBEDDING, 4, struct.pack("<QQ", 2**32, 2**32)), "token_embd.weight"),
    "a dimension of 0": (overwritten(EMBEDDING, 12, bytes(8)), "token_embd.weight"),
    "five dimensions": (overwritten(EMBEDDING, 0, struct.pack("<I", 5)), "token_embd.weight"),
    "an offset past the end": (overwritten(EMBEDDING, 24, struct.pack("<Q", 2**40)), "token_embd.weight"),
    "an offset on another tensor": (overwritten(key("output_norm.weight"), 16, bytes(8)), "output_norm.weight"),
    "an unknown type": (overwritten(EMBEDDING, 20, struct.pack("<I", 777)), "unknown ggml type; found 777"),
    "an array of arrays": (overwritten(key("tokenizer.ggml.tokens"), 4, struct.pack("<I", 9)), "unknown value type"),
    "a word longer than the rest": (overwritten(key("tokenizer.ggml.tokens"), 16, HUGE), "tokenizer.ggml.tokens"),
    "a key that steers the terminal": (
        lambda data: data.replace(b"general.name", TWICE, 1).replace(b"general.type", TWICE, 1),
        "a key is empty, overlong or given twice; found  [2Jral.type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["inspect", "pack", "train", "ship"])
@pytest.mark.parametrize("case", BAD_GGUF)
def test_gguf(good: Materials, call: Callable[[list[str]], Done], case: str, verb: str) -> None:
    edit, says = BAD_GGUF[case]
    path = good.gguf.with_name("bad.gguf")
    path.write_bytes(edit(good.gguf.read_bytes()))
    refused(good, call, verb, good.words(verb, path), path, says)


@pytest.mark.parametrize("role", ["artifact", "reference"])
@pytest.mark.parametrize("case", list(BAD_GGUF)[:22:3])
def test_gguf_in_the_runtime(good: Materials, call: Callable[[list[str]], Done], case: str, role: str) -> None:
    edit, says = BAD_GGUF[case]
    path = good.gguf.with_name("bad.gguf")
    path.write_bytes(edit(good.gguf.read_bytes()))
    words = good.words("measure", path if role == "reference" else good.gguf)
    if role == "artifact":
        words[words.index(str(good.gguf))] = str(path)
    refused(good, call, "measure", words, path, says)


@pytest.mark.parametrize("verb", ["pack", "ship"])
def test_a_gguf_of_two_thousand_million_layers(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    edit = overwritten(key("llama.block_count"), 4, struct.pack("<I", 2**31 - 1))
    good.gguf.write_bytes(edit(good.gguf.read_bytes()))
    refused(good, call, verb, good.words(verb, good.gguf), good.gguf, "more layers than the file has tensors")


def test_gguf_in_chat(good: Materials, call: Callable[[list[str]], Done]) -> None:
    good.gguf.write_bytes(good.gguf.read_bytes()[:-1])
    check_line(call(["chat", str(good.gguf), "--prompt", "Hello"]), good.gguf, "output.weight", "truncated")


@pytest.mark.parametrize("verb", ["pack", "ship"])
def test_a_gguf_of_another_architecture(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    edit = overwritten(key("general.architecture"), 12, b"mamba")
    good.gguf.write_bytes(edit(good.gguf.read_bytes()))
    says = ("unsupported architecture; found mamba; expected one of", "llama")
    refused(good, call, verb, good.words(verb, good.gguf), good.gguf, *says)


# Certificates


@pytest.fixture
def proved(good: Materials) -> tuple[Path, Path]:
    """A packed file and the certificate beside it."""
    out = good.place.parent / "proved.gguf"
    lowbit.pack(good.folder, "q4_0", out, certificate=True)
    return out, out.with_name(out.name + ".certificate.json")


def with_stated(**changes: Any) -> Edit:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


BAD_CERTIFICATES: dict[str, tuple[Edit, str]] = {
    "empty": (lambda data: b"", "not valid JSON"),
    "cut": (lambda data: data[:-20], "not valid JSON"),
    "of another format": (with_stated(format="lowbit-run/1"), "not a certificate; found lowbit-run/1"),
    "of another file": (with_stated(artifact_sha256="0" * 64), "the certificate is of another file"),
    "of no file": (with_stated(artifact_sha256=[{}]), "the certificate is of another file"),
    "that claims more": (with_stated(totals={"blocks": 1, "exact": 1}), "the certificate does not say what is so"),
}


@pytest.mark.parametrize("case", BAD_CERTIFICATES)
def test_a_certificate(
    good: Materials, call: Callable[[list[str]], Done], proved: tuple[Path, Path], case: str
) -> None:
    (artifact, certificate), (edit, says) = proved, BAD_CERTIFICATES[case]
    certificate.write_bytes(edit(certificate.read_bytes()))
    before = snapshot(good.place.parent)
    words = ["pack", "--quiet", "--verify", str(artifact), "--source", str(good.folder)]
    check_line(call([*words, "--json", str(good.out("inspect"))]), certificate, says)
    assert snapshot(good.place.parent) == before


def test_a_certificate_after_the_file_was_changed(
    good: Materials, call: Callable[[list[str]], Done], proved: tuple[Path, Path]
) -> None:
    artifact, certificate = proved
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\0")
    before = snapshot(good.place.parent)
    words = [
        "pack",
        "--quiet",
        "--verify",
        str(artifact),
        "--source",
        str(good.folder),
        "--json",
        str(good.out("inspect")),
    ]
    check_line(call(words), certificate, "of another file, or the file was changed since", "Pack again")
    assert snapshot(good.place.parent) == before


# Texts

BAD_TEXTS: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing.txt": (None, ("expected",)),
    "empty.txt": (b"", ("empty",)),
    "bytes.txt": (bytes(range(128, 256)) * 10, ("UTF-8", "x80")),
    "nul.txt": (b"It is a truth\0" * 100, ("binary", "a NUL at")),
    "latin.txt": ("Es wäre schön. ".encode("latin-1") * 100, ("UTF-8", "xe4")),
    "short.txt": (b"It is a truth.", ("expected at least", "tokens")),
}


def bad_text(good: Materials, name: str) -> Path:
    path = good.text.with_name(name)
    content = BAD_TEXTS[name][0]
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_text_to_measure_on(good: Materials, call: Callable[[list[str]], Done], name: str) -> None:
    words = good.words("measure", good.gguf)
    path = bad_text(good, name)
    words[words.index(str(good.text))] = str(path)
    refused(good, call, "measure", words, path, *BAD_TEXTS[name][1])


@pytest.mark.parametrize("name", [name for name in BAD_TEXTS if name != "short.txt"])
def test_held_out_text(good: Materials, call: Callable[[list[str]], Done], name: str) -> None:
    path = bad_text(good, name)
    refused(good, call, "ship", good.words("ship", good.folder, "--text", path), path, *BAD_TEXTS[name][1])


def test_held_out_text_of_less_than_a_chunk(good: Materials, call: Callable[[list[str]], Done]) -> None:
    """Known once the tokenizer is there; still before any training."""
    path = bad_text(good, "short.txt")
    check_line(call(good.words("ship", good.folder, "--text", path)), path, *BAD_TEXTS["short.txt"][1])
    out = good.out("ship")
    assert {p.name for p in out.iterdir()} == {"reference.gguf", "naive-q4_0.gguf", "work"}
    assert not (out / "work" / "training").exists() and not list(out.rglob("*.partial"))


BAD_DATA: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "not-json.jsonl": (b'{"text": "a"}\n{nope\n', (", line 2", "not JSON")),
    "no-text.jsonl": (b'{"prompt": "a"}\n', (", line 1", "found prompt", "expected text or messages")),
    "empty.jsonl": (b"", ("too little text", "expected at least 512 tokens")),
    "not.parquet": (b"PAR1 and more", ("Parquet",)),
}


@pytest.mark.parametrize("name", [*BAD_TEXTS, *BAD_DATA])
def test_data_to_train_on(good: Materials, call: Callable[[list[str]], Done], name: str) -> None:
    if name in BAD_DATA:
        path, says = good.text.with_name(name), BAD_DATA[name][1]
        path.write_bytes(BAD_DATA[name][0])
    else:
        path, says = bad_text(good, name), BAD_TEXTS[name][1] if name != "missing.txt" else ("no such file",)
    check_line(call(good.words("train", good.folder, "--data", path)), path, *says)
    assert not good.out("train").exists() and not list(good.place.rglob("*.partial"))


@pytest.mark.parametrize("words", [["measure"], ["ship"], ["train"]], ids=str)
def test_a_folder_for_a_text(good: Materials, call: Callable[[list[str]], Done], words: list[str]) -> None:
    [verb] = words
    folder = good.place.parent
    if verb == "measure":
        line = good.words(verb, good.gguf)
        line[line.index(str(good.text))] = str(folder)
    else:
        line = good.words(verb, good.folder, "--text" if verb == "ship" else "--data", folder)
    check_line(call(line), folder, "expected", "text file")
    assert not good.out(verb).exists() and not list(good.place.rglob("*.partial"))


# What is not there


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no-such-model", "no such model; expected a folder, a .gguf file, a hub id like org/name, or one of"),
        ("no/such/model", "no such model"),
        ("no-such.gguf", "no such"),  # a model, or for measure a file
        ("no-such-org/no-such-model", "Check the name and the network"),
    ],
)
def test_no_such_model(good: Materials, call: Callable[[list[str]], Done], verb: str, model: str, says: str) -> None:
    refused(good, call, verb, good.words(verb, model), model, says)


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_without_a_model(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    folder = good.place.parent / "nothing"
    folder.mkdir()
    refused(good, call, verb, good.words(verb, folder), folder, "not a model folder; expected config.json or one")


@pytest.mark.parametrize("verb", READERS)
def test_a_file_of_another_kind(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    says = ("no runtime is known for this", "a GGUF") if verb == "measure" else ("not a GGUF file", "b'GGUF'")
    refused(good, call, verb, good.words(verb, good.text), good.text, *says, "found", "b'It i'")


def test_a_folder_for_an_artifact(good: Materials, call: Callable[[list[str]], Done]) -> None:
    empty = good.place.parent / "empty"
    empty.mkdir()
    words = good.words("measure", good.folder)
    words[words.index(str(good.gguf))] = str(empty)
    refused(good, call, "measure", words, empty, "no runtime is known for this", "an MLX or Hugging Face folder")


def test_an_artifact_of_another_vocabulary(
    good: Materials, call: Callable[[list[str]], Done], save_tiny_llama: Callable[..., Any]
) -> None:
    other = good.gguf.with_name("other.gguf")
    save_tiny_llama(good.place.parent / "other", vocab_size=352, num_hidden_layers=1)
    lowbit.pack(good.place.parent / "other", "q4_0", other)
    says = (good.gguf, "found 320 tokens", "expected 352 as in", other)
    refused(good, call, "measure", good.words("measure", other), *says)


# Where nothing can be written

UNWRITABLE = ["a file on the way", "a folder of that name", "/proc"]


@pytest.mark.parametrize("verb", ["inspect", "measure", "pack"])
@pytest.mark.parametrize("case", UNWRITABLE)
def test_no_place(good: Materials, call: Callable[[list[str]], Done], case: str, verb: str) -> None:
    out = {
        "a file on the way": good.text / "out",
        "a folder of that name": good.place / "folder",
        "/proc": Path("/proc/lowbit-out"),
    }[case]
    (good.place / "folder").mkdir()
    before = snapshot(good.place.parent)
    words = [word if word != str(good.out(verb)) else str(out) for word in good.words(verb, good.gguf)]
    check_line(call(words), f"{out}: cannot write: ", ". ")
    assert snapshot(good.place.parent) == before


@pytest.mark.parametrize("verb", ["train", "ship"])
def test_no_place_for_a_folder(good: Materials, call: Callable[[list[str]], Done], verb: str) -> None:
    out = good.text / "out"
    words = [word if word != str(good.out(verb)) else str(out) for word in good.words(verb, good.folder)]
    before = snapshot(good.place.parent)
    check_line(call(words), out, "cannot write: Not a directory. A part of the path is a file")
    assert snapshot(good.place.parent) == before


def test_the_current_folder_is_no_file(good: Materials, call: Callable[[list[str]], Done]) -> None:
    check_line(call(["--quiet", "pack", str(good.folder), "-o", "."]), ".: cannot write: Is a directory")


def test_a_folder_for_json_is_made(good: Materials, call: Callable[[list[str]], Done]) -> None:
    path = good.place / "new" / "found.json"
    assert call(["inspect", str(good.folder), "--json", str(path)]).code == 0
    assert json.loads(path.read_text(encoding="utf-8"))["architecture"] == "llama"


def without_privilege(words: list[str]) -> list[str]:
    """The command line such that permissions hold for root too."""
    command = [sys.executable, "-m", "lowbit", *words]
    if os.getuid() != 0:
        return command
    if not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and setpriv is not installed")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


def run(command: list[str], **more: Any) -> Done:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, **more)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("verb", ["inspect", "pack", "ship"])
def test_no_permission_to_write(good: Materials, verb: str) -> None:
    good.place.chmod(0o500)
    done = run(without_privilege(good.words(verb, good.folder)))
    good.place.chmod(0o700)
    check_line(done, good.out(verb), "cannot write: Permission denied. Choose a place you may write to")
    assert snapshot(good.place) == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_no_permission_to_read(good: Materials, name: str) -> None:
    path = good.folder / name
    path.chmod(0)
    done = run(without_privilege(good.words("pack", good.folder)))
    check_line(done, path, "Permission denied")
    assert snapshot(good.place) == {}


@contextlib.contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``n_bytes`` while the block runs: a write then fails as on a full disk. (Python ignores
    the signal.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], Path]]:
    """small_disk(folder, n_bytes) mounts a file system of that size at ``folder`` and gives it back."""
    mounted: list[Path] = []

    def mount(folder: Path, n_bytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "lowbit-test", str(folder)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("may not mount a file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an array may still map a file of it


KIB = 1024
# The verb, the bytes there are, and the file that no longer fits.
FULL = [
    ("inspect", KIB, "out.json"),
    ("measure", KIB, "out.json"),
    ("pack", 40 * KIB, "out.gguf"),
    ("ship", 300 * KIB, "out/reference.gguf"),
    ("train", 4 * KIB, "out.work/sequences.npy"),
]


def check_full(done: Done, good: Materials, name: str, reason: str) -> None:
    check_line(done, f"{good.place / name}: cannot write: ", reason, ". ")
    assert not (good.place / name).exists()
    assert not list(good.place.rglob("*.partial"))
    assert not (good.place / "out" / "model.safetensors").exists()


def words_for_full(good: Materials, verb: str) -> list[str]:
    """Training on the text, of which the sizes are known, not on what there was time to sample."""
    good.text.write_text("It is a truth universally acknowledged. " * 1500, encoding="utf-8")
    data = ("--data", good.text) if verb == "train" else ()
    return good.words(verb, good.gguf if verb == "measure" else good.folder, *data)


@pytest.mark.parametrize(("verb", "size", "name"), FULL)
def test_a_limit_on_file_sizes(
    good: Materials, call: Callable[[list[str]], Done], verb: str, size: int, name: str
) -> None:
    words = words_for_full(good, verb)
    with largest_file(size):
        done = call(words)
    check_full(done, good, name, "File too large" if verb != "train" else "Is the disk full?")


@pytest.mark.parametrize(("verb", "size", "name"), [*FULL, ("ship", 560 * KIB, "out/naive-q4_0.gguf")])
def test_a_full_disk(
    good: Materials,
    call: Callable[[list[str]], Done],
    small_disk: Callable[[Path, int], Path],
    verb: str,
    size: int,
    name: str,
) -> None:
    full = dataclasses.replace(good, place=small_disk(good.place / "disk", size + 8 * KIB))
    if size == KIB:  # less than a page: now nothing fits any more
        (full.place / "ballast").write_bytes(bytes(12 * KIB))
    done = call(words_for_full(full, verb))
    check_full(done, full, name, "No space left on device" if verb != "train" else "Is the disk full?")


def test_a_disk_that_is_full_when_training_ends(
    good: Materials, call: Callable[[list[str]], Done], small_disk: Callable[[Path, int], Path]
) -> None:
    """An earlier checkpoint in the folder is whole until the new one is."""
    out = small_disk(good.out("train"), 256 * KIB)
    (out / "lowbit.json").write_bytes(b"earlier")
    check_line(call(words_for_full(good, "train")), f"{out}/", ".safetensors: cannot write: No space left on device")
    assert snapshot(out) == {"lowbit.json": b"earlier"}


def test_an_earlier_file_survives_a_full_disk(good: Materials, call: Callable[[list[str]], Done]) -> None:
    out = good.out("pack")
    out.write_bytes(b"earlier")
    with largest_file(40 * KIB):
        check_line(call(good.words("pack", good.folder)), out, "File too large")
    assert snapshot(good.place) == {"out.gguf": b"earlier"}


# Words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["inspect"], "MODEL"),
        (["inspect", "{model}", "{model}"], "unrecognized arguments"),
        (["pack", "{model}"], "--out"),
        (["pack", "{model}", "-o", "{out}", "--recipe", "nosuch"], "found 'nosuch'; expected one of q4_0"),
        (["train", "{model}", "-o", "{out}", "--recipe", "nosuch"], "no such recipe; found 'nosuch'"),
        (["ship", "{model}", "--out", "{out}", "--recipe", "nosuch"], "no such recipe; found 'nosuch'"),
        (["ship", "{model}", "--out", "{out}", "--recipe", "int4_g32"], "GGUF lacks this format; found int4_g32"),
        (["ship", "{model}", "--out", "{out}", "--recipe", "f16"], "no low-bit weights to train; found f16"),
        (["ship", "{model}", "--out", "{out}", "--minutes", "0"], "--minutes: found '0'; expected a number of minutes"),
        (["ship", "{model}", "--out", "{out}", "--minutes", "abc"], "--minutes: found 'abc'; expected a number"),
        (["ship", "{model}", "--out", "{out}", "--minutes", "-3"], "--minutes"),
        (["train", "{model}", "-o", "{out}", "--minutes", "inf"], "--minutes: found 'inf'"),
        (["train", "{model}", "-o", "{out}", "--steps", "0"], "--steps: found '0'; expected a whole number from 1 up"),
        (["train", "{model}", "-o", "{out}", "--steps", "2.5"], "--steps: found '2.5'"),
        (["train", "{model}", "-o", "{out}", "--seed", "one"], "--seed"),
        (["train", "{model}", "-o", "{out}", "--start", "warm"], "--start: invalid choice: 'warm'"),
        (["measure", "{gguf}", "--text", "{text}", "--json", "{out}"], "--against"),
        (["measure", "{gguf}", "--against", "{gguf}", "--json", "{out}"], "--text"),
        ([*(measure := ["measure", "{gguf}", "--against", "{gguf}", "--text", "{text}", "--json", "{out}"]),
          "--chunks", "0"], "--chunks: found '0'; expected a whole number from 1 up"),
        ([*measure, "--chunk", "1"], "impossible chunk; found 1; expected at least 4"),
        ([*measure, "--chunk", "many"], "--chunk: found 'many'"),
        ([*measure, "--threads", "0"], "--threads: found '0'"),
        (["imatrix", "{gguf}", "-f", "{text}"], "-o/--out"),
        ([*(collect := ["imatrix", "{gguf}", "-f", "{text}", "-o", "{out}"]), "--chunks", "0"], "--chunks: found '0'"),
        ([*collect, "-c", "4"], "impossible context_size; found 4; expected at least 16"),
        ([*collect, "-c", "2048"], "the text is too short"),
        ([*collect, "--output-format", "csv"], "no such format of an imatrix; found 'csv'; expected one of gguf, dat"),
        ([*collect, "--in-file", "{text}"], "text.txt: neither a GGUF nor a .dat importance matrix"),
        (["imatrix", "{gguf}", "-f", "{gguf}", "-o", "{out}"], "this is a binary file"),
        (["imatrix", "{text}", "-f", "{text}", "-o", "{out}"], "not a GGUF file"),
        ([*(pack := ["pack", "{model}", "-o", "{out}"]), "--imatrix", "{out}.none"], "no such file"),
        ([*pack, "--imatrix", "{text}"], "text.txt: neither a GGUF nor a .dat importance matrix"),
        ([*pack, "--imatrix", "{gguf}", "--calibration", "{text}"], "header does not fit"),
        ([*pack, "--imatrix", "{gguf}"], "this GGUF is not an importance matrix; found general.type model"),
        (["pack", "--verify", "{gguf}", "--source", "{model}", "--imatrix", "{gguf}"], "--verify writes nothing"),
        ([*measure, "--kv-type", "q9"], "unknown KV cache type; found q9; expected f32, f16"),
        ([*measure, "--kv", "q9"], "unknown KV cache type; found q9; expected f32, f16"),
        ([*measure, "--kv", "q8_0:"], "unknown KV cache type; found q8_0:"),
        ([*measure, "--kv", "q8_0", "--contexts", "4096"], "longer than the model was trained for; found 4096 tokens"),
        ([*measure, "--kv", "q8_0", "--contexts", "1k"], "not whole numbers with commas between them: '1k'"),
        ([*measure, "--kv", "q8_0", "--contexts", "64"], "a context too short for its KV cache to matter; found 64"),
        ([*measure, "--kv", "q8_0", "--minutes", "0"], "impossible minutes; found 0.0; expected above 0"),
        ([*measure, "--kv", "q8_0", "--kv-limit", "-1"], "impossible limit; found -1.0"),
        ([*measure, "--contexts", "512"], "nothing takes these lengths or minutes"),
        ([*measure, "--retrieval", "--depths", "50,120"], "impossible depths; found (0.5, 1.2)"),
        ([*measure, "--speed-depths", "-1"], "impossible depths or slots"),
        ([*measure, "--slots", "0"], "impossible depths or slots"),
    ],
)  # fmt: skip
def test_bad_words(good: Materials, call: Callable[[list[str]], Done], words: list[str], says: str) -> None:
    names = {"model": good.folder, "gguf": good.gguf, "text": good.text, "out": good.place / "out"}
    check_line(call(["--quiet", *(word.format(**names) for word in words)]), says)
    assert snapshot(good.place) == {}


def test_an_imatrix_of_another_model(good: Materials, call: Callable[[list[str]], Done]) -> None:
    shapes = {"blk.0.attn_q.weight": 64, "blk.0.ffn_down.weight": 96}
    entries = {name: Entry(np.ones((1, n), np.float32), np.array([1])) for name, n in shapes.items()}
    other = Imatrix(name="", entries=entries, datasets=(), chunk_count=1, chunk_size=512)
    path = good.text.with_name("im.gguf")
    write_imatrix(other, path)
    says = ("im.gguf: blk.0.ffn_down.weight", "found 96 values", "expected 160", "lowbit imatrix makes one")
    refused(good, call, "pack", good.words("pack", good.folder, "--imatrix", path), *says)
    del entries["blk.0.ffn_down.weight"]
    write_imatrix(other, path)
    check_line(call(good.words("pack", good.folder, "--imatrix", path)), "im.gguf: nothing of layer 1")


# In a process of its own: what the shell sees


@pytest.mark.parametrize("verb", VERBS)
def test_the_exit_code_and_the_line_of_a_process(good: Materials, verb: str) -> None:
    path = good.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = run([sys.executable, "-m", "lowbit", *good.words(verb, good.folder)])
    check_line(done, path, "truncated; found", "expected at least")
    assert snapshot(good.place) == {}


def test_a_process_that_may_not_write_so_much(good: Materials) -> None:
    limit = (40 * KIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    command = [sys.executable, "-m", "lowbit", *good.words("pack", good.folder)]
    done = run(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    check_full(done, good, "out.gguf", "File too large")


def test_the_hub_offline_in_a_process(good: Materials) -> None:
    done = run([sys.executable, "-m", "lowbit", *good.words("inspect", "no-such-org/no-such-model")], cwd=good.place)
    check_line(done, "no-such-org/no-such-model", "Check the name and the network (HF_HUB_OFFLINE")
    assert snapshot(good.place) == {}
