"""Collects an importance matrix in llama.cpp: how large the inputs of every weight are while the model reads a text.

The same numbers as llama-imatrix: text is tokenized as one, cut into chunks of the context's length, and each chunk
begins with BOS where the model's tokenizer puts one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowbit import console, files, texts
from lowbit.checkpoint import open_checkpoint, resolve
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadOption, BadText, RuntimeFailed, Unsupported
from lowbit.measure.text import check_text, read_text
from lowbit.pack import imatrix as imatrices
from lowbit.pack import pack
from lowbit.pack.imatrix import Entry, Imatrix
from lowbit.run._products import Product
from lowbit.run.llama_cpp import LlamaCpp
from lowbit.verbs import make_callable

_UBATCH = 512
_BUNDLED_CHUNKS = 100  # of the bundled texts: minutes rather than hours, and more hardly changes the result


def imatrix(
    model: str | Path,
    out: str | Path,
    text: str | Path | None = None,
    *,
    chunks: int | None = None,
    context_size: int = 512,
    process_output: bool = False,
    output_format: str = "gguf",
    in_files: Sequence[str | Path] = (),
    threads: int | None = None,
) -> Imatrix:
    """Collects an importance matrix of ``model`` and writes it to ``out``.

    model: a GGUF, which is run as it is, or a Hugging Face folder, hub id or name, which is packed unquantized into a
    temporary file beside ``out``.
    text: a UTF-8 file; None is lowbit's bundled text (100 chunks unless ``chunks`` says more), or nothing if there are
    ``in_files``: then these are combined, and the model is not run.
    chunks: how many chunks of ``context_size`` tokens are read; None is the whole text.
    process_output: the head's inputs too, of a model that has one apart from the embedding.
    output_format: 'gguf', or 'dat' for programs from before 2025. in_files: earlier matrices of this model, to add to.
    threads: None means one a core.

    Raises NotFound, BadFile (an in-file of another model), BadText (empty, binary, shorter than a chunk), BadOption,
    Unsupported, RuntimeFailed, CannotWrite.
    """
    out = Path(out)
    if output_format not in imatrices.FORMATS:
        expected = "one of " + ", ".join(imatrices.FORMATS)
        raise BadOption("no such format of an imatrix", found=repr(output_format), expected=expected)
    for name, value, least in (("context_size", context_size, 16), ("chunks", 1 if chunks is None else chunks, 1)):
        if value < least:
            raise BadOption(f"impossible {name}", found=value, expected=f"at least {least}")
    files.check_writable(out)
    if text is not None:
        check_text(text)
    earlier = [imatrices.read(file) for file in in_files]
    parts = list(earlier)
    with _as_gguf(model, out, run=text is not None or not earlier) as (path, shapes):
        for part in earlier:
            part.check_shapes(shapes, model)
        if path is not None:
            collector = Collector(shapes, process_output=process_output)
            with LlamaCpp(
                path, context=context_size, ubatch=min(_UBATCH, context_size), threads=threads, observer=collector
            ) as runtime:
                tokens, datasets = _chunks(runtime, text, context_size, chunks)
                _run(runtime, tokens, collector)
            parts.append(collector.result(datasets, context_size))
    whole = imatrices.combine(parts, name=out.name, chunk_size=context_size)
    if not whole.entries:
        raise Unsupported("llama.cpp shows no product of a weight of this model", where=model)
    imatrices.write(whole, out, format=output_format)
    return whole


class Collector:
    """An observer that sums the squares of what flows into each weight of the layers.

    shapes: of the model's tensors, row-major, by GGUF name. process_output: of output.weight too.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, process_output: bool = False) -> None:
        self._shapes, self._process_output = shapes, process_output
        self._sums: dict[str, np.ndarray] = {}  # (n_mat, n) float64
        self._counts: dict[str, np.ndarray] = {}  # (n_mat,) int64
        self._shared: dict[int, np.ndarray] = {}  # sums of this decode's products by their source
        self._seen: dict[str, None] = {}  # weights of this decode, in order
        self._last: str | None = None

    def wants(self, weight: str) -> bool:
        return weight in self._shapes and (
            weight.startswith("blk.") or (self._process_output and weight == "output.weight")
        )

    def see(self, product: Product) -> bool:
        weight = product.weight
        if weight in self._seen:  # the next decode has begun
            self._shared.clear()
            self._seen.clear()
        self._seen[weight] = None
        shape = self._shapes[weight]
        n_mat = shape[0] if len(shape) == 3 else 1
        if weight not in self._sums:
            self._sums[weight], self._counts[weight] = np.zeros((n_mat, shape[-1])), np.zeros(n_mat, np.int64)
        if product.experts is not None:
            self._add_experts(weight, product.x, product.experts)
        elif n_mat > 1:
            raise Unsupported("stacked matrices without a choice of experts", where=weight)
        else:
            if product.source not in self._shared:
                self._shared[product.source] = np.einsum("ij,ij->j", product.x, product.x)
            self._sums[weight][0] += self._shared[product.source]
            self._counts[weight] += len(product.x)
        return weight != self._last

    def end_first_chunk(self) -> None:
        """From now on each decode ends after the last product that was wanted: no head is computed for nothing."""
        self._last = next(reversed(self._seen), None)

    def result(self, datasets: tuple[str, ...], chunk_size: int) -> Imatrix:
        """What was collected. Raises RuntimeFailed where an input was NaN or Inf."""
        entries = {}
        for weight, sums in self._sums.items():
            if not np.isfinite(sums.astype(np.float32)).all():
                raise RuntimeFailed("the inputs of a weight are not finite", where=weight, hint="Is the model damaged?")
            entries[weight] = Entry(sums.astype(np.float32), self._counts[weight])
        return Imatrix(name="", entries=entries, datasets=datasets, chunk_count=0, chunk_size=chunk_size)

    def _add_experts(self, weight: str, x: np.ndarray, experts: np.ndarray) -> None:
        """x (tokens, k, n), experts (tokens, n_used): a token's input counts for each expert that it is sent to."""
        used = experts.shape[1]
        for expert in np.unique(experts):
            token, slot = np.nonzero(experts == expert)
            inputs = x[token, slot % x.shape[1]] if used > 1 else x[token, 0]
            self._sums[weight][expert] += np.einsum("ij,ij->j", inputs, inputs)
            self._counts[weight][expert] += len(token)


@contextlib.contextmanager
def _as_gguf(model: str | Path, out: Path, *, run: bool) -> Iterator[tuple[Path | None, Mapping[str, tuple[int, ...]]]]:
    """The model's GGUF, None unless ``run``, and the shapes of its tensors by name."""
    path = resolve(model)
    if path.is_file() and path.suffix != ".safetensors":
        yield path if run else None, {name: entry.shape for name, entry in GgufFile(path).entries.items()}
        return
    with open_checkpoint(path) as checkpoint, contextlib.ExitStack() as after:
        shapes = {spec.gguf_name: spec.shape for spec in checkpoint.specs.values()}
        if not run:
            yield None, shapes
            return
        try:
            files.prepare_place(out)
            folder = after.enter_context(tempfile.TemporaryDirectory(prefix=out.name + ".", dir=out.parent))
        except OSError as error:
            raise files.cannot_write(out, error) from error
        yield pack(checkpoint, "source", Path(folder) / "model.gguf").path, shapes


def _chunks(
    runtime: LlamaCpp, text: str | Path | None, size: int, limit: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The text's full chunks, (chunks, size) int32, and what it is called. Of the bundled texts in turn."""
    if text is not None:
        each, names = [read_text(text, runtime).ids], [Path(text).name]
    else:
        each = [np.array(runtime.tokenize(whole), np.int32) for whole in texts.bundled()]
        names, limit = [name for name, _, _ in texts.BUNDLED], limit or _BUNDLED_CHUNKS
    parts = [ids[: len(ids) // size * size].reshape(-1, size) for ids in each]
    if not any(map(len, parts)):
        found, hint = f"{sum(map(len, each))} tokens", "Give a longer text or a smaller context"
        raise BadText("the text is too short", where=text, found=found, expected=f"at least {size}", hint=hint)
    turns = [(i, k) for k, part in enumerate(parts) for i in range(len(part))]
    found_chunks = np.stack([parts[k][i] for i, k in sorted(turns)[:limit]])
    if runtime.adds_bos:
        found_chunks[:, 0] = runtime.bos
    return found_chunks, tuple(names)


def _run(runtime: LlamaCpp, chunks: np.ndarray, collector: Collector) -> None:
    with console.progress("Collecting", len(chunks)) as bar:
        for done, tokens in enumerate(chunks, 1):
            for _ in runtime.logits(tokens):  # of all positions, for the last layer leaves out those without
                pass
            if done == 1:
                collector.end_first_chunk()
            bar.update(done, f"{done} of {len(chunks)} chunks")


make_callable(__name__)
