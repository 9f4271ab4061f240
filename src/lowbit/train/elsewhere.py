"""A training's reference that is not the model before it is trained: a file made before, or another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint import Checkpoint
from lowbit.train import data, reference_file
from lowbit.train.forms import Compact
from lowbit.train.options import TrainOptions
from lowbit.train.reference_file import ReferenceFile
from lowbit.train.reference_maker import model_sha256, n_vocab
from lowbit.train.reference_server import RemoteReference
from lowbit.train.world import World


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """One of the two, and what the record says of it."""

    file: ReferenceFile | None = None
    process: RemoteReference | None = None
    described: dict[str, Any]

    @classmethod
    def found(cls, checkpoint: Checkpoint, options: TrainOptions, tokenizer: Any, world: World) -> Elsewhere:
        """What ``options.reference`` names. Raises BadOption where it is of another model, or of other data; NotFound,
        BadFile and RuntimeFailed where it is not there."""
        model, vocabulary = world.first(lambda: model_sha256(checkpoint)), n_vocab(checkpoint)
        if options.reference_url is not None:
            process = RemoteReference(options.reference_url, Compact(vocabulary, options.seed))
            process.check_belongs(model=model, n_vocab=vocabulary)
            said = {"kind": "process", "model": process.model, "precision": process.about.get("precision")}
            return cls(process=process, described=said)
        assert options.reference is not None
        file = ReferenceFile(options.reference, check=world.rank == 0)
        file.check_belongs(
            model=model, length=options.sequence_length, start_token=data.start_token(tokenizer), data=options.data
        )
        said = {"kind": "file", "sha256": file.sha256, "model": file.header.model, "precision": file.header.precision}
        return cls(file=file, described=said)


def identity(options: TrainOptions) -> str | None:
    """What names the reference in a run's key: which file; that it is another process, whose URL may change."""
    if options.reference_file is not None:
        return reference_file.digest_of(options.reference_file)
    return None if options.reference_url is None else "another process"
