"""``lowbit reference``: a model as the reference that trainings learn from, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit import files, launch, verbs
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadOption, Unsupported


def reference(
    model: str | Path,
    out: str | Path | None = None,
    *,
    port: int | None = None,
    ready: Callable[[str], None] = lambda url: None,
    **options: Any,
) -> None:
    """Writes what ``model`` says of some text to ``out``, or answers on a port of this machine until interrupted.

    out: a file for ``lowbit train --reference FILE``; it holds the text too. port: for the same option with
    http://127.0.0.1:PORT; 0 takes a free one. ready: called with that URL.
    options: fields of ``lowbit.train.reference_maker.ReferenceOptions`` (data, sequences, sequence_length, precision,
    threads, seed). Killed while it writes, the same call goes on. Raises LowbitError.
    """
    if (out is None) == (port is None):
        raise BadOption("a file to write, or a port to answer on?", expected="-o FILE or --port N, and not both")
    if launch.size() > 1:
        hint = "Start the command by itself, without torchrun or accelerate"
        raise Unsupported("a reference is one process", found=f"{launch.size()} processes", hint=hint)
    if out is not None:
        files.check_writable(out)
    from lowbit.train import reference_maker

    chosen = reference_maker.ReferenceOptions(**options)
    with open_checkpoint(model) as checkpoint:
        if out is not None:
            reference_maker.write(checkpoint, Path(out), chosen)
        else:
            assert port is not None
            reference_maker.answer(checkpoint, port, chosen, ready)


verbs.make_callable(__name__)
