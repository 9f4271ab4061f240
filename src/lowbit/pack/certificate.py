"""The certificate: what of a packed file is the source bit for bit, proved on the file's own bytes.

Every tensor of the source is read again, every block of the artifact is decoded as the runtime decodes it, and
``lattice.judge`` compares the two. Nothing here depends on who packed the file or how.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit import files
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.projector import open_projector
from lowbit.checkpoint.projectors import Projector
from lowbit.errors import BadFile, LowbitError, NotFound, Unsupported
from lowbit.pack.proof import TensorProof, prove_tensors
from lowbit.threads import available_cores, in_order, keep_freed_memory

FORMAT = "lowbit-certificate/1"
SUFFIX = ".certificate.json"


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


def verify(artifact: str | Path, source: Checkpoint | str | Path, *, threads: int | None = None) -> Certificate:
    """Proves a GGUF, made by whatever program, against the checkpoint that it was made from. Writes nothing.

    threads: how many work at it; by default as many as there are cores for this process.

    A certificate that lies beside the artifact must be the artifact's own and, where it is of the same source, say
    the same. Raises NotFound, Unsupported, or BadFile: not a GGUF or truncated, of another model, with NaN or Inf, or a
    certificate that is of another file or wrong.
    """
    if not isinstance(source, Checkpoint):
        with open_projector(source) if _is_projector(Path(artifact)) else open_checkpoint(source) as opened:
            return verify(artifact, opened, threads=threads)
    path = Path(artifact)
    if not path.is_file():
        raise NotFound("no such file", where=path, expected="a GGUF")
    _open(path, source).close()  # a damaged file is to be called that, and not another than its certificate's
    stated = _stated(path)
    proved = prove(path, source, threads=threads)
    if stated and stated.get("source_sha256") == proved.source_sha256 and stated.get("totals") != proved.totals:
        raise BadFile(
            "the certificate does not say what is so",
            where=path_beside(path), found=str(stated.get("totals"))[:200], expected=proved.totals, hint="Remove it",
        )  # fmt: skip
    return proved


def _is_projector(artifact: Path) -> bool:
    """Whether the file is an mmproj; False also for what cannot be read, which is then told where it is opened."""
    try:
        with contextlib.closing(GgufFile(artifact)) as file:
            return bool(file.values.get("general.architecture") == Projector.arch)
    except (OSError, LowbitError):
        return False


def prove(artifact: Path, source: Checkpoint, *, final: Path | None = None, threads: int | None = None) -> Certificate:
    """The certificate of the file ``artifact``, which will be called ``final``. Raises BadFile and Unsupported."""
    keep_freed_memory()
    label, threads = final or artifact, threads or available_cores()
    with contextlib.closing(_open(artifact, source)) as file:
        tensors = prove_tensors(file, source, str(label), threads)
    known = {spec.gguf_name for spec in source.specs.values()} | set(source.family.computed(source.config))
    for extra in sorted(set(file.entries) - known):
        dtype = file.entries[extra].dtype.lower()
        tensors.append(TensorProof(name=_utf8(extra), type=dtype, note="the source has no such tensor"))
    artifact_sha256, *hashes = _sha256((artifact, *_source_files(source)), threads)
    return Certificate(
        source=_utf8(source.name),
        artifact=_utf8(label.name),
        source_sha256=_joined(source, hashes),
        artifact_sha256=artifact_sha256,
        tensors=tuple(tensors),
    )


def source_sha256(source: Checkpoint, *, threads: int | None = None) -> str:
    """SHA-256 of the source's one file; of several, that of the text `sha256sum *.safetensors` prints in the folder."""
    return _joined(source, _sha256(_source_files(source), threads or available_cores()))


def _source_files(source: Checkpoint) -> list[Path]:
    return [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))


def _sha256(paths: Iterable[Path], threads: int) -> list[str]:
    return list(in_order((functools.partial(files.sha256, path) for path in paths), threads))


def _joined(source: Checkpoint, hashes: list[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    names = (path.name for path in _source_files(source))
    listing = "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
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
        if entry.shape != spec.gguf_shape:
            raise BadFile(
                "not the source's shape", where=where, found=list(entry.shape), expected=list(spec.gguf_shape),
                hint="Is it made from this source?",
            )  # fmt: skip
    return file


def _utf8(name: str) -> str:
    """A name with bytes that are not UTF-8, which JSON cannot hold, as text."""
    return name.encode("utf-8", "replace").decode()
