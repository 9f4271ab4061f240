"""The held-out text as token ids, read and tokenized piecewise."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lowbit.errors import BadOption, BadText, NotFound
from lowbit.units import MIB

_PIECE = MIB
_PROSE = "Give a file with some prose in it"
_SEAM = 256  # characters on each side of a cut that are tokenized both ways


class Tokenizer(Protocol):
    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Text:
    """path, its sha256 (hex) and the ids of its tokens, int32 (n,)."""

    path: Path
    sha256: str
    ids: np.ndarray


def read_text(path: str | os.PathLike[str], tokenizer: Tokenizer) -> Text:
    """Tokenizes a UTF-8 file as one text, special tokens as the tokenizer adds them, none parsed from the text.

    The file is read and tokenized a piece at a time, so only its ids (four bytes a token) are held whole.
    Raises NotFound; BadText for an empty or binary file.
    """
    path = Path(path)
    digest = hashlib.sha256()
    ids: list[np.ndarray] = []
    for text in _joinable(_decoded(path, digest), tokenizer):
        ids.append(np.array(tokenizer.tokenize(text, add_special=not ids), np.int32))
    if not ids:
        raise BadText("the text is empty", where=path, expected="UTF-8 text", hint=_PROSE)
    return Text(path=path, sha256=digest.hexdigest(), ids=np.concatenate(ids))


def check_text(path: str | os.PathLike[str]) -> None:
    """Raises NotFound or BadText where ``read_text`` would, without a model: before hours are spent."""
    path = Path(path)
    if not any(piece.strip() for piece in _decoded(path, hashlib.sha256())):
        raise BadText("the text is empty", where=path, expected="UTF-8 text", hint=_PROSE)


def _decoded(path: Path, digest: hashlib._Hash) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open(path, "rb") as handle:
            while True:
                raw = handle.read(_PIECE)
                digest.update(raw)
                if (nul := raw.find(b"\0")) >= 0:
                    raise BadText(
                        "this is a binary file",
                        where=path,
                        found=f"a NUL at byte {offset + nul}",
                        expected="UTF-8 text",
                        hint=_PROSE,
                    )
                try:
                    text = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    raise BadText(
                        "the text is not UTF-8",
                        where=path,
                        found=f"{error.object[error.start : error.start + 4]!r} near byte {offset + error.start}",
                        hint="Convert it, for example with iconv",
                    ) from None
                offset += len(raw)
                if text:
                    yield text
                if not raw:
                    return
    except FileNotFoundError:
        raise NotFound("no such text file", where=path, expected="a UTF-8 text file") from None
    except OSError as error:
        what = "the text cannot be read"
        raise BadText(what, where=path, found=error.strerror, expected="a UTF-8 text file") from None


def _joinable(pieces: Iterator[str], tokenizer: Tokenizer) -> Iterator[str]:
    """Cuts the stream where cutting changes no token; a piece with no such place is joined to the next."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) >= _PIECE // 2 and (cut := _seam(held, tokenizer)):
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _seam(text: str, tokenizer: Tokenizer) -> int:
    """The last line start where both sides tokenize as they do together; 0 where none was found.

    A line start: after a break and before something that is not white space, for a run of breaks may be one token.
    """
    at = len(text) - _SEAM
    for _ in range(16):
        at = text.rfind("\n", 0, at) + 1
        if at < _SEAM:
            return 0
        if text[at].isspace():
            at -= 1
            continue
        left, right = text[at - _SEAM : at], text[at : at + _SEAM]
        together = tokenizer.tokenize(left + right, add_special=False)
        if together == tokenizer.tokenize(left, add_special=False) + tokenizer.tokenize(right, add_special=False):
            return at
        at -= 1
    return 0


def chunks_of(text: Text, *, chunk: int, limit: int | None, bos: int | None) -> np.ndarray:
    """The text's full chunks, int32 (chunks, chunk); what is left over at the end is not used.

    bos: id that replaces the first token of every chunk (llama-perplexity's convention), None for a model without.
    Raises BadText where the text has not one full chunk.
    """
    if chunk < 4:
        raise BadOption("a chunk is too short", found=chunk, expected="at least 4 tokens")
    n = len(text.ids) // chunk
    if n == 0:
        raise BadText(
            "the text is too short",
            where=text.path,
            found=f"{len(text.ids)} tokens",
            expected=f"at least {chunk}",
            hint="Give a longer text, or a smaller --chunk",
        )
    chunks = text.ids[: min(n, limit or n) * chunk].reshape(-1, chunk).copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks
