"""Changes to valid files, each decided by a byte of the fuzzer's input, so that any input is a case and repeats."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

SIZES = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1000, 10_000, 65_535, 65_536, 2**20,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**47, 2**48, 2**59, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
NAMES = (
    "q4_0", "q8_0", "q6_k", "f32", "bf16", "BF16", "F32", "U8", "I64", "default", "linear", "llama3", "bytes",
    "Sequence", "Split", "ByteLevel", "Metaspace", "Replace", "TemplateProcessing", "BPE", "weight", "extra",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 6, -1, 31, 32, 64, 10_000, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400, 0.5, -0.0,
    1e-300, 1e300, float("nan"), float("inf"), "", " ", "a", "a b c", "\ud800", "a\x00b", "../a", "/", "é" * 40,
    "x" * 300, [], {}, [[]], [{}], [0], ["a"], {"a": []}, {"type": "Sequence"}, [None] * 40,
)  # fmt: skip
_DEEP = 1500


class Choices:
    """The fuzzer's bytes as decisions; past their end every decision is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        width = 1 if n <= 256 else 2 if n <= 65_536 else 4
        return int.from_bytes(self.take(width), "little") % n

    def one_in(self, n: int) -> bool:
        return self.below(n) == n - 1

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]

    def take(self, n: int) -> bytes:
        """n bytes, zeros past the end."""
        part = self._data[self._at : self._at + n]
        self._at += n
        return part + bytes(n - len(part))

    def rest(self) -> bytes:
        part, self._at = self._data[self._at :], len(self._data)
        return part


def mutate_bytes(data: bytes, choices: Choices) -> bytes:
    """One change that knows nothing of what the bytes mean."""
    at = choices.below(len(data) + 1)
    span = min(choices.below(64), len(data) - at)
    kind = choices.below(6)
    if kind == 0:
        return data[:at] + choices.take(1 + choices.below(8)) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + span :]
    if kind == 3:
        other = choices.below(len(data) + 1)
        return data[:at] + data[other : other + span] + data[at:]
    if kind == 4:
        return data[:at] + choices.take(1 + choices.below(16)) + data[at:]
    width = choices.of((1, 2, 4, 8))
    number = choices.of(SIZES) & (1 << 8 * width) - 1
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def mutate_pieces(pieces: list[bytes], choices: Choices) -> bytes:
    """A file in its parts (a count, a length, a name, ...): up to four of them changed, moved, repeated or left out."""
    pieces = list(pieces)
    for _ in range(1 + choices.below(4)):
        i = choices.below(len(pieces))
        kind, piece = choices.below(8), pieces[i]
        if kind < 4 and len(piece) in (4, 8):
            width = len(piece)
            number = choices.of(SIZES) if kind < 3 else int.from_bytes(piece, "little") + choices.below(9) - 4
            pieces[i] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind < 5:
            pieces[i] = mutate_bytes(piece, choices)
        elif kind == 5:
            pieces[i] = pieces[choices.below(len(pieces))]
        elif kind == 6:
            pieces.insert(i, pieces[choices.below(len(pieces))])
        else:
            pieces = (pieces[:i] + pieces[i + 1 :] if choices.below(4) else pieces[:i]) or [b""]
    return b"".join(pieces)


def mutate_json(text: bytes, choices: Choices) -> bytes:
    """JSON with up to four values replaced, left out, renamed or put elsewhere, and sometimes a byte changed."""
    root = [json.loads(text)]
    for _ in range(1 + choices.below(4)):
        holders = [holder for holder in _walk(root) if holder]
        holder = choices.of(holders)
        key = choices.of(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = choices.below(9)
        if kind < 4:
            holder[key] = copy.deepcopy(choices.of(VALUES))
        elif kind == 4:
            other = choices.of(holders)
            taken = choices.of(list(other.values()) if isinstance(other, dict) else other)
            holder[key] = copy.deepcopy(taken)
        elif kind == 5 and (holder is not root or len(root) > 1):
            del holder[key]
        elif kind == 6:
            name = choices.of(NAMES)
            if isinstance(holder, dict) and choices.below(2):
                holder[name] = holder.pop(key)
            else:
                holder[key] = name
        elif kind == 7:
            holder[key] = choices.of(SIZES)
        else:
            holder[key] = [holder[key]] if choices.below(2) else {"type": holder[key]}
        if not root:
            root = [None]
    text = json.dumps(root[0]).encode()
    if choices.one_in(16):
        text = choices.of((b"[" * _DEEP, b'{"a":' * _DEEP, b'{"type":"Sequence","normalizers":[' * (_DEEP // 4))) + text
    return mutate_bytes(text, choices) if choices.one_in(6) else text


def _walk(value: Any) -> list[Any]:
    """Every list and object in ``value``, itself first."""
    found, i = [value], 0
    while i < len(found):
        inner = found[i].values() if isinstance(found[i], dict) else found[i]
        found += [v for v in inner if isinstance(v, list | dict)]
        i += 1
    return found


def gguf_pieces(data: bytes) -> list[bytes]:
    """A valid GGUF cut at its counts, lengths, names, types and offsets; the tensors' bytes are the last piece."""
    pieces: list[bytes] = []
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        pieces.append(data[at : at + n])
        at += n
        return pieces[-1]

    def number(n: int) -> int:
        return int.from_bytes(take(n), "little")

    def value(kind: int) -> None:
        if kind == 9:
            kind, n = number(4), number(8)
            for _ in range(n):
                value(kind)
        else:
            take(number(8) if kind == 8 else {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 10: 8, 11: 8, 12: 8}.get(kind, 4))

    take(4), take(4)
    n_tensors, n_fields = number(8), number(8)
    for _ in range(n_fields):
        take(number(8))
        value(number(4))
    for _ in range(n_tensors):
        take(number(8))
        for _ in range(number(4)):
            take(8)
        take(4), take(8)
    take(len(data) - at)
    return pieces


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A .safetensors file of a header and tensors' bytes; ``length`` is what it says of its header."""
    return struct.pack("<Q", (len(header) if length is None else length) & 2**64 - 1) + header + data


def mutate_safetensors(file: bytes, choices: Choices) -> bytes:
    """A change to the header's JSON, to its length, or to the bytes."""
    (length,) = struct.unpack("<Q", file[:8])
    header, data = file[8 : 8 + length], file[8 + length :]
    kind = choices.below(6)
    if kind < 4:
        return safetensors(mutate_json(header, choices), data)
    if kind == 4:
        return safetensors(header, data, choices.of(SIZES) if choices.below(2) else length + choices.below(9) - 4)
    return mutate_bytes(file, choices)
