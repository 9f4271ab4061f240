"""Several processes that train together, for tests: as torchrun would start them, but from a server that has imported
torch already."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATIENCE = 240.0


def together(n: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """Runs ``work(*arguments)`` in n processes of one world; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowbit.train", "lowbit.train.sharded_run"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = [context.Process(target=_in_world, args=(rank, n, port, work, arguments)) for rank in range(n)]
    for process in each:
        process.start()
    for process in each:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in each]


def _in_world(rank: int, n: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if n > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()})
    import torch

    torch.set_num_threads(1)
    work(*arguments)


def train_one(model: Path, out: Path, options: dict[str, Any], saved_at: int = 0, killed_at: int = 0) -> None:
    """A training; process 0 leaves its curve beside ``out``. saved_at, killed_at: steps to save and to die after."""
    import lowbit
    from lowbit.train import TrainOptions

    if killed_at:
        _die_after(saved_at, killed_at)
    found = lowbit.train(model, out, options=TrainOptions(**options))
    if os.environ.get("RANK", "0") == "0":
        out.with_suffix(".json").write_text(json.dumps(found.record), encoding="utf-8")


def _die_after(saved_at: int, killed_at: int) -> None:
    from transformers import TrainerCallback

    from lowbit.train.loop import DistillationTrainer

    class SaveThenDie(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == saved_at
            if state.global_step == killed_at:
                sys.stderr.flush()
                os._exit(9)

    plain = DistillationTrainer.__init__

    def init(self: Any, *positional: Any, **named: Any) -> None:
        plain(self, *positional, **named)
        self.add_callback(SaveThenDie())

    DistillationTrainer.__init__ = init  # type: ignore[method-assign]
