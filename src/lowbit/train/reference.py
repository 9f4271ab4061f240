"""The reference (teacher), run once: what it says at each position is kept on disk.

Kept are its final hidden states, from which its head gives the exact probabilities, or its k likeliest tokens. Rows
are computed in order and counted, so a run that was killed goes on at the row it had reached.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.files import cannot_write, write_json
from lowbit.train.loss import HiddenTargets, TopKTargets, top_k_targets
from lowbit.train.precision import autocast
from lowbit.train.world import ALONE, World


class ReferenceCache:
    """Targets for (n, length) token sequences, on disk in ``folder``.

    hidden.npy: (n, length, width) float16, or tokens.npy (n, length, k) int32 and logp.npy (n, length, k) float32.
    keeps: whether this process writes the files; where another does, they are there already.
    """

    def __init__(
        self, folder: Path, n: int, length: int, width: int, top_k: int | None = None, *, keeps: bool = True
    ) -> None:
        self.folder, self.n, self.top_k, self.keeps = folder, n, top_k, keeps
        folder.mkdir(parents=True, exist_ok=True)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {"hidden": ((n, length, width), np.float16)}
        if top_k is not None:
            shapes = {"tokens": ((n, length, top_k), np.int32), "logp": ((n, length, top_k), np.float32)}
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

    @torch.no_grad()
    def fill(
        self,
        model: Any,
        sequences: np.ndarray,
        dtype: torch.dtype,
        head: torch.Tensor | None = None,
        *,
        until: int | None = None,
        batch: int = 4,
        may_go_on: Callable[[int], bool] = lambda _: True,
        world: World = ALONE,
    ) -> int:
        """Runs the reference over rows not yet done, up to row ``until``; stops where ``may_go_on(done)`` is false.

        head: the reference's (vocabulary, width) in ``dtype``, where the model does not hold all of it. world:
        processes that share the rows, each a batch of its own; the one that keeps the files gathers them. Returns the
        number of rows done.
        """
        until = self.n if until is None else until
        head = model.get_output_embeddings().weight.to(dtype) if head is None else head
        noted = self.done
        while self.done < until and world.share(may_go_on(self.done)):
            parts = [
                slice(min(until, start), min(until, start + batch))
                for start in range(self.done, self.done + world.size * batch, batch)
            ]
            own = parts[world.rank]
            # Where there is nothing left to do, a process joins the others' gathering all the same.
            answers = self._ask(model, sequences[own if own.start < own.stop else parts[0]], dtype, head)
            for part, of_part in zip(parts, world.collect(answers, keep=own.start < own.stop), strict=True):
                for name, values in of_part.items() if self.keeps else ():
                    self._arrays[name][part] = values.numpy()
            self.done = parts[-1].stop
            if self.done - noted >= 8 * batch:
                self.flush()
                noted = self.done
        self.flush()
        world.wait()
        return self.done

    def _ask(
        self, model: Any, sequences: np.ndarray, dtype: torch.dtype, head: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the reference says of some sequences, as the arrays keep it."""
        device = head.device
        tokens = torch.from_numpy(sequences.astype(np.int64)).to(device)
        with autocast(device, dtype):
            hidden = model.model(tokens, use_cache=False).last_hidden_state.float()
        if self.top_k is None:
            return {"hidden": hidden.half().cpu()}
        top, log_p = top_k_targets(hidden.flatten(0, 1), head, self.top_k)
        shape = (*tokens.shape, self.top_k)
        return {"tokens": top.reshape(shape).cpu(), "logp": log_p.reshape(shape).cpu()}

    def flush(self) -> None:
        if not self.keeps:
            return
        for array in self._arrays.values():
            array.flush()
        write_json(self.folder / "rows.json", self.done)

    def targets(self, rows: torch.Tensor, head: torch.Tensor) -> HiddenTargets | TopKTargets:
        """What the reference says at all positions of ``rows``, one after the other."""
        index = rows.cpu().numpy()
        device = head.device
        if self.top_k is None:
            hidden = torch.from_numpy(self._arrays["hidden"][index]).to(device)
            return HiddenTargets(hidden.flatten(0, 1), head)
        tokens = torch.from_numpy(self._arrays["tokens"][index].astype(np.int64)).to(device)
        log_p = torch.from_numpy(self._arrays["logp"][index]).to(device)
        return TopKTargets(tokens.flatten(0, 1), log_p.flatten(0, 1))


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
