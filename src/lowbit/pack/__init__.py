"""From a checkpoint to the file that ships: every tensor on the grid that the recipe gives it.

What training ended on is what the file holds: where the checkpoint has codes and scales on the assigned grid, their
bytes are copied, and nothing is rounded again. Where another program trained it, they are found again in the values
(``lattice``), and the certificate says of how many blocks that was proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit import console, files, verbs
from lowbit import recipe as recipes
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.projector import ProjectorCheckpoint, open_projector
from lowbit.errors import BadOption
from lowbit.pack import certificate as certificates
from lowbit.pack import containers, gguf_container, mix, mmproj_types
from lowbit.pack import imatrix as imatrices
from lowbit.pack.calibration import Calibration
from lowbit.pack.certificate import Certificate, verify
from lowbit.pack.containers import Container
from lowbit.pack.guide import Either, Guide
from lowbit.pack.imatrix import Imatrix
from lowbit.pack.mix import Mix
from lowbit.pack.proof import TensorProof
from lowbit.pack.weighted import Weighted
from lowbit.recipe import Recipe
from lowbit.threads import thread_count

__all__ = ["Certificate", "Imatrix", "PackResult", "TensorProof", "pack", "verify"]


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What was written: where, how big, how many weights, each tensor's type by its Hugging Face name, and the
    certificate if one was asked for."""

    path: Path
    size_bytes: int
    n_weights: int
    types: dict[str, str]
    certificate: Certificate | None = None
    mix: Mix | None = None


def pack(
    checkpoint: Checkpoint | str | Path,
    recipe: Recipe | str | None,
    out: str | Path,
    *,
    to: str | None = None,
    naive: bool = False,
    imatrix: Imatrix | str | Path | None = None,
    certificate: bool = False,
    threads: int | None = None,
    calibration: str | Path | None = None,
    bits: float | None = None,
    size: int | None = None,
    mmproj: bool = False,
    context: int | None = None,
) -> PackResult:
    """Writes ``checkpoint`` as an artifact whose tensors lie on the grids that ``recipe`` assigns.

    checkpoint: an open Checkpoint, or anything that open_checkpoint takes.
    recipe: a Recipe or its name ('q4_0', ...); None is the container's usual one ('q4_0' of GGUF). 'source' leaves the
    weights unquantized: F32, or the source's own F16 or BF16 where every weight has it.
    to: 'gguf' or 'litert-lm' (files), 'mlx' or 'compressed-tensors' (folders); None is the one that has the
    recipe's format.
    naive: every tensor is rounded from its values by the library's own rule, as llama-quantize or mlx-lm does it, also
    where the checkpoint holds codes and scales of its own.
    certificate: reads the artifact again before it takes its name, and writes OUT.certificate.json beside a file, or
    certificate.json into a folder: what of it is proved to be the source, bit for bit. ``lowbit pack`` always does.
    imatrix: an importance matrix of this model, or its file (see ``lowbit imatrix``), under which weights are rounded
    that have neither codes and scales nor a lattice: types of one float16 scale a block by a search for that scale,
    others, and with ``naive`` all, as the ggml C library does it. GGUF only.
    calibration: a file that ``lowbit calibrate`` made of the checkpoint: what has no codes and lies on no lattice is
    rounded so that the output changes least (see ``compensate``). GGUF only. With an imatrix too, that is for what the
    calibration lacks.
    bits, size: instead of by a recipe, each tensor's type is chosen (see ``mix``) so that the weights take at most so
    many bits each, or the file so many bytes. Needs a calibration.
    mmproj: the checkpoint's vision or audio towers and projector instead of its text model, as the GGUF that llama.cpp
    loads beside it; recipe is 'f16' (usual), 'bf16', 'f32', 'q8_0' or 'source' then. An open checkpoint must be a
    ProjectorCheckpoint, for which nothing else is packed.
    context: of LiteRT-LM, whose files say so, the tokens that a cache holds; by default 4096 or what the model was
    trained for, if that is less.
    threads: how many work at it; by default as many as there are cores for this process. The bytes do not depend on it.

    Some rows of a tensor are in memory at a time, and the artifact takes its name only when it is whole. Interrupted or
    killed, the same call goes on from the last whole tensor (see ``lowbit.partial``).
    Raises BadFile (NaN or Inf in a tensor, an imatrix or a calibration of another model), Unsupported (tokenizer, row
    length), CannotWrite, and BadOption where the container does not have the recipe's format, no mix is small enough or
    another process writes ``out``.
    """
    if not isinstance(checkpoint, Checkpoint):
        with open_projector(checkpoint) if mmproj else open_checkpoint(checkpoint) as opened:
            return pack(
                opened, recipe, out, to=to, naive=naive, imatrix=imatrix, certificate=certificate, threads=threads,
                calibration=calibration, bits=bits, size=size, mmproj=mmproj, context=context,
            )  # fmt: skip
    if mmproj or isinstance(checkpoint, ProjectorCheckpoint):
        _check_projector(checkpoint, to, {"imatrix": imatrix, "calibration": calibration, "bits": bits, "size": size})
    calibrated, guide = _guides(checkpoint, calibration, imatrix, naive=naive)
    mixed = None
    if bits is not None or size is not None:
        mixed = _mix(checkpoint, calibrated, guide, bits, size, thread_count(threads))
        container = containers.choose(to or "gguf", "q4_0")
        name, types = mixed.name, mixed.types
    else:
        container, name, types = _by_recipe(checkpoint, recipe, to)
    checkpoint.choose(name)
    if not hasattr(container, "STATIC_ACTIVATIONS") and checkpoint.activation_scales():
        console.log("the scales of static activations are left out: this container has no place for them")
    out = Path(out)
    proved: list[Certificate] = []

    def prove(whole: Path) -> None:
        proved.append(certificates.prove(whole, checkpoint, final=out, threads=threads))
        # Before the file itself: a certificate without its file says so by its hash, a file without one says nothing.
        beside = certificates.path_beside(whole if whole.is_dir() else out)
        files.write_json(beside, proved[0].to_json())

    written = container.write(
        checkpoint, types, out, file_type=name, naive=naive, threads=threads, guide=guide,
        check=prove if certificate else None, **containers.sizes(container, context),
    )  # fmt: skip
    if not certificate and not out.is_dir():  # an earlier file's would be of another file now
        certificates.path_beside(out).unlink(missing_ok=True)
    return PackResult(
        path=out,
        size_bytes=written,
        n_weights=checkpoint.n_weights,
        types=types,
        certificate=proved[0] if proved else None,
        mix=mixed,
    )


def _by_recipe(
    checkpoint: Checkpoint, recipe: Recipe | str | None, to: str | None
) -> tuple[Container, str, dict[str, str]]:
    """The container, what the recipe is called, and the grid of each tensor."""
    if isinstance(checkpoint, ProjectorCheckpoint):
        recipe = recipe or mmproj_types.RECIPES[0]
        name = recipe if isinstance(recipe, str) else recipe.name
        name = _float_type(checkpoint) if name == "source" else name
        return containers.choose("gguf", None), name, mmproj_types.assign(checkpoint, name)
    if recipe is None:
        recipe = containers.choose(to, None).RECIPE
    if recipe == "source":
        name = _float_type(checkpoint)
        return containers.choose(to, name), name, recipes.get(name).assign(checkpoint)
    chosen = recipes.get(recipe) if isinstance(recipe, str) else recipe
    return containers.choose(to, chosen.weights), chosen.name, chosen.assign(checkpoint)


def _check_projector(checkpoint: Checkpoint, to: str | None, measured: Mapping[str, object]) -> None:
    """Raises BadOption for what does not go with an mmproj."""
    given = [name for name, value in measured.items() if value is not None]
    if given:
        raise BadOption("an mmproj is packed by a recipe", found=", ".join(given), hint="Leave it out")
    if to not in (None, "gguf"):
        raise BadOption("an mmproj is a GGUF", found=to, hint="MLX and compressed-tensors keep towers in the model")
    if not isinstance(checkpoint, ProjectorCheckpoint):
        hint = "Give its path, or open it with lowbit.checkpoint.projector.open_projector"
        raise BadOption("the checkpoint is open as a text model", where=checkpoint.path, hint=hint)


def _guides(
    checkpoint: Checkpoint, calibration: str | Path | None, imatrix: Imatrix | str | Path | None, *, naive: bool
) -> tuple[Calibration | None, Guide | None]:
    """The calibration, and what all that was measured of the model tells the container. Raises BadOption where it would
    not be used."""
    if naive and calibration is not None:
        raise BadOption("naive rounding knows no calibration", hint="Leave out one of the two")
    measured = None if calibration is None else Calibration(calibration, checkpoint)
    if imatrix is None:
        return measured, measured
    weighted = Weighted(imatrix if isinstance(imatrix, Imatrix) else imatrices.read(imatrix), checkpoint)
    return measured, weighted if measured is None else Either(measured, weighted)


def _mix(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    guide: Guide | None,
    bits: float | None,
    size: int | None,
    threads: int,
) -> Mix:
    if calibration is None or (bits is not None and size is not None):
        hint = "lowbit calibrate MODEL -o FILE measures the model"
        raise BadOption("a mix needs a calibration, and either bits or size", hint=hint)
    if size is None:
        room = int((bits or 0) * checkpoint.n_weights / 8)
    else:
        header = gguf_container.header_bytes(checkpoint, guide)
        if header >= size:
            found, expected = f"{size} bytes", f"more than the header's {header}"
            raise BadOption("no room for weights", found=found, expected=expected)
        room = size - header
    return mix.choose(checkpoint, calibration, room, threads=threads)


def _float_type(checkpoint: Checkpoint) -> str:
    """The unquantized type that holds every matrix of the checkpoint exactly."""
    dtypes = {info.dtype for info in map(checkpoint.info, checkpoint.names) if len(info.shape) > 1}
    return next((name for name in ("f16", "bf16") if dtypes == {name.upper()}), "f32")


verbs.make_callable(__name__)
