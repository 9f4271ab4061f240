"""The processes that train one model together, as torchrun and accelerate start them.

They agree on everything that decides how often they gather: what one of them measures or counts is process 0's
figure everywhere, so that none waits for a gathering that another does not join.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lowbit import console, launch
from lowbit.errors import RuntimeFailed

_T = TypeVar("_T")
_CPU = torch.device("cpu")
_began = False  # whether the group of processes is one that ``join`` made
# What gloo and NCCL say where a peer is gone.
_GONE = r"(?i)closed by peer|reset by peer|broken pipe|connection refused|socket|gloo|nccl|remote process"
_PATIENCE = datetime.timedelta(hours=2)  # process 0 may pack a large model while the others wait; the dead are noticed


@dataclass(frozen=True)
class World:
    """rank: this process, from 0. size: how many there are; 1 where there is no launcher."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    def share(self, value: _T) -> _T:
        """Process 0's value, everywhere. Every process must call."""
        if self.size == 1:
            return value
        held = [value if self.rank == 0 else None]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]  # type: ignore[return-value]

    def first(self, make: Callable[[], _T]) -> _T:
        """Does something in process 0 alone and gives every process what came of it."""
        return self.share(make() if self.rank == 0 else None)  # type: ignore[return-value]

    def wait(self) -> None:
        """Returns when every process has called it."""
        self.share(None)
        if self.size > 1:
            dist.barrier()

    def collect(self, tensors: dict[str, torch.Tensor], *, keep: bool = True) -> list[dict[str, torch.Tensor]]:
        """Every process's tensors, on the CPU, to process 0, in order; to the others as many empty ones.

        keep: whether this process has any.
        """
        if self.size == 1:
            return [tensors]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(tensors if keep else {}, gathered)
        return gathered if gathered is not None else [{}] * self.size

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


ALONE = World()


def join() -> World:
    """This process's place in the world that its launcher named; a world of one without a launcher.

    Processes other than the first say nothing from here on.
    """
    global _began
    if not dist.is_initialized() and launch.size() == 1:
        return World(device=_device(0))
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        _began = True
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return World(device=_device(0))
    if rank:
        console.set_quiet(True)
    device = _device(launch.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # lowbit shards the model itself; what `accelerate launch` was configured for would shard it once more.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return World(rank, size, device)


def leave(world: World) -> None:
    """Ends what ``join`` began, when the work is done; what somebody else began is left to them."""
    global _began
    if _began:
        world.wait()
        dist.destroy_process_group()
        _began = False


@contextlib.contextmanager
def together(world: World) -> Iterator[None]:
    """Within the block, the loss of another process is one line. Raises RuntimeFailed."""
    if world.size == 1:
        yield
        return
    before: Any = signal.SIG_DFL
    is_main = threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise _ended(world)

    if is_main:  # a launcher that notices a loss first ends the others with this signal
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RuntimeError as error:
        if not re.search(_GONE, str(error)):
            raise
        raise _ended(world) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _ended(world: World) -> RuntimeFailed:
    return RuntimeFailed(
        "the training was ended: another of its processes has gone, or the launcher was told to stop",
        where=f"process {world.rank} of {world.size}",
        hint="The same command goes on from here, with any number of processes",
    )


def is_first_to_speak() -> bool:
    """Whether no other process has said yet what ended them all; torchrun's store counts. True where it cannot be
    asked any more."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=datetime.timedelta(seconds=2),
        )  # fmt: skip
        return bool(store.add("lowbit/spoken", 1) == 1)
    except (RuntimeError, KeyError, ValueError):
        return True


def _device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
