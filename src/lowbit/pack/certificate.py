"""The certificate: what of a packed file or folder is the source bit for bit, proved on the artifact's own bytes.

Every tensor of the source is read again, every block of the artifact is decoded as the runtime decodes it, and
``lattice.judge`` compares the two. Nothing here depends on who packed the file or how.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit import files
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.litertlm_file import is_litertlm
from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.projector import open_projector
from lowbit.checkpoint.projectors import Projector
from lowbit.errors import BadFile, LowbitError, NotFound, Unsupported
from lowbit.pack import model_folder
from lowbit.pack.proof import FolderTensor, GgufTensor, LiteRtTensor, Tensor, TensorProof, prove_computed, prove_tensors
from lowbit.threads import in_order, keep_freed_memory, thread_count

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
    """Where the certificate of ``artifact`` lies: in a folder, or beside a file as OUT.gguf.certificate.json."""
    path = Path(artifact)
    if path.is_dir():
        return path / model_folder.CERTIFICATE
    return path.with_name(path.name + SUFFIX)


def verify(artifact: str | Path, source: Checkpoint | str | Path, *, threads: int | None = None) -> Certificate:
    """Proves a GGUF, a .litertlm or a folder (MLX, compressed-tensors), made by whatever program, against the
    checkpoint that it was made from. Writes nothing.

    threads: how many work at it; by default as many as there are cores for this process.

    A certificate that lies beside the artifact must be the artifact's own and, where it is of the same source, say
    the same. Raises NotFound, Unsupported, or BadFile: not a GGUF or truncated, of another model, with NaN or Inf, or a
    certificate that is of another file or wrong.
    """
    if not isinstance(source, Checkpoint):
        with open_projector(source) if _is_projector(Path(artifact)) else open_checkpoint(source) as opened:
            return verify(artifact, opened, threads=threads)
    path = Path(artifact)
    if not path.exists():
        raise NotFound("no such file", where=path, expected="a GGUF, a .litertlm or a folder")
    _open(path, source).close()  # a damaged file is to be called that, and not another than its certificate's
    stated = stated_of(path)
    proved = prove(path, source, threads=threads)
    if stated and stated.get("source_sha256") == proved.source_sha256:
        _check_stated(stated, proved, path_beside(path))
    return proved


def _is_projector(artifact: Path) -> bool:
    """Whether the file is an mmproj; False also for what cannot be read, which is then told where it is opened."""
    try:
        with contextlib.closing(GgufFile(artifact)) as file:
            return bool(file.values.get("general.architecture") == Projector.arch)
    except (OSError, LowbitError):
        return False


def prove(artifact: Path, source: Checkpoint, *, final: Path | None = None, threads: int | None = None) -> Certificate:
    """The certificate of the file or folder ``artifact``, which will be called ``final``.

    Raises BadFile and Unsupported.
    """
    keep_freed_memory()
    label, threads = final or artifact, thread_count(threads)
    with contextlib.closing(_open(artifact, source)) as opened:
        tensors = prove_tensors(_tensors(opened, source, str(label)), source.n_weights, threads)
        if isinstance(opened, GgufFile):
            computed = source.family.computed(source.config)
            tensors += [prove_computed(opened, name, values, f"{label}: {name}") for name, values in computed.items()]
        tensors += [
            TensorProof(name=_utf8(name), type=kind.lower(), note="the source has no such tensor")
            for name, kind in _extra(opened, source)
        ]
    hashes = _sha256((*_hashed(artifact), *_source_files(source)), threads)
    n_own = len(_hashed(artifact))
    return Certificate(
        source=_utf8(source.name),
        artifact=_utf8(label.name),
        source_sha256=_joined(_source_files(source), hashes[n_own:]),
        artifact_sha256=_joined(_hashed(artifact), hashes[:n_own]),
        tensors=tuple(tensors),
    )


def _tensors(opened: GgufFile | Checkpoint, source: Checkpoint, label: str) -> list[Tensor]:
    if isinstance(opened, Checkpoint):
        kind = LiteRtTensor if opened.kind == "litert-lm" else FolderTensor
        return [kind(opened, source, spec, label) for spec in source.specs.values()]
    return [GgufTensor(opened, source, spec, label) for spec in source.specs.values()]


def _extra(opened: GgufFile | Checkpoint, source: Checkpoint) -> list[tuple[str, str]]:
    """Name and type of the tensors that only the artifact has."""
    if isinstance(opened, Checkpoint):
        return [(name, opened.info(name).dtype) for name in opened.names if name not in source]
    known = {spec.gguf_name for spec in source.specs.values()} | set(source.family.computed(source.config))
    return [(name, opened.entries[name].dtype) for name in sorted(set(opened.entries) - known)]


def source_sha256(source: Checkpoint, *, threads: int | None = None) -> str:
    """SHA-256 of the source's one file; of several, that of the text `sha256sum *.safetensors` prints in the folder."""
    return _joined(_source_files(source), _sha256(_source_files(source), thread_count(threads)))


def _source_files(source: Checkpoint) -> list[Path]:
    return [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))


def _hashed(artifact: Path) -> list[Path]:
    """The files whose hash is the artifact's; of a folder config.json too, as it says what the codes mean."""
    if artifact.is_file():
        return [artifact]
    return [artifact / "config.json", *sorted(artifact.glob("*.safetensors"))]


def _sha256(paths: Iterable[Path], threads: int) -> list[str]:
    return list(in_order((functools.partial(files.sha256, path) for path in paths), threads))


def _joined(paths: list[Path], hashes: list[str]) -> str:
    """The hash of the one file; of several, that of the text `sha256sum` prints of them."""
    if len(hashes) == 1:
        return hashes[0]
    listing = "".join(f"{digest}  {path.name}\n" for digest, path in zip(hashes, paths, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def stated_of(artifact: Path) -> dict[str, Any] | None:
    """The certificate beside the artifact, if there is one, as JSON. Raises BadFile where it is of another file."""
    path = path_beside(artifact)
    if not path.exists():
        return None
    stated = read_json(path, BadFile)
    if stated.get("format") != FORMAT:
        raise BadFile("not a certificate", where=path, found=str(stated.get("format"))[:40], expected=FORMAT)
    found = _joined(_hashed(artifact), _sha256(_hashed(artifact), thread_count(None)))
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


def _open(artifact: Path, source: Checkpoint) -> GgufFile | Checkpoint:
    """The artifact, which has every tensor of the source in its shape. Raises NotFound, Unsupported, BadFile."""
    with contextlib.suppress(OSError):
        if artifact.is_dir() or is_litertlm(artifact):
            return _open_model(artifact, source)
    return _open_gguf(artifact, source)


def _open_model(artifact: Path, source: Checkpoint) -> Checkpoint:
    """A folder or a .litertlm."""
    if artifact.is_dir() and not (artifact / "config.json").is_file():
        raise BadFile("not a model folder", where=artifact, expected="config.json")
    folder = open_checkpoint(artifact)
    try:
        shapes = {name: spec.shape for name, spec in folder.specs.items()}
        _check(artifact, folder.family.arch, {spec.name: spec for spec in source.specs.values()}, shapes, source)
    except BaseException:
        folder.close()
        raise
    return folder


def _open_gguf(artifact: Path, source: Checkpoint) -> GgufFile:
    try:
        file = GgufFile(artifact)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=artifact) from error
    if file.values.get("split.count", 0) not in (0, 1):
        hint = "Join the parts with llama-gguf-split --merge"
        raise Unsupported("a GGUF split into several files", where=artifact, hint=hint)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    named = {spec.gguf_name: spec for spec in source.specs.values()}
    _check(artifact, file.values.get("general.architecture"), named, shapes, source)
    return file


def _check(
    artifact: Path,
    arch: object,
    expected: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    source: Checkpoint,
) -> None:
    """Raises BadFile where the artifact is of another model. expected: the source's tensors by the artifact's names."""
    if arch != source.family.arch:
        raise BadFile("not the source's model", where=artifact, found=str(arch)[:40], expected=source.family.arch)
    hint = "Is it made from this source?"
    for name, spec in expected.items():
        found, where = shapes.get(name), f"{artifact}: {name}"
        if found is None:
            raise BadFile("a tensor of the source is missing", where=where, hint=hint)
        wanted = spec.gguf_shape  # which only a projector's tensors have another of in Hugging Face's layout
        if found != wanted:
            raise BadFile("not the source's shape", where=where, found=list(found), expected=list(wanted), hint=hint)


def _utf8(name: str) -> str:
    """A name with bytes that are not UTF-8, which JSON cannot hold, as text."""
    return name.encode("utf-8", "replace").decode()
