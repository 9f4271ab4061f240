"""A GGUF that is all header: a model's key-values and tensor table, and a hole where the weights would be."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from lowbit.checkpoint.families.base import text, uint
from lowbit.checkpoint.gguf_file import TensorHead, write_header
from lowbit.errors import CannotWrite, Unsupported
from lowbit.plan.model import PlanModel, PlannedTensor


@contextlib.contextmanager
def header_only(model: PlanModel, tensors: Sequence[PlannedTensor]) -> Iterator[Path]:
    """The path of such a file, for as long as the block runs. It takes no room on disk: the hole is sparse.

    Raises Unsupported without a family, CannotWrite where the file system has no room or no holes.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-plan-") as folder:
        path = Path(folder) / "header.gguf"
        write(path, model, tensors)
        yield path


def write(path: Path, model: PlanModel, tensors: Sequence[PlannedTensor]) -> list[int]:
    """Writes it and returns the tensors' offsets. It has a vocabulary of the right size without words."""
    if model.family is None:
        raise Unsupported("a header is written for known architectures only", where=model.path)
    arch = model.family.arch
    fields = [text("general.architecture", arch), text("tokenizer.ggml.model", "none")]
    fields += model.family.metadata(model.config)
    if f"{arch}.vocab_size" not in {field.key for field in fields}:
        fields.append(uint(f"{arch}.vocab_size", model.vocab_size))
    heads = [TensorHead(t.name, t.shape, GGMLQuantizationType[t.dtype.upper()]) for t in tensors]
    try:
        with open(path, "wb") as file:
            offsets = write_header(file, fields, heads)
            file.truncate(offsets[-1] + heads[-1].n_bytes)
    except OSError as error:
        raise CannotWrite(f"no header can be written: {error.strerror}", where=path) from error
    return offsets
