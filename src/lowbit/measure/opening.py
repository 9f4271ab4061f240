"""Which runtime an artifact or a reference is opened in to be measured, with what, and what it says of itself."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lowbit import checkpoint, console, files, pack, run
from lowbit.errors import BadFile, Unsupported
from lowbit.measure.text import Text, read_text
from lowbit.run.base import Runtime, Suits
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.units import bits_per_weight


class Asked(Protocol):
    """What of MeasureOptions decides how a model is opened."""

    @property
    def chunk(self) -> int: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def kv_type(self) -> str: ...
    @property
    def runtime(self) -> str | None: ...
    @property
    def reference_runtime(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def api_key_env(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something to open: its path or URL, the runtime, and the options it is opened with."""

    target: str | Path
    runtime: type[Runtime]
    options: dict[str, Any]

    def open(self) -> Runtime:
        return run.open_artifact(self.target, self.runtime.name, **self.options)


def artifact(target: str | os.PathLike[str], asked: Asked) -> Artifact:
    """``target`` in the runtime that is asked for, or the one that it is for."""
    target = run.existing(target)
    runtime = run.runtime_for(target, asked.runtime)
    # A type that the runtime cannot have is refused when it is opened; the one that means "as ever" is not.
    kv_type = asked.kv_type if asked.kv_type != "f16" or "kv_type" in run.options_of(runtime) else None
    return Artifact(target=target, runtime=runtime, options=_options(runtime, asked) | {"kv_type": kv_type})


@contextlib.contextmanager
def reference(against: str | os.PathLike[str], first: Artifact, asked: Asked) -> Iterator[Artifact]:
    """What the artifacts are compared with.

    A file is run as it is. A checkpoint is run in the runtime that is asked for, by default the first artifact's, in
    float32; for one that does not run folders it is packed as F32 into a temporary folder and run in llama.cpp.
    """
    found = run.existing(against)
    runtime = run.get(asked.reference_runtime) if asked.reference_runtime else first.runtime
    if run.is_url(found):
        raise Unsupported(
            "an endpoint cannot be the reference: it gives no logits", where=found, expected="a file or a folder"
        )
    if not Path(found).is_dir():
        runtime = run.runtime_for(found, asked.reference_runtime)
        if not runtime.gives_logits:
            raise Unsupported(f"{runtime.name} cannot run the reference: it gives no logits", where=found)
    elif runtime.gives_logits and runtime.suits(found) is not Suits.NO:
        exact = {"dtype": "float32"} if "dtype" in run.options_of(runtime) else {}
        yield Artifact(target=found, runtime=runtime, options=_options(runtime, asked) | exact)
        return
    else:
        runtime = LlamaCpp
    options = _options(runtime, asked)
    if not Path(found).is_dir():
        yield Artifact(target=found, runtime=runtime, options=options)
        return
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        console.log(f"Packing {against} as F32 to measure against ...")
        packed = Path(folder) / "reference.gguf"
        pack.pack(checkpoint.resolve(os.fspath(against)), "f32", packed)
        yield Artifact(target=packed, runtime=runtime, options=options)


def _options(runtime: type[Runtime], asked: Asked) -> dict[str, Any]:
    threads = asked.threads if runtime.uses_threads else None
    local = {"context": asked.chunk, "ubatch": min(512, asked.chunk), "threads": threads}
    wanted = {**local, "model": asked.model, "api_key_env": asked.api_key_env}
    return {name: value for name, value in wanted.items() if name in run.options_of(runtime)}


_HINT = "Measure an artifact against the model that it was made from"


def check_vocabulary(model: Runtime, reference: Runtime) -> None:
    """Raises BadFile where the two do not have vocabularies of one size."""
    if model.n_vocab != reference.n_vocab:
        raise BadFile(
            "its vocabulary is not the reference's",
            where=model.path,
            found=f"{model.n_vocab} tokens",
            expected=f"{reference.n_vocab} as in {reference.path}",
            hint=_HINT,
        )


def check_tokens(model: Runtime, reference: Runtime, text: Text) -> None:
    """Raises BadFile where the two cut the text into other tokens; Unsupported where the runtime does not tokenize."""
    ids = read_text(text.path, model).ids
    starts = [m.bos if m.gives_logits and m.adds_bos else None for m in (model, reference)]
    if (model.gives_logits and starts[0] != starts[1]) or not np.array_equal(ids, text.ids):
        raise BadFile(
            "its tokenizer cuts the text otherwise than the reference's",
            where=model.path,
            found=f"{len(ids)} tokens",
            expected=f"the {len(text.ids)} tokens of {reference.path}",
            hint=_HINT,
        )


def described(model: Runtime) -> dict[str, Any]:
    """What identifies an artifact in a result; of a folder the hash is ``files.folder_sha256``."""
    runtime = {"name": model.name, "version": model.version}
    if isinstance(model.path, str):  # an endpoint: what it runs cannot be hashed
        model_there = getattr(model, "model", None)
        return {"path": model.path, "model": model_there, "runtime": runtime, "sha256": None, "size_bytes": None,
                "bits_per_weight": _bits(model)}  # fmt: skip
    path = model.path
    sha256, size = (files.folder_sha256, files.folder_bytes) if path.is_dir() else (files.sha256, _file_bytes)
    return {
        "path": str(path),
        "runtime": runtime,
        "sha256": sha256(path),
        "size_bytes": size(path),
        "bits_per_weight": _bits(model),
    }


def _bits(model: Runtime) -> float | None:
    stored, weights = model.model_bytes, model.n_weights
    return bits_per_weight(stored, weights) if stored is not None and weights else None


def _file_bytes(path: Path) -> int:
    return path.stat().st_size
