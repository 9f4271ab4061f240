"""From a checkpoint to the file that ships: every tensor on the grid that the recipe gives it.

What training ended on is what the file holds: where the checkpoint has codes and scales on the assigned grid, their
bytes are copied, and nothing is rounded again. Where another program trained it, they are found again in the values
(``lattice``), and the certificate says of how many blocks that was proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowbit import files, verbs
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.projector import ProjectorCheckpoint, open_projector
from lowbit.pack import certificate as certificates
from lowbit.pack import gguf_container, mmproj_types
from lowbit.pack.certificate import Certificate, verify
from lowbit.pack.proof import TensorProof
from lowbit.recipe import Recipe

__all__ = ["Certificate", "PackResult", "TensorProof", "pack", "verify"]


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What was written: where, how big, how many weights, each tensor's type by its Hugging Face name, and the
    certificate if one was asked for."""

    path: Path
    size_bytes: int
    n_weights: int
    types: dict[str, str]
    certificate: Certificate | None = None


def pack(
    checkpoint: Checkpoint | str | Path,
    recipe: Recipe | str,
    out: str | Path,
    *,
    naive: bool = False,
    certificate: bool = False,
    threads: int | None = None,
    mmproj: bool = False,
) -> PackResult:
    """Writes ``checkpoint`` as a GGUF whose tensors lie on the grids that ``recipe`` assigns.

    checkpoint: an open Checkpoint, or anything that open_checkpoint takes.
    recipe: a Recipe or its name ('q4_0', ...); 'source' leaves the weights unquantized: F32, or the source's own F16
    or BF16 where every weight has it.
    naive: every tensor is rounded from its values by the ggml C library, as llama-quantize does it, also where the
    checkpoint holds codes and scales of its own.
    certificate: reads the file again before it takes its name, and writes OUT.certificate.json beside it: what of it is
    proved to be the source, bit for bit. ``lowbit pack`` always does.
    mmproj: the checkpoint's vision or audio towers and projector instead of its text model, as the file that llama.cpp
    loads beside it; recipe is 'f16', 'bf16', 'f32', 'q8_0' or 'source' then. So it is for an open ProjectorCheckpoint.

    threads: how many work at it; by default as many as there are cores for this process. The bytes do not depend on it.

    Some rows of a tensor are in memory at a time, and the file takes its name only when it is whole. Interrupted or
    killed, the same call goes on from the last whole tensor (see ``partial``).
    Raises BadFile (NaN or Inf in a tensor), Unsupported (tokenizer, row length), CannotWrite, and BadOption where
    another process writes ``out``.
    """
    if not isinstance(checkpoint, Checkpoint):
        with open_projector(checkpoint) if mmproj else open_checkpoint(checkpoint) as opened:
            return pack(opened, recipe, out, naive=naive, certificate=certificate, threads=threads)
    if isinstance(checkpoint, ProjectorCheckpoint):
        name = recipe if isinstance(recipe, str) else recipe.name
        name = _float_type(checkpoint) if name == "source" else name
        types = mmproj_types.assign(checkpoint, name)
    elif recipe == "source":
        name = _float_type(checkpoint)
        types = {n: name if len(checkpoint.info(n).shape) > 1 else "f32" for n in checkpoint.names}
    else:
        chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
        name, types = chosen.name, chosen.assign(checkpoint)
    out = Path(out)
    proved: list[Certificate] = []

    def prove(whole: Path) -> None:
        proved.append(certificates.prove(whole, checkpoint, final=out, threads=threads))
        # Before the file itself: a certificate without its file says so by its hash, a file without one says nothing.
        files.write_json(certificates.path_beside(out), proved[0].to_json())

    size = gguf_container.write(
        checkpoint, types, out, file_type=name, naive=naive, threads=threads, check=prove if certificate else None
    )
    if not certificate:  # an earlier file's would be of another file now
        certificates.path_beside(out).unlink(missing_ok=True)
    return PackResult(
        path=out,
        size_bytes=size,
        n_weights=checkpoint.n_weights,
        types=types,
        certificate=proved[0] if proved else None,
    )


def _float_type(checkpoint: Checkpoint) -> str:
    """The unquantized type that holds every matrix of the checkpoint exactly."""
    dtypes = {info.dtype for info in map(checkpoint.info, checkpoint.names) if len(info.shape) > 1}
    return next((name for name in ("f16", "bf16") if dtypes == {name.upper()}), "f32")


verbs.make_callable(__name__)
