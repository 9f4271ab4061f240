"""Token ids of a text in each runtime that reads a member of the release."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lowbit.errors import BadFile, NotFound
from lowbit.release.members import Member
from lowbit.run._hf_tokenizer import load_tokenizer
from lowbit.run.base import first_line

# (text, whether BOS and the like go around it) -> ids; the text's special tokens are read as such.
Tokenize = Callable[[str, bool], list[int]]


def version(package: str) -> str | None:
    """The installed version; None where there is none."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def load_transformers(folder: Path) -> Any:
    """The folder's AutoTokenizer; nothing of the folder is run and nothing fetched. Raises NotFound where transformers
    is not installed, BadFile where it cannot load the files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return load_tokenizer(folder)


def load_mlx(folder: Path) -> Any:
    """The folder's tokenizer as mlx-lm has it. Raises NotFound where mlx-lm is not installed, BadFile."""
    if version("mlx-lm") is None:
        raise NotFound("mlx-lm is not installed", hint="Run: pip install 'lowbit[mlx]'")
    from mlx_lm.tokenizer_utils import load

    try:
        return load(folder)
    except Exception as error:
        raise BadFile("mlx-lm cannot load the tokenizer", where=folder, found=first_line(error)) from error


def by_encode(tokenizer: Any) -> Tokenize:
    """``Tokenize`` of transformers' tokenizer or mlx-lm's."""
    return lambda text, special: [int(i) for i in tokenizer.encode(text, add_special_tokens=special)]


@contextlib.contextmanager
def opened(member: Member) -> Iterator[tuple[str, str, Tokenize]]:
    """Name and version of the runtime that a member is for, and its tokenizer. Raises NotFound, BadFile."""
    if member.container == "gguf":
        from lowbit.run._llama_vocab import LlamaVocab

        with LlamaVocab(member.path) as vocab:
            yield (
                "llama.cpp", f"xllamacpp {version('xllamacpp')}",
                lambda text, special: vocab.tokenize(text, add_special=special, parse_special=True),
            )  # fmt: skip
    elif member.container == "mlx":
        yield "mlx-lm", str(version("mlx-lm")), by_encode(load_mlx(member.path))
    else:
        yield "transformers", str(version("transformers")), by_encode(load_transformers(member.path))
