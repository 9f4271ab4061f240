"""Every reader of files that strangers write, each on valid material that one case changes.

A case is bytes. They decide the reader, the material and the changes (``mutate``), so libFuzzer's own changes to them
explore, and a failing case repeats. What a reader must hold to is in ``run_case``: nothing but a LowbitError comes out,
that in one printable line; no warning; no more time than a second or two; no more memory than a multiple of the files.
"""

from __future__ import annotations

import io
import json
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import lowbit
from fuzzing import materials
from fuzzing.caches import reference_cache
from fuzzing.mutate import (
    Choices,
    gguf_pieces,
    mutate_bytes,
    mutate_json,
    mutate_pieces,
    mutate_safetensors,
)
from lowbit import report
from lowbit.checkpoint import Checkpoint, families, open_checkpoint
from lowbit.checkpoint.gguf_file import Field, GgufFile, TensorHead, write_header
from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.projector import open_projector
from lowbit.cli import tables
from lowbit.errors import BadConfig, BadFile, LowbitError
from lowbit.inspect import inspect
from lowbit.pack import certificate, imatrix, mmproj_types, tokenizer
from lowbit.pack.calibration import Calibration
from lowbit.release import lock as locks
from lowbit.release import templates
from lowbit.release.lock import Lock, Locked, Proof
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet
from lowbit.release.runner import run_checks
from lowbit.release.walk import hash_member
from lowbit.report import terminal, view

SLOWEST = 2.0  # seconds of CPU; the usual case takes milliseconds
PER_BYTE, CONSTANT = 64, 32 << 20  # of memory, over the bytes that the case's files have
_GGUFS = (*materials.CONFIGS, "llama-q8_0")
_TYPES = tuple(GGMLQuantizationType)
_STATIC = ("architecture", "context", "weights", "quantization", "vocabulary")


class Place:
    """A folder with the materials, of which a case changes a few files and puts them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        materials.make(folder / "good")
        self.good = {
            str(path.relative_to(folder / "good")): path.read_bytes()
            for path in sorted((folder / "good").rglob("*"))
            if path.is_file()
        }
        self.pieces = {name: gguf_pieces(self.good[f"{name}.gguf"]) for name in _GGUFS}
        self._changed: dict[Path, bytes | None] = {}

    def path(self, name: str) -> Path:
        return self.folder / "good" / name

    def put(self, name: str, data: bytes) -> Path:
        """Writes a file for this case, as a new one: what still maps the old one keeps it."""
        path = self.path(name)
        self._changed.setdefault(path, self.good.get(name))
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path

    @property
    def bytes_changed(self) -> int:
        return sum(path.stat().st_size for path in self._changed if path.exists())

    def restore(self) -> None:
        for path, data in self._changed.items():
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)
        self._changed.clear()


def _read_all(checkpoint: Checkpoint) -> None:
    """What pack and train do with an open checkpoint, but the writing."""
    for name in checkpoint.names:
        assert checkpoint.info(name).shape == checkpoint.read(name).shape
        checkpoint.blocks(name)
    _ = checkpoint.name, checkpoint.license, checkpoint.tied
    write_header(io.BytesIO(), checkpoint.family.metadata(checkpoint.config), [])
    fields = checkpoint.gguf_metadata()
    if fields is not None:
        write_header(io.BytesIO(), fields, [])


def _open_and_read(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        _read_all(checkpoint)


def _inspect(path: Path) -> None:
    found = inspect(path)
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    terminal.show_inspection(found, io.StringIO())
    tables.show_lattices(found["tensors"], io.StringIO())


def _pack(path: Path, out: Path, recipe: str | None = "q4_0", **options: Any) -> None:
    try:
        lowbit.pack(path, recipe, out, certificate=True, **options)
        GgufFile(out)
    except BaseException:
        assert not out.exists() and not list(out.parent.glob("*.partial")), "a refused file is on the disk"
        raise
    finally:
        out.unlink(missing_ok=True)
        certificate.path_beside(out).unlink(missing_ok=True)


def _towers(path: Path, place: Place, choices: Choices) -> None:
    """What a user does with towers: reads them all, or packs them."""
    if choices.below(4) == 0:
        _pack(path, place.folder / "out.gguf", choices.of(mmproj_types.RECIPES), mmproj=True)
        return
    with open_projector(path) as checkpoint:
        _read_all(checkpoint)


def _use(path: Path, place: Place, choices: Choices) -> None:
    """One of the things that a user does with a checkpoint."""
    which = choices.below(8)
    if which < 5:
        _open_and_read(path)
    elif which < 7:
        _inspect(path)
    else:
        _pack(path, place.folder / "out.gguf")


def gguf(place: Place, choices: Choices) -> None:
    """GGUF: counts, lengths, types, offsets and texts changed, in the file as it lies."""
    name = choices.of(_GGUFS)
    kind = choices.below(8)
    which = choices.below(2)
    data = (
        mutate_bytes(place.good[f"{name}.gguf"], choices) if kind == 7 else mutate_pieces(place.pieces[name], choices)
    )
    if choices.one_in(64):
        data = choices.rest()
    _use(place.put("x.gguf", data), place, choices) if which else GgufFile(place.put("x.gguf", data))


def gguf_laid_out_again(place: Place, choices: Choices) -> None:
    """GGUF: values, shapes and types changed, and the file laid out so that it holds together."""
    file = GgufFile(place.path(f"{choices.of(_GGUFS)}.gguf"))
    fields, heads = (
        list(file.fields),
        [TensorHead(name, entry.shape, int(GGMLQuantizationType[entry.dtype])) for name, entry in file.entries.items()],
    )
    for _ in range(1 + choices.below(4)):
        if choices.below(2):
            i = choices.below(len(fields))
            fields[i] = _other_value(fields[i], choices)
        else:
            i = choices.below(len(heads))
            heads[i] = _other_head(heads[i], choices)
    if choices.one_in(8):
        heads.pop(choices.below(len(heads)))
    if choices.one_in(8):
        heads.append(TensorHead(choices.of(("rope_freqs.weight", "extra")), (1 + choices.below(64),), 0))
    stream = io.BytesIO()
    offsets = write_header(stream, fields, heads)
    noise = choices.below(3)
    for head, offset in zip(heads, offsets, strict=True):
        stream.write(bytes(offset - stream.tell()))
        stream.write(choices.take(16) * (head.n_bytes // 16 + 1) if noise else bytes(head.n_bytes))
        stream.truncate(offset + head.n_bytes)
        stream.seek(0, io.SEEK_END)
    path = place.put("x.gguf", stream.getvalue())
    if choices.one_in(4):
        with open_checkpoint(place.path("llama")) as source:
            certificate.prove(path, source)
    else:
        _use(path, place, choices)


def _other_value(field: Field, choices: Choices) -> Field:
    numbers = (0, 1, 2, 3, 31, 32, 64, 10_000, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
    if field.key == "general.alignment":  # the writer here lays out by it
        return field._replace(value=choices.of((1, 8, 64)))
    if choices.one_in(6):
        return Field(choices.of(("general.alignment", "split.count", "llama.rope.freq_base", field.key)), 64, 4)
    if choices.one_in(6):
        return Field(field.key, [choices.of(numbers)] * choices.below(40), 9, 4)
    if field.type == 9:
        values = field.value[: choices.below(len(field.value) + 1)]
        return field._replace(value=values)
    if field.type == 8:
        return field._replace(value=choices.of(("", "none", "linear", "yarn", "llama", "\udcff", "a\nb", "x" * 999)))
    if field.type == 6:
        return field._replace(value=choices.of((0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45, 1e4)))
    return field._replace(value=choices.of((0, 1))) if field.type == 7 else Field(field.key, choices.of(numbers), 4)


def _other_head(head: TensorHead, choices: Choices) -> TensorHead:
    if choices.below(3) == 0:
        return TensorHead(choices.of(("rope_freqs.weight", "output.weight", "blk.1.attn_q.weight")), head.shape, 0)
    kind = choices.of(_TYPES)
    block = GGML_QUANT_SIZES[kind][0]
    if choices.below(2):
        shape = (*head.shape[:-1], -(-head.shape[-1] // block) * block)
    else:
        shape = (1 + choices.below(40), block) if choices.below(2) else (block,)
    return TensorHead(head.name, shape, int(kind))


def safetensors_file(place: Place, choices: Choices) -> None:
    """safetensors: the header's JSON, its length, the bytes; and what opens the folder around it."""
    folder = choices.of(("llama", "gemma3_whole", "qwen3", "llama3", "gemma4", "gemma4_moe", "gemma4_drafter"))
    name = f"{folder}/model.safetensors"
    path = place.put(name, mutate_safetensors(place.good[name], choices))
    if choices.below(2):
        _use(path.parent, place, choices)
    else:
        _inspect(path)


def shards(place: Place, choices: Choices) -> None:
    """A checkpoint in several files: the index, or one of the shards."""
    name = choices.of(("model.safetensors.index.json", "model-00001-of-00002.safetensors"))
    change = mutate_json if name.endswith("json") else mutate_safetensors
    path = place.put(f"shards/{name}", change(place.good[f"shards/{name}"], choices))
    _use(path.parent, place, choices)


def config(place: Place, choices: Choices) -> None:
    """config.json of every family, through everything that follows from it without weights, or with them."""
    name = f"{choices.of(tuple(materials.CONFIGS))}/config.json"
    path = place.put(name, mutate_json(place.good[name], choices))
    if choices.below(4) == 0:
        _use(path.parent, place, choices)
        return
    stated = read_json(path, BadConfig)
    family = families.by_config(stated, path)
    checked = family.text_config(stated, path)
    write_header(io.BytesIO(), family.metadata(checked), [])


def tokenizer_json(place: Place, choices: Choices) -> None:
    """tokenizer.json and tokenizer_config.json as GGUF key-values, written out."""
    good = json.dumps(materials.tokenizer(choices.of(("bytes", "split", "spm")))).encode()
    settings = json.dumps(materials.SETTINGS).encode()
    in_settings = choices.below(3) == 0
    path = place.put("llama/tokenizer.json", good if in_settings else mutate_json(good, choices))
    if in_settings:
        place.put("llama/tokenizer_config.json", mutate_json(settings, choices))
        if choices.one_in(4):
            place.put("llama/chat_template.jinja", choices.take(1 + choices.below(40)))
    if choices.one_in(16):
        _pack(path.parent, place.folder / "out.gguf")
        return
    spm_model = choices.of(("llama", "gemma4"))
    fields = tokenizer.metadata(path.parent, materials.CONFIGS["llama"], materials.VOCAB, spm_model=spm_model)
    write_header(io.BytesIO(), fields, [])


def trained(place: Place, choices: Choices) -> None:
    """A checkpoint that lowbit trained: lowbit.json, blocks.safetensors, metadata.gguf."""
    name = choices.of(("lowbit.json", "blocks.safetensors", "metadata.gguf"))
    good = place.good[f"trained/{name}"]
    if name == "lowbit.json":
        data = mutate_json(good, choices)
    elif name == "blocks.safetensors":
        data = mutate_safetensors(good, choices)
    else:
        data = mutate_pieces(gguf_pieces(good), choices)
    _use(place.put(f"trained/{name}", data).parent, place, choices)


def compressed(place: Place, choices: Choices) -> None:
    """compressed-tensors: the scheme in config.json, the parts of the matrices."""
    folder = choices.of(("compressed", "compressed_moe"))
    name = choices.of(("config.json", "model.safetensors"))
    change = mutate_json if name == "config.json" else mutate_safetensors
    _use(place.put(f"{folder}/{name}", change(place.good[f"{folder}/{name}"], choices)).parent, place, choices)


def mlx(place: Place, choices: Choices) -> None:
    """An MLX folder: what config.json says of the quantization, the parts of the matrices."""
    name = choices.of(("config.json", "model.safetensors"))
    change = mutate_json if name == "config.json" else mutate_safetensors
    _use(place.put(f"mlx/{name}", change(place.good[f"mlx/{name}"], choices)).parent, place, choices)


def towers(place: Place, choices: Choices) -> None:
    """A checkpoint's vision and audio towers: the config, the preprocessor's settings, the tensors; and an mmproj of
    them, verified."""
    folder = choices.of(tuple(materials.PROJECTORS))
    name = choices.of(("config.json", "preprocessor_config.json", "model.safetensors", "mmproj"))
    if name == "mmproj":
        data = mutate_pieces(gguf_pieces(place.good[f"{folder}.gguf"]), choices)
        path = place.put("x.gguf", data)
        if choices.below(2):
            _inspect(path)
        else:
            certificate.verify(path, place.path(folder))
        return
    change = mutate_safetensors if name.endswith("safetensors") else mutate_json
    _towers(place.put(f"{folder}/{name}", change(place.good[f"{folder}/{name}"], choices)).parent, place, choices)


def importance(place: Place, choices: Choices) -> None:
    """An importance matrix, as GGUF or .dat, read and checked against the model."""
    name = choices.of(("imatrix.gguf", "imatrix.dat"))
    good = place.good[name]
    if name.endswith("gguf") and choices.below(4):
        data = mutate_pieces(gguf_pieces(good), choices)
    else:
        data = mutate_bytes(good, choices)
    path = place.put(name, data)
    if choices.one_in(8):
        _pack(place.path("llama"), place.folder / "out.gguf", imatrix=path)
        return
    with open_checkpoint(place.path("llama")) as source:
        imatrix.read(path).check_model(source)


def calibration(place: Place, choices: Choices) -> None:
    """A calibration, opened for the model, and packed by."""
    model = choices.of(("llama", "gemma4_moe"))
    name = f"calibration-{model}.safetensors"
    good = place.good[name]
    # Few changes leave a file that is read; as it is it always is.
    path = place.put(name, good if choices.one_in(4) else mutate_safetensors(good, choices))
    if choices.one_in(4):
        budget = {"bits": choices.of((4.6, 9.0, 1e9))} if choices.one_in(3) else {}
        recipe = None if budget else "q4_0"
        _pack(place.path(model), place.folder / "out.gguf", recipe, calibration=path, **budget)
        return
    with open_checkpoint(place.path(model)) as source:
        Calibration(path, source)


def stated_certificate(place: Place, choices: Choices) -> None:
    """The certificate beside a file that is verified."""
    name = "llama.gguf.certificate.json"
    place.put(name, mutate_json(place.good[name], choices))
    if choices.below(8):
        certificate.stated_of(place.path("llama.gguf"))
    else:
        tables.show_certificate(
            certificate.verify(place.path("llama.gguf"), place.path("llama")).to_json(), io.StringIO()
        )


def run_record(place: Place, choices: Choices) -> None:
    """lowbit.json of a run, as the report's page and the terminal show it."""
    path = place.put("record/lowbit.json", mutate_json(place.good["record/lowbit.json"], choices))
    record = report.read_record(path.parent)
    view.build(record, path.parent)
    if choices.one_in(8):
        terminal.show(record, io.StringIO())
        report.render(record, path.parent)


def lock_file(place: Place, choices: Choices) -> None:
    """A lowbit.lock, read; what is read can be written and is read as the same."""
    whole, parts = hash_member(place.path("llama"))
    member = Locked(
        role="base", path="llama", container="safetensors", size=whole.size, sha256=whole.sha256, files=parts[:2]
    )
    proof = Proof(runtime="llama.cpp", version="1", date="2026-11-24", result="pass", checks=("tokenizer",))
    path = place.path("made.lock")
    locks.write(path, Lock(members=(member,), proved=(proof,), created="2026-11-24T00:00:00+00:00", lowbit="0.1.0"))
    good = path.read_bytes()
    path.unlink()
    lock = locks.read(place.put("x.lock", mutate_bytes(good, choices)))
    again = place.put("y.lock", b"")
    locks.write(again, lock)
    assert locks.read(again) == replace(lock, created=lock.created or locks.read(again).created, lowbit=lock.lowbit or
                                        locks.read(again).lowbit)  # fmt: skip


def release_set(place: Place, choices: Choices) -> None:
    """A base and a GGUF of it, one of their files changed, through the checks that run nothing."""
    name = choices.of(("llama/config.json", "llama/tokenizer.json", "llama/tokenizer_config.json", "llama.gguf"))
    if name.endswith("gguf"):
        place.put(name, mutate_pieces(place.pieces["llama"], choices))
    else:
        place.put(name, mutate_json(place.good[name], choices))
    base, artifact = place.path("llama"), place.path("llama.gguf")
    members = (
        Member(role="base", path=base, name="llama", container="safetensors"),
        Member(role="artifact", path=artifact, name="llama.gguf", container="gguf"),
        Member(role="tokenizer", path=base / "tokenizer.json", name="llama/tokenizer.json", container="text"),
    )
    verdicts = run_checks(ReleaseSet(place.path("."), members, None, None), _STATIC, quick=True)
    assert {verdict.name for verdict in verdicts} == set(_STATIC)
    assert all(verdict.detail.isprintable() and verdict.advice.isprintable() for verdict in verdicts)
    json.dumps([verdict.to_json() for verdict in verdicts], ensure_ascii=False).encode("utf-8")
    list(templates.of_file(artifact))
    if wrong := [verdict for verdict in verdicts if verdict.status == "fail"]:
        raise BadFile(wrong[0].detail)


READERS: dict[str, Callable[[Place, Choices], None]] = {
    reader.__name__: reader
    for reader in (
        gguf, gguf_laid_out_again, safetensors_file, shards, config, tokenizer_json, trained, compressed, mlx,
        towers, importance, calibration, reference_cache, stated_certificate, run_record,
        lock_file, release_set,
    )
}  # fmt: skip
# Of the cases, by how much of lowbit a reader reaches and how quick it is.
SHARES = {name: 8 for name in READERS} | {
    "stated_certificate": 1, "run_record": 1, "gguf_laid_out_again": 3, "trained": 3, "safetensors_file": 5,
    "mlx": 4, "towers": 6, "importance": 4, "calibration": 3, "reference_cache": 2, "lock_file": 2, "release_set": 3,
}  # fmt: skip


def run_case(reader: str, data: bytes, place: Place, *, memory: bool) -> str:
    """Runs one case and gives how it ended: 'read', or the name of the LowbitError. Raises AssertionError or whatever
    a reader should not have let out. ``memory``: count it; that takes three times as long."""
    begin = time.process_time()
    if memory:
        tracemalloc.start()
    ended = "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            READERS[reader](place, Choices(data))
    except LowbitError as error:
        ended, line = type(error).__name__, str(error)
        assert line.isprintable() and line.encode("utf-8"), line
    finally:
        seconds, size = time.process_time() - begin, place.bytes_changed
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        if memory:
            tracemalloc.stop()
        place.restore()
    assert seconds < SLOWEST, f"{seconds:.1f} s"
    assert peak < PER_BYTE * size + CONSTANT, f"{peak:,} bytes for files of {size:,}"
    return ended
