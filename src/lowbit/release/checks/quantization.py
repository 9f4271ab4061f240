"""Is an artifact quantized as its name, its key-values or its config say?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from gguf.constants import LlamaFileType

from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.tensor_file import Entry
from lowbit.release.checks.base import Check, Findings, NotApplicable
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet
from lowbit.units import format_share

_IN_NAME = re.compile(
    r"(?<![A-Z0-9])(IQ\d_[A-Z]+|Q\d_K(?:_[A-Z]+)?|Q\d_[01]|TQ\d_0|MXFP4|NVFP4|BF16|F16|F32)(?![A-Z0-9])"
)
# What llama-quantize takes instead where rows are no multiple of 256.
_NARROW = {
    "Q2_K": ("Q4_0", "IQ4_NL"),
    "Q3_K": ("Q4_0", "IQ4_NL"),
    "Q4_K": ("Q5_0",),
    "Q5_K": ("Q5_1",),
    "Q6_K": ("Q8_0",),
}
_LEAST_SHARE = 0.3  # mixes like Q4_K_M keep about half of their weights in the type that they are named after
_NOT_COUNTED = ("token_embd", "output.weight", "per_layer_token_embd")


class Quantization(Check):
    name = "quantization"
    question = "artifacts are quantized as they say"
    rank = 50
    after = ("architecture",)
    roles = ("artifact",)

    def run(self, release: ReleaseSet, found: Findings) -> None:
        artifacts = [member for member in release.of("artifact") if member.container != "litertlm"]
        if not artifacts:
            raise NotApplicable("no artifact that lowbit reads")
        for member in artifacts:
            if member.container == "gguf":
                self._gguf(member, found)
            else:
                self._folder(release, member, found)

    def _gguf(self, member: Member, found: Findings) -> None:
        file = GgufFile(member.path)
        try:
            shares = _shares(file.entries)
            said = {"its name": _from_name(member.path), "general.file_type": _from_type(file.values)}
        finally:
            file.close()
        most = max(shares, key=lambda kind: shares[kind]) if shares else "nothing"
        for where, kind in said.items():
            if kind is not None and _share(file.entries, kind) < _LEAST_SHARE:
                advice = "Rename the file, or pack it again in the type that it names"
                found.problem(
                    f"{member}: {where} says {kind}, {format_share(shares.get(most, 0), 1)} is {most}", advice
                )
        found.note(f"{member}: mostly {most}" + ("" if any(said.values()) else ", and says nothing"))

    def _folder(self, release: ReleaseSet, member: Member, found: Findings) -> None:
        says = release.config(member).get("quantization") or release.config(member).get("quantization_config")
        with release.checkpoint(member) as opened:
            matrices = [name for name in opened.names if len(opened.info(name).shape) > 1]
            kinds = [opened.info(name).dtype for name in matrices if opened.coded_rows(name, 0, 1) is not None]
        if says and not kinds:
            found.problem(f"{member}: config.json names a quantization, and no matrix is quantized", "Pack it again")
        kind = max(set(kinds), key=kinds.count).lower() if kinds else "floats"
        found.note(f"{member}: {len(kinds)} of {len(matrices)} matrices {kind}")


def _from_name(path: Path) -> str | None:
    names = _IN_NAME.findall(path.stem.upper().replace("-", " ").replace(".", " "))
    return names[-1] if names else None


def _from_type(values: Mapping[str, object]) -> str | None:
    number = values.get("general.file_type")
    try:
        name = LlamaFileType(number).name  # type: ignore[arg-type]
    except ValueError:
        return None
    return None if name == "GUESSED" else name.removeprefix("ALL_").removeprefix("MOSTLY_")


def _matrices(entries: Mapping[str, Entry]) -> list[Entry]:
    return [e for name, e in entries.items() if len(e.shape) > 1 and not name.startswith(_NOT_COUNTED)]


def _shares(entries: Mapping[str, Entry]) -> dict[str, float]:
    matrices = _matrices(entries)
    total = sum(math.prod(e.shape) for e in matrices)
    shares: dict[str, float] = {}
    for entry in matrices:
        shares[entry.dtype] = shares.get(entry.dtype, 0.0) + math.prod(entry.shape) / total
    return shares


def _share(entries: Mapping[str, Entry], said: str) -> float:
    """The share of the weights that are in the type ``said``, or in what stands for it in narrow rows."""
    kind = re.sub(r"(_K)_[A-Z]+$", r"\1", said).removesuffix("_MOE")
    kind = re.sub(r"^(IQ[1234])_[A-Z]+$", r"\1", kind) if kind not in ("IQ4_NL", "IQ4_XS") else kind
    matrices = _matrices(entries)
    total = sum(math.prod(e.shape) for e in matrices)
    fitting = [e for e in matrices if _fits(e, kind)]
    return sum(math.prod(e.shape) for e in fitting) / total if total else 1.0


def _fits(entry: Entry, kind: str) -> bool:
    if entry.dtype.startswith(kind) if kind.startswith("IQ") else entry.dtype == kind:
        return True
    return bool(entry.shape[-1] % 256) and (entry.dtype in _NARROW.get(kind, ()) or kind.startswith(("IQ", "TQ")))


CHECK = Quantization
