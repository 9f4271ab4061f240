"""A reference in a file: sequences to train on, and what the model says of each, made once for any number of trainings.

``lowbit reference MODEL -o FILE`` makes it, ``lowbit train MODEL --reference FILE`` trains by it. It is a
``lowbit.record_file``: after the header the token ids (n, length) int32, then of each sequence its positions' records
(``lowbit.compact``), at most 287 bytes each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lowbit import compact, files, record_file
from lowbit.errors import BadFile, BadOption
from lowbit.record_file import HINT
from lowbit.train.forms import Compact, Targets
from lowbit.train.reference import Ask

MAGIC = b"LOWBITTR"
FORMAT = "lowbit-training-reference/1"
_WHAT = "reference to train by"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file is of.

    model:       {"name", "sha256"}: of the file, or ``files.folder_sha256`` of the folder
    data:        {"name", "sha256"} of what --data named, both None where that was left out; sha256 None of a data set
    facts:       what a training's record says of its data
    n_vocab:     of the model
    start_token: id that every sequence begins with, None where the model has none
    length:      tokens a sequence
    sequences:   how many
    seed:        of the draws
    precision:   of the products
    """

    model: dict[str, Any]
    data: dict[str, Any]
    facts: dict[str, Any]
    n_vocab: int
    start_token: int | None
    length: int
    sequences: int
    seed: int
    precision: str

    def start(self) -> bytes:
        return record_file.start(MAGIC, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, handle: BinaryIO, path: Path) -> Header:
        """Raises BadFile."""
        values = record_file.read_header(handle, path, MAGIC, FORMAT, _WHAT)
        numbers = {"n_vocab": (2, 1 << 26), "length": (2, 1 << 24), "sequences": (1, 1 << 31), "seed": (0, 1 << 32)}
        kinds = {"model": dict, "data": dict, "facts": dict, "precision": str}
        record_file.check_header(values, path, numbers=numbers, token="start_token", kinds=kinds)
        return cls(**values)


class ReferenceFile:
    """A whole file, opened to train by.

    header; sequences: int32 (n, length). check: whether its checksum and all records are looked at.
    Raises NotFound where there is none, and BadFile for one that is damaged or lies about itself.
    """

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True) -> None:
        self.path = Path(path)
        with record_file.open_file(self.path, _WHAT) as handle:
            self.header = header = Header.read(handle, self.path)
            self.form = Compact(header.n_vocab, header.seed)
            n, length, size = header.sequences, header.length, self.form.layout.dtype.itemsize
            begin = handle.tell() + 4 * n * length
            end = begin + n * length * size
            record_file.check_size(handle, self.path, end)
            self.sequences = record_file.read_tokens(handle, self.path, (n, length), header.n_vocab)
            if check:
                record_file.check_digest(handle, self.path, end)
            handle.seek(end)
            self.sha256 = handle.read(record_file.DIGEST).hex()  # of all before
        self._records = np.memmap(self.path, np.uint8, "r", begin, (n, length, size))
        for row in range(n) if check else ():
            if wrong := compact.wrong(self.form.layout, self._records[row].view(self.form.layout.dtype)[:, 0]):
                raise BadFile("a record cannot be", where=self.path, found=f"{wrong} of sequence {row}", hint=HINT)

    def targets(self, rows: torch.Tensor, head: torch.Tensor | None, device: torch.device) -> Targets:
        return self.form.targets({"records": self._records[rows.cpu().numpy()]}, head, device)

    def check_belongs(self, *, model: str, length: int, start_token: int | None, data: str | None) -> None:
        """Raises BadOption where the file is of something else than a training of these.

        model: the SHA-256 of its model. data: as --data names it, None where it does not.
        """
        header = self.header
        if header.model.get("sha256") != model:
            found, expected = f"{header.model.get('name')} ({header.model.get('sha256')})", f"the model's own ({model})"
            raise BadOption("the reference is of another model", where=self.path, found=found, expected=expected)
        if header.length != length:
            hint = f"Try --sequence-length {header.length}"
            found = f"{header.length} tokens"
            raise BadOption(
                "its sequences are of another length", where=self.path, found=found, expected=length, hint=hint
            )
        if header.start_token != start_token:
            found, expected = (
                f"token {token}" if token is not None else "none" for token in (header.start_token, start_token)
            )
            raise BadOption("its start token is another", where=self.path, found=found, expected=expected)
        if data is not None and not _same(data_of(data), header.data):
            name = header.data.get("name")
            found = f"{name} ({header.data.get('sha256')})" if name else "text that comes with lowbit"
            hint = "Leave --data out: the file holds what is trained on"
            raise BadOption("the reference is of other data", where=self.path, found=found, expected=data, hint=hint)


def data_of(source: str | None) -> dict[str, Any]:
    """What identifies data, as ``Header.data`` holds it."""
    path = Path(source) if source is not None else None
    if path is None or not path.is_file():
        return {"name": source, "sha256": None}
    return {"name": path.name, "sha256": files.sha256(path)}


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """A file may have been renamed; of a data set there is nothing but the name."""
    if ours["sha256"] is not None:
        return bool(ours["sha256"] == theirs.get("sha256"))
    return ours == theirs


def digest_of(path: str | os.PathLike[str]) -> str:
    """What identifies a whole file, without reading all of it: its header, and its digest of all before the digest."""
    with record_file.open_file(Path(path), _WHAT) as handle:
        start = hashlib.sha256(Header.read(handle, Path(path)).start())
        handle.seek(-record_file.DIGEST, os.SEEK_END)
        start.update(handle.read())
    return start.hexdigest()


def make(
    path: Path, header: Header, sequences: np.ndarray, ask: Ask, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Asks the reference about the sequences and writes the file; what a run that was killed had done is not done
    again.

    advance: called with the number of sequences done. Raises what ``ask`` does, and CannotWrite, where another process
    is making the same file too.
    """
    beginning = header.start() + sequences.astype("<i4").tobytes()
    size = header.length * compact.Layout.of(header.n_vocab).dtype.itemsize

    def of_sequence(i: int) -> bytes:
        return ask(sequences[i : i + 1], i)["records"].numpy().tobytes()

    record_file.make(path, beginning, len(sequences), size, of_sequence, advance)
