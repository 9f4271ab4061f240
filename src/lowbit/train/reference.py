"""The reference (teacher), run once: what it says at each position is kept on disk.

Rows are computed in order and counted, so a run that was killed goes on at the row it had reached. What is kept of each
is for the form to say (``lowbit.train.forms``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lowbit.files import cannot_write, write_json
from lowbit.train.forms import Form, Targets
from lowbit.train.precision import autocast
from lowbit.train.world import ALONE, World

# What a reference says of sequences (B, T), of which the first is the data's sequence of that number.
Ask = Callable[[np.ndarray, int], dict[str, torch.Tensor]]


class OwnReference:
    """A reference in this process: what ``model`` says, in the form that is kept.

    head: the model's (vocabulary, width) in ``dtype``, where the model does not hold all of it.
    """

    def __init__(self, model: Any, dtype: torch.dtype, form: Form, head: torch.Tensor | None = None) -> None:
        self.model, self.dtype, self.form = model, dtype, form
        self.head = model.get_output_embeddings().weight.detach().to(dtype) if head is None else head

    @torch.no_grad()
    def __call__(self, sequences: np.ndarray, first: int) -> dict[str, torch.Tensor]:
        device = self.head.device
        tokens = torch.from_numpy(sequences.astype(np.int64)).to(device)
        with autocast(device, self.dtype):
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state.float()
        return self.form.said(hidden, self.head, sequences, first)


class Kept(Protocol):
    """What a reference said, of sequences by their number."""

    def targets(self, rows: torch.Tensor, head: torch.Tensor | None, device: torch.device) -> Targets: ...


class ReferenceCache:
    """Targets for (n, length) token sequences, on disk in ``folder``.

    Each array of ``form`` is a file of its name. keeps: whether this process writes the files; where another does, they
    are there already.
    """

    def __init__(self, folder: Path, n: int, length: int, form: Form, *, keeps: bool = True) -> None:
        self.folder, self.n, self.form, self.keeps = folder, n, form, keeps
        folder.mkdir(parents=True, exist_ok=True)
        shapes = form.arrays(n, length)
        self.done = 0
        if all((folder / f"{name}.npy").exists() for name in shapes) and (folder / "rows.json").exists():
            self.done = int((folder / "rows.json").read_text())
        self._arrays: dict[str, Any] = {}
        for name, (shape, dtype) in shapes.items():
            path = folder / f"{name}.npy"
            if not keeps:
                self._arrays[name] = np.lib.format.open_memmap(path, mode="r")
            elif path.exists() and self.done:
                self._arrays[name] = np.lib.format.open_memmap(path, mode="r+")
            else:
                self._arrays[name] = _create(path, shape, dtype)

    def fill(
        self,
        ask: Ask,
        sequences: np.ndarray,
        *,
        until: int | None = None,
        batch: int = 4,
        may_go_on: Callable[[int], bool] = lambda _: True,
        world: World = ALONE,
    ) -> int:
        """Asks the reference about rows not yet done, up to row ``until``; stops where ``may_go_on(done)`` is false.

        world: processes that share the rows, each a batch of its own; the one that keeps the files gathers them.
        Returns the number of rows done.
        """
        until = self.n if until is None else until
        noted = self.done
        while self.done < until and world.share(may_go_on(self.done)):
            parts = [
                slice(min(until, start), min(until, start + batch))
                for start in range(self.done, self.done + world.size * batch, batch)
            ]
            own = parts[world.rank]
            has = own.start < own.stop
            part = (
                own if has else parts[0]
            )  # where there is nothing left to do, a process joins the others all the same
            answers = ask(sequences[part], part.start)
            for each, of_part in zip(parts, world.collect(answers, keep=has), strict=True):
                for name, values in of_part.items() if self.keeps else ():
                    self._arrays[name][each] = values.numpy()
            self.done = parts[-1].stop
            if self.done - noted >= 8 * batch:
                self.flush()
                noted = self.done
        self.flush()
        world.wait()
        return self.done

    def flush(self) -> None:
        if not self.keeps:
            return
        for array in self._arrays.values():
            array.flush()
        write_json(self.folder / "rows.json", self.done)

    def targets(self, rows: torch.Tensor, head: torch.Tensor | None, device: torch.device) -> Targets:
        """What the reference says at all positions of ``rows``, one after the other. head: its own, where the form
        needs it."""
        index = rows.cpu().numpy()
        return self.form.targets({name: array[index] for name, array in self._arrays.items()}, head, device)


def _create(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array on disk that owns its room: a full disk met while writing to a mapped hole kills the process."""
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    return array
