"""The certificate: what of a packed file is the source bit for bit, proved on the file's own bytes.

Every tensor of the source is read again, every block of the artifact is decoded as the runtime decodes it, and
``lattice.judge`` compares the two. Nothing here depends on who packed the file or how.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from lowbit import console, files
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadFile, LowbitError, NotFound, Unsupported
from lowbit.grid.base import Grid
from lowbit.pack import identify, lattice
from lowbit.pack.gguf_container import file_values, precision_of

FORMAT = "lowbit-certificate/1"
SUFFIX = ".certificate.json"
_SLICE_WEIGHTS = 1 << 20  # decoded and compared at a time
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True)
class TensorProof:
    """What is proved of one tensor.

    name: Hugging Face's; of a tensor that only the artifact has, GGUF's. type: the artifact's, 'q4_0'. source_dtype: as
    the source stores it; rounded_to: the dtype in which the two are compared ('BF16' also for F32 that holds nothing
    finer). grid: the lattice that the source's values sit on, found in a sample of rows; 'none'; None for a vector.
    blocks = exact + within_scale_rounding + off_lattice, counted in the artifact's own blocks; a tensor of floats is
    counted in rows. max_error: the largest |artifact - source| of a weight in the blocks that are not exact.
    note: why a tensor was not compared; its blocks are 0 then.
    """

    name: str
    type: str
    source_dtype: str | None = None
    rounded_to: str | None = None
    grid: str | None = None
    blocks: int = 0
    exact: int = 0
    within_scale_rounding: int = 0
    off_lattice: int = 0
    max_error: float = 0.0
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The proofs of all tensors of one artifact against one source; ``to_json`` is what is saved beside the artifact.

    source_sha256: of the source's file; of a folder with several .safetensors see ``source_sha256``.
    """

    source: str
    artifact: str
    source_sha256: str
    artifact_sha256: str
    tensors: tuple[TensorProof, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Blocks of all tensors that were compared: blocks, exact, within_scale_rounding, off_lattice."""
        keys = ("blocks", "exact", "within_scale_rounding", "off_lattice")
        return {key: sum(getattr(tensor, key) for tensor in self.tensors) for key in keys}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source,
            "artifact": self.artifact,
            "source_sha256": self.source_sha256,
            "artifact_sha256": self.artifact_sha256,
            "totals": self.totals,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def path_beside(artifact: str | Path) -> Path:
    """Where the certificate of ``artifact`` lies: OUT.gguf.certificate.json beside OUT.gguf."""
    path = Path(artifact)
    return path.with_name(path.name + SUFFIX)


def verify(artifact: str | Path, source: Checkpoint | str | Path) -> Certificate:
    """Proves a GGUF, made by whatever program, against the checkpoint that it was made from. Writes nothing.

    A certificate that lies beside the artifact must be the artifact's own and, where it is of the same source, say
    the same. Raises NotFound, Unsupported, or BadFile: not a GGUF or truncated, of another model, with NaN or Inf, or a
    certificate that is of another file or wrong.
    """
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as opened:
            return verify(artifact, opened)
    path = Path(artifact)
    if not path.is_file():
        raise NotFound("no such file", where=path, expected="a GGUF")
    _open(path, source)  # a damaged file is to be called that, and not another than its certificate's
    stated = _stated(path)
    proved = prove(path, source)
    if stated and stated.get("source_sha256") == proved.source_sha256:
        _check_stated(stated, proved, path_beside(path))
    return proved


def prove(artifact: Path, source: Checkpoint, *, final: Path | None = None) -> Certificate:
    """The certificate of the file ``artifact``, which will be called ``final``. Raises BadFile and Unsupported."""
    file, label = _open(artifact, source), final or artifact
    specs = tuple(source.specs.values())
    tensors = []
    with console.progress("Proving", source.n_weights) as bar:
        done = 0
        for spec in specs:
            tensors.append(_prove_tensor(file, source, spec, f"{label}: {spec.gguf_name}"))
            done += math.prod(spec.shape)
            bar.update(done)
    computed = source.family.computed(source.config)
    tensors += [_prove_computed(file, name, values, f"{label}: {name}") for name, values in computed.items()]
    known = {spec.gguf_name for spec in specs} | set(computed)
    for extra in sorted(set(file.entries) - known):
        dtype = file.entries[extra].dtype.lower()
        tensors.append(TensorProof(name=_utf8(extra), type=dtype, note="the source has no such tensor"))
    return Certificate(
        source=_utf8(source.name),
        artifact=_utf8(label.name),
        source_sha256=source_sha256(source),
        artifact_sha256=files.sha256(artifact),
        tensors=tuple(tensors),
    )


def source_sha256(source: Checkpoint) -> str:
    """SHA-256 of the source's one file; of several, that of the text `sha256sum *.safetensors` prints in the folder."""
    if source.path.is_file():
        return files.sha256(source.path)
    hashes = {path.name: files.sha256(path) for path in sorted(source.path.glob("*.safetensors"))}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def _stated(artifact: Path) -> dict[str, Any] | None:
    """The certificate beside the artifact, if there is one. Raises BadFile where it is of another file."""
    path = path_beside(artifact)
    if not path.exists():
        return None
    stated = read_json(path, BadFile)
    if stated.get("format") != FORMAT:
        raise BadFile("not a certificate", where=path, found=str(stated.get("format"))[:40], expected=FORMAT)
    found = files.sha256(artifact)
    if stated.get("artifact_sha256") != found:
        raise BadFile(
            "the certificate is of another file, or the file was changed since",
            where=path, found=str(stated.get("artifact_sha256"))[:64], expected=f"{found}, of {artifact.name}",
            hint="Pack again, or remove the certificate to prove the file as it is",
        )  # fmt: skip
    return stated


def _check_stated(stated: dict[str, Any], proved: Certificate, where: Path) -> None:
    """Raises BadFile where a certificate of this file and source counts otherwise than what is proved."""
    counts = ("name", "blocks", "exact", "within_scale_rounding", "off_lattice")
    ours = [{key: tensor[key] for key in counts} for tensor in proved.to_json()["tensors"]]
    tensors = stated.get("tensors")
    theirs = (
        [{key: t.get(key) for key in counts} for t in tensors if isinstance(t, dict)]
        if isinstance(tensors, list)
        else []
    )
    if stated.get("totals") == proved.totals and theirs == ours:
        return
    wrong = next((t for t in theirs if t not in ours), stated.get("totals"))
    raise BadFile(
        "the certificate does not say what is so",
        where=where, found=str(wrong)[:200], expected=proved.totals, hint="Remove it",
    )  # fmt: skip


def _open(artifact: Path, source: Checkpoint) -> GgufFile:
    try:
        file = GgufFile(artifact)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=artifact) from error
    if file.values.get("split.count", 0) not in (0, 1):
        hint = "Join the parts with llama-gguf-split --merge"
        raise Unsupported("a GGUF split into several files", where=artifact, hint=hint)
    arch = file.values.get("general.architecture")
    if arch != source.family.arch:
        raise BadFile("not the source's model", where=artifact, found=str(arch)[:40], expected=source.family.arch)
    for spec in source.specs.values():
        entry, where = file.entries.get(spec.gguf_name), f"{artifact}: {spec.gguf_name}"
        if entry is None:
            raise BadFile("a tensor of the source is missing", where=where, hint="Is it made from this source?")
        if entry.shape != spec.shape:
            hint = "Is it made from this source?"
            raise BadFile(
                "not the source's shape", where=where, found=list(entry.shape), expected=list(spec.shape), hint=hint
            )
    return file


def _prove_tensor(file: GgufFile, source: Checkpoint, spec: TensorSpec, where: str) -> TensorProof:
    entry, info = file.entries[spec.gguf_name], source.info(spec.name)
    try:
        grid = grids.by_ggml_type(GGMLQuantizationType[entry.dtype])
    except LowbitError:
        kind = entry.dtype.lower()
        return TensorProof(
            name=spec.name, type=kind, source_dtype=info.dtype, note=f"lowbit cannot decode {kind}: not compared"
        )
    values = file_values(source, spec)
    dtype = precision_of(source, spec, values)
    counts, max_error = np.zeros(3, np.int64), 0.0
    raw = file.raw(spec.gguf_name).reshape(len(values), -1)
    for part in _row_slices(values):
        status, error = _compare(values[part], raw[part], grid, dtype, where)
        counts += np.bincount(status.reshape(-1), minlength=3)
        max_error = max(max_error, error)
    return TensorProof(
        name=spec.name,
        type=grid.name,
        source_dtype=info.dtype,
        rounded_to=dtype,
        grid=_lattice_of(values, info.dtype) if len(spec.shape) > 1 else None,
        blocks=int(counts.sum()),
        exact=int(counts[lattice.EXACT]),
        within_scale_rounding=int(counts[lattice.WITHIN_SCALE_ROUNDING]),
        off_lattice=int(counts[lattice.OFF_LATTICE]),
        max_error=max_error,
    )


def _prove_computed(file: GgufFile, name: str, values: np.ndarray, where: str) -> TensorProof:
    """A tensor that the source's config gives (rotary frequencies): there and the same, or the artifact is off."""
    entry = file.entries.get(name)
    if entry is None or entry.dtype != "F32" or entry.shape != values.shape:
        found = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
        raise BadFile("not what the source's config gives", where=where, found=found, expected=f"F32 {[*values.shape]}")
    raw = file.raw(name).reshape(1, -1)
    status, error = _compare(values.reshape(1, -1), raw, grids.get("f32"), "F32", where)
    exact = int((status == lattice.EXACT).sum())
    return TensorProof(
        name=name, type="f32", source_dtype="computed", rounded_to="F32",
        blocks=status.size, exact=exact, off_lattice=status.size - exact, max_error=error,
    )  # fmt: skip


def _compare(values: np.ndarray, raw: np.ndarray, grid: Grid, dtype: str, where: str) -> tuple[np.ndarray, float]:
    """Statuses (rows, n_blocks) of stored bytes (rows, row_bytes), and the largest error outside of exact blocks."""
    blocks = grid.unpack(raw)
    if blocks.scales is not None:
        grids.check_finite(blocks.scales, where)
    stored = grid.dequantize(blocks)
    grids.check_finite(stored, where)
    if grid.has_scales:
        status = lattice.judge(values, blocks, dtype)
    else:
        size = grid.block_size if grid.block_size > 1 else values.shape[1]
        same = (lattice.round_to(stored, dtype) == values).reshape(len(values), -1, size).all(-1)
        status = np.where(same, lattice.EXACT, lattice.OFF_LATTICE)
    wrong = status != lattice.EXACT
    if not wrong.any():
        return status, 0.0
    shape = (*status.shape, -1)
    differences = stored.reshape(shape)[wrong].astype(np.float64) - values.reshape(shape)[wrong]
    return status, float(np.abs(differences).max())


def _row_slices(values: np.ndarray) -> Iterator[slice]:
    step = max(1, _SLICE_WEIGHTS // values.shape[1])
    return (slice(start, start + step) for start in range(0, len(values), step))


def _lattice_of(values: np.ndarray, dtype: str) -> str:
    if dtype not in _FLOATS:
        return f"stored as {dtype.lower()}"
    return identify.describe(values[identify.sample(*values.shape)], dtype)


def _utf8(name: str) -> str:
    """A name with bytes that are not UTF-8, which JSON cannot hold, as text."""
    return name.encode("utf-8", "replace").decode()
