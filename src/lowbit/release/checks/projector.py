"""Does the projector (mmproj) belong to this model: family, width, tensors, the checkpoint's values; does it load?"""

from __future__ import annotations

import contextlib
import math
import re

import numpy as np

from lowbit import grid as grids
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.projector import ProjectorCheckpoint, open_projector
from lowbit.checkpoint.safetensors_file import to_float32
from lowbit.errors import LowbitError, Unsupported
from lowbit.release import child
from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.members import Member
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.settings import settings_of
from lowbit.release.tokenizing import version

# Which projectors llama.cpp's clip.cpp has for a text architecture; others are not judged by their name.
_FAMILIES = {
    "gemma3": ("gemma3",), "gemma3n": ("gemma3nv", "gemma3na"),
    "gemma4": ("gemma4v", "gemma4a", "gemma4uv", "gemma4ua"),
    "qwen2vl": ("qwen2vl_merger", "qwen2.5vl_merger", "qwen2a", "qwen2.5o"), "qwen3vl": ("qwen3vl_merger",),
}  # fmt: skip
_WEIGHT_ERROR = 0.4
_ADVICE = "Take the mmproj of this model and size, or make it: lowbit pack --mmproj CHECKPOINT -o mmproj.gguf"
_AGAIN = "The file is not whole: fetch it again"


class Projector(Check):
    name = "projector"
    question = "the projector is of this model's family and width, whole, and loads beside it"
    rank = 110
    after = ("safety", "hashes", "architecture")
    roles = (*TEXT_MODELS, "projector")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        projector = release.one("projector")
        if projector is None:
            raise NotApplicable("no projector (mmproj) here")
        with found.problems_of(projector, _AGAIN), contextlib.closing(GgufFile(projector.path)) as file:
            self._static(release, projector, file, found)
        if not found.problems and not found.quick:
            self._load(release, projector, found)

    def _static(self, release: ReleaseSet, projector: Member, file: GgufFile, found: Findings) -> None:
        values = file.values
        towers = [kind for kind in ("vision", "audio") if values.get(f"clip.has_{kind}_encoder") is True]
        if values.get("general.architecture") != "clip" or not towers:
            found.problem(f"{projector} is no mmproj: it has no vision and no audio encoder", _ADVICE)
            return
        types = [str(values.get("clip.projector_type") or values.get(f"clip.{kind}.projector_type")) for kind in towers]
        model = next(iter(release.text_models), None)
        if model is not None:
            settings = settings_of(release, model)
            allowed = _FAMILIES.get(settings.architecture)
            if allowed is not None and not set(types) <= set(allowed):
                said = f"{' and '.join(types)}, and {settings.architecture} takes {', '.join(allowed)}"
                found.problem(f"{projector} is a projector of another family: {said}", _ADVICE)
            width = settings.keys.get("embedding_length")
            for kind in towers:
                wide = values.get(f"clip.{kind}.projection_dim")
                if wide is not None and width is not None and wide != width:
                    said = f"{kind} comes out {wide} wide, and {model} is {width} wide"
                    found.problem(f"{projector} is of another size of model: {said}", _ADVICE)
        for kind, prefix in (("vision", "v.blk."), ("audio", "a.blk.")):
            if kind in towers and (said_missing := _incomplete(file, prefix, values.get(f"clip.{kind}.block_count"))):
                found.problem(f"{projector}: {said_missing}", _AGAIN)
        found.note(f"{projector}: {', '.join(types)}, {len(file.entries)} tensors")
        if not found.problems:
            self._compare(release, projector, file, found)

    def _compare(self, release: ReleaseSet, projector: Member, file: GgufFile, found: Findings) -> None:
        """With the towers of the checkpoint, where it has them."""
        for source in release.of("checkpoint", "base"):
            if not source.is_folder:
                continue
            try:
                opened = open_projector(source.path)
            except (Unsupported, LowbitError):
                continue
            with opened:
                wrong = list(_differences(file, opened))
            if wrong:
                found.problem(f"{projector} is not {source}'s: {shortened(wrong, 3)}", _ADVICE)
            else:
                found.note(f"its tensors are those of {source}")
            return
        found.note("no checkpoint with towers here to compare its values with")

    def _load(self, release: ReleaseSet, projector: Member, found: Findings) -> None:
        model = next(iter(release.ggufs("artifact", "base")), None)
        if model is None:
            found.note("no GGUF to load it beside")
            return
        found.runtimes["llama.cpp"] = f"xllamacpp {version('xllamacpp')}"
        advice = "llama.cpp does not run this pair: take projector and model of one release"
        with found.problems_of(projector, advice):
            result = child.call("load_projector", model=str(model.path), mmproj=str(projector.path))
            found.note(f"loads in llama.cpp beside {model}; {result}")


def _incomplete(file: GgufFile, prefix: str, n_blocks: object) -> str | None:
    """What is missing of a tower's layers."""
    blocks: dict[int, set[str]] = {}
    for name in file.entries:
        if match := re.match(re.escape(prefix) + r"(\d+)\.(.+)", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    if isinstance(n_blocks, int) and blocks and sorted(blocks) != list(range(n_blocks)):
        return f"it has {len(blocks)} of {n_blocks} layers {prefix}*"
    every = set().union(*blocks.values()) if blocks else set()
    for i, names in sorted(blocks.items()):
        if names != every:
            return f"the tensor {prefix}{i}.{min(every - names)} is missing"
    return None


def _differences(file: GgufFile, source: ProjectorCheckpoint) -> list[str]:
    wrong = []
    for spec in source.specs.values():
        entry = file.entries.get(spec.gguf_name)
        if entry is None:
            wrong.append(f"{spec.gguf_name} is missing")
        elif entry.shape != spec.gguf_shape:
            wrong.append(f"{spec.gguf_name} is {list(entry.shape)}, should be {list(spec.gguf_shape)}")
        elif (error := _error(file, source, spec.name)) is not None and not error <= _WEIGHT_ERROR:
            wrong.append(f"{spec.gguf_name} is off by {100 * error:.0f}%")
    return wrong


def _error(file: GgufFile, source: ProjectorCheckpoint, name: str) -> float | None:
    """||file - source|| / ||source|| of a tensor's first and last row; None for a type that lowbit cannot decode."""
    spec = source.specs[name]
    entry = file.entries[spec.gguf_name]
    last = spec.gguf_n_rows - 1
    rows = sorted({0, last})

    def read(start: int, stop: int) -> np.ndarray:
        return source.read_rows(name, start, stop)

    ours = np.concatenate([spec.gguf_values(read, row, row + 1) for row in rows]).astype(np.float64)
    raw = np.concatenate([file.read_rows(spec.gguf_name, row, row + 1) for row in rows])
    if entry.dtype in ("F32", "F16", "BF16"):
        theirs = to_float32(raw.reshape(-1), entry.dtype, ours.shape, spec.gguf_name)
    else:
        try:
            grid = grids.get(entry.dtype.lower())
        except LowbitError:
            return None
        theirs = grid.dequantize(grid.unpack(raw))
    size = math.sqrt(float((ours**2).sum()))
    off = math.sqrt(float(((theirs - ours) ** 2).sum()))
    return off / size if size else off


CHECK = Projector
