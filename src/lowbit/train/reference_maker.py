"""``lowbit reference``: a model as the reference of trainings elsewhere, in a file or in a process that answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowbit import console, files, texts
from lowbit.checkpoint import Checkpoint
from lowbit.errors import BadOption
from lowbit.run._hf_model import load
from lowbit.train import data, precision, reference_file, reference_server
from lowbit.train.forms import Compact
from lowbit.train.loss import softcap
from lowbit.train.model import load_tokenizer
from lowbit.train.moments import EMBEDDING
from lowbit.train.options import PRECISIONS
from lowbit.train.reference import OwnReference
from lowbit.train.world import join


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """data:            text file, JSONL, Parquet or datasets id; None: text that comes with lowbit
    sequences:       of it, drawn at random; None: all there are, or of a data set that may have no end 2,048
    sequence_length: tokens each
    precision:       of the products ("auto", "float32", "bfloat16")
    threads:         CPU threads; None: as torch chooses
    seed:            of what is drawn
    """

    data: str | None = None
    sequences: int | None = None
    sequence_length: int = 512
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BadOption("unknown precision", found=self.precision, expected=" or ".join(PRECISIONS))
        for name, least in {"sequences": 1, "sequence_length": 2, "threads": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 1 << 32:
                raise BadOption(f"{name} must be {least} or more, and below 2^32", found=value)


_OF_NO_END = 2048
_POOL = 4  # times what is wanted is read of the data, and what is wanted drawn from that


def model_sha256(checkpoint: Checkpoint) -> str:
    """Of a GGUF its SHA-256, of a folder ``files.folder_sha256``."""
    return (files.folder_sha256 if checkpoint.path.is_dir() else files.sha256)(checkpoint.path)


def n_vocab(checkpoint: Checkpoint) -> int:
    return int(checkpoint.specs[EMBEDDING].shape[0])


def write(checkpoint: Checkpoint, path: Path, options: ReferenceOptions) -> None:
    """Makes the file. Killed at any moment, the same call goes on. Raises BadOption where another file is there."""
    tokenizer = load_tokenizer(checkpoint)
    sequences, facts = _gathered(checkpoint, tokenizer, options)
    model, dtype = _loaded(checkpoint, options)
    header = reference_file.Header(
        model=_named(checkpoint), data=reference_file.data_of(options.data), facts=facts, n_vocab=n_vocab(checkpoint),
        start_token=data.start_token(tokenizer), length=options.sequence_length, sequences=len(sequences),
        seed=options.seed, precision=_spelled(dtype),
    )  # fmt: skip
    if path.exists():
        there = reference_file.ReferenceFile(path)
        if there.header != header or not np.array_equal(there.sequences, sequences):
            hint = "Remove it, or choose another -o"
            raise BadOption("a reference of something else is there", where=path, found=there.header.model, hint=hint)
        return
    ask = OwnReference(model, dtype, Compact(header.n_vocab, options.seed, softcap(model)))
    with console.progress("Asking the reference", len(sequences), "sequences") as bar:
        reference_file.make(path, header, sequences, ask, bar.update)


def answer(checkpoint: Checkpoint, port: int, options: ReferenceOptions, ready: Callable[[str], None]) -> None:
    """Answers trainings on a port of this machine until interrupted. ready: called with the URL."""
    model, dtype = _loaded(checkpoint, options)
    about = {"model": _named(checkpoint), "n_vocab": n_vocab(checkpoint), "precision": _spelled(dtype)}
    reference_server.listen(reference_server.Asked(model, dtype, about), port, ready)


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"name": checkpoint.name, "sha256": model_sha256(checkpoint)}


def _spelled(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _gathered(checkpoint: Checkpoint, tokenizer: Any, options: ReferenceOptions) -> tuple[np.ndarray, dict[str, Any]]:
    """Sequences (n, length), and what the record of a training says of them."""
    length, wanted = options.sequence_length, options.sequences
    if options.data is not None and not Path(options.data).exists():
        wanted = wanted or _OF_NO_END
    if options.data is None:
        text = data.bundled_sequences(tokenizer, length)[:wanted]
        sources: list[dict[str, Any]] = [{"name": name, "license": terms} for _, name, terms in texts.BUNDLED]
    else:
        pool = data.load_sequences(options.data, tokenizer, length, wanted and _POOL * wanted)
        text = pool[data.order(len(pool), options.seed)[:wanted]]
        sources = [{"name": options.data, "license": None}]
    sequences = text[data.order(len(text), options.seed)]  # as a training without a file has them
    return sequences, {"sampled_tokens": 0, "text_tokens": sequences.size, "sources": sources}


@torch.no_grad()
def _loaded(checkpoint: Checkpoint, options: ReferenceOptions) -> tuple[Any, torch.dtype]:
    """The model, its linear layers in the products' dtype as autocast would have them: half the memory in bfloat16."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = join().device
    dtype = precision.choose(options.precision, device, checkpoint.config["hidden_size"])
    console.log(f"Loading {checkpoint.name}")
    model = load(checkpoint)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and not (tied and module is head):
            module.weight.data = module.weight.data.to(dtype)
    return model.to(device), dtype
