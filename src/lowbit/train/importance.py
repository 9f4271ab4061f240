"""What each weight does to the output: second moments of a matrix's inputs, each token weighted by the loss's slope.

The KLD that errors E of a matrix cause is, to second order, half of sum_t (g_t . E x_t)^2, x_t what flows in at token t
and g_t the gradient, at what flows out, of the loss of a label drawn from the model's own distribution (the Fisher
information; Martens 2020). With one weight a token, mean g_t^2, that is 1/2 tr(E H E^T), H = mean g_t^2 x_t x_t^T:
the loss that ``lowbit.compensate`` makes small, in nats a token. Unweighted moments are what llama.cpp's imatrix
has a diagonal of; a few tokens with enormous activations decide them, and with them rounding gets worse (dev/LOG.md).
An expert has moments of its own, of the tokens that were routed to it; their means too are over all tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from lowbit import __version__, console
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.safetensors_file import Layout, read_header
from lowbit.partial import Partial, resumable
from lowbit.run._hf_model import load
from lowbit.train import data
from lowbit.train.model import load_tokenizer
from lowbit.train.moments import Pass, Site, model_shapes, sites
from lowbit.train.storage import save_tensors

_PASS_BYTES = 4 << 30  # of moments held in memory; a model with more is gone over once for every 4 GiB
_SAVE_EVERY = 60.0  # seconds of a pass between two saves, or more where saving takes long
_SAVING = 20  # times as long as the last save took


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """sequences: of the text, ``sequence_length`` tokens each. minutes: after which the rest is left out, or None.
    precision: of the products, 'auto', 'float32' or 'bfloat16'."""

    sequences: int = 96
    sequence_length: int = 512
    minutes: float | None = None
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0


def collect(checkpoint: Checkpoint, out: Path, text: str | None, options: CollectOptions) -> int:
    """Writes the moments of every matrix of ``checkpoint``'s layers to ``out`` (see ``lowbit.pack.calibration``) and
    returns the number of tokens they are of.

    text: the user's data as ``lowbit train --data`` takes it; None is the text that comes with lowbit.
    Interrupted or killed, the same call goes on: OUT.partial holds the passes that are whole, OUT.partial.sums what the
    one under way had added up a minute ago at most.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    n, length = options.sequences, options.sequence_length
    if text is None:
        sequences = data.bundled_sequences(tokenizer, length)[:n]
    else:
        sequences = data.load_sequences(text, tokenizer, length, n)
    return collect_of(model, checkpoint, sequences, out, options)


def collect_of(
    model: Any,
    checkpoint: Checkpoint,
    sequences: np.ndarray,
    out: Path,
    options: CollectOptions,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """The same of token ``sequences`` (n, length) and of ``model``, the checkpoint's, whose weights are left without
    gradients. tick: called after each sequence."""
    passes = list(_passes(sites(model, checkpoint)))
    shapes = {f"{site.name}.{part}": s for each in passes for site in each for part, s in site.shapes().items()}
    layout = Layout({name: ("F32", s) for name, s in (shapes | model_shapes(model, checkpoint)).items()})
    asked = {
        "lowbit": __version__, "source": [file.identity for file in checkpoint.files], "minutes": options.minutes,
        "text": hashlib.sha256(sequences.tobytes()).hexdigest(), "sequence_length": sequences.shape[1],
        "seed": options.seed, "precision": options.precision, "passes": [len(each) for each in passes],
        "header": hashlib.sha256(layout.header({})).hexdigest(),
    }  # fmt: skip
    parts = [f"pass {i}" for i in range(len(passes))]
    rows = torch.from_numpy(sequences).long()
    with resumable(out, layout.n_bytes, [(0, layout.header({}))], parts, asked) as file, _sums_of(file) as sums:
        owner = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        run = _Run(file, sums, owner, rows, layout, options, tick)
        with console.progress("Collecting", len(passes) * len(rows), "sequences") as bar:
            for i, (part, chosen) in enumerate(zip(parts, passes, strict=True)):
                bar.advance(len(rows) if part in file.done else 0)
                if part not in file.done:
                    work = Pass(model, chosen, checkpoint, options.precision, options.seed)
                    run.over_the_text(work, part, passes_left=len(passes) - i, bar=bar)
                    run.write(work, part, last=i == len(passes) - 1)
        file.sync()
        return int(read_header(file.path)[1]["tokens"])


def _passes(found: list[Site]) -> Iterator[list[Site]]:
    """Sites in order of execution, as many at a time as there is room for their moments."""
    chosen: list[Site] = []
    room = _PASS_BYTES
    for site in found:
        if chosen and site.n_bytes > room:
            yield chosen
            chosen, room = [], _PASS_BYTES
        chosen.append(site)
        room -= site.n_bytes
    if chosen:
        yield chosen


@contextlib.contextmanager
def _sums_of(file: Partial) -> Iterator[Path]:
    """The file beside the partial one for a pass under way; like that one it stays only where the run was cut off."""
    path = file.path.with_name(file.path.name + ".sums")
    try:
        yield path
    except Exception:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


class _Run:
    """A collection under way: what is saved of it, and the time it may take, that of killed runs included."""

    def __init__(
        self,
        file: Partial,
        sums: Path,
        owner: str,
        rows: torch.Tensor,
        layout: Layout,
        options: CollectOptions,
        tick: Callable[[], None],
    ) -> None:
        self.file, self.sums, self.rows, self.layout, self.tick = file, sums, rows, layout, tick
        self.minutes = options.minutes
        self.started = self.saved = time.monotonic()
        self.saving = 0.0
        self.owner = owner  # what was asked: sums of the same are the same
        self.earlier, self.left = 0.0, ("", 0)  # seconds of earlier runs; of which pass they left how many sequences
        if sums.exists():
            with safetensors.safe_open(sums, "pt") as stored:
                told = stored.metadata() or {}
            if told.get("owner") == self.owner:
                self.earlier, self.left = float(told["seconds"]), (told["part"], int(told["sequences"]))

    def over_the_text(self, work: Pass, part: str, *, passes_left: int, bar: Any) -> None:
        begin = self._restore(work, part)
        if begin:
            console.log(f"going on, {begin} of {len(self.rows)} sequences are there")
        bar.advance(begin)
        left = None if self.minutes is None else (60 * self.minutes - self._spent()) / passes_left
        until = None if left is None else time.monotonic() + left
        with work.watching():
            for i in range(begin, len(self.rows)):
                if work.tokens and until is not None and time.monotonic() > until:
                    break
                work.add(self.rows[i][None])
                bar.advance(1)
                self.tick()
                if time.monotonic() - self.saved > max(_SAVE_EVERY, _SAVING * self.saving):
                    self._save(part, i + 1, work.state())

    def write(self, work: Pass, part: str, *, last: bool) -> None:
        """A pass that is whole: its means, and in the header how many tokens they are of."""
        self.file.write(0, memoryview(self.layout.header({"format": "pt", "tokens": str(work.tokens)})))
        for name, values in work.results(last=last):
            data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
            self.file.write(self.layout.offsets[name], data.data)
        self.file.finish_part(part)
        self.file.sync()  # the sums go next: by then the journal has to know of the pass
        self.left = ("", 0)
        self._save("", 0, {})  # the time that it took

    def _spent(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def _save(self, part: str, done: int, state: dict[str, torch.Tensor]) -> None:
        begin = time.monotonic()
        told = {"owner": self.owner, "part": part, "sequences": str(done), "seconds": str(self._spent())}
        save_tensors(state, self.sums, told)
        self.saved = time.monotonic()
        self.saving = self.saved - begin

    def _restore(self, work: Pass, part: str) -> int:
        """How many sequences of the pass an earlier run has added up; 0 where nothing of it is left."""
        if self.left[0] != part:
            return 0
        with safetensors.safe_open(self.sums, "pt") as stored:
            work.restore(stored.get_tensor)
        return self.left[1]
