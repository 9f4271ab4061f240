"""Ray's side of batches and trainings: a cluster is joined, its nodes are listed, what Ray says is put into a line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lowbit.errors import BadOption

_SECONDS = 5.0  # for a connection to the head
_T = TypeVar("_T")


@dataclass(frozen=True)
class Node:
    """Of a cluster. address: for people. cpus, gpus: what Ray may give away of it."""

    id: str
    address: str
    cpus: float
    gpus: float


def library(where: str = "--engine ray", extra: str = "ray") -> Any:
    """The package ray, without its noise. Raises BadOption where it is not installed, naming who asks and the extra.

    Call it first in the main thread, and before signal handlers are set: the import sets one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise BadOption("ray is not installed", where=where, hint=f"Run: pip install 'lowbit[{extra}]'") from None
    return ray


async def aside(work: Callable[[], _T], seconds: float) -> _T:
    """What ``work`` gives, from a thread that nothing waits for when the process ends: without its head a cluster's
    calls hang. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if not found.done():
            found.set_exception(error) if error is not None else found.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wait_for(found, seconds)


def later(work: Callable[[], Any]) -> None:
    """Has it done in a thread that nobody waits for, whatever comes of it."""

    def run() -> None:
        with contextlib.suppress(Exception):
            work()

    threading.Thread(target=run, daemon=True).start()


def keep_signals() -> None:
    """Joining a cluster has Ray's C++ part print a stack at SIGTERM, before Python hears of it. What Python had is put
    back, where this is the main thread."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.siginterrupt(signal.SIGTERM, False)  # as asyncio has it


def address_of(given: str | None) -> str:
    """Of the cluster that is meant, as Ray's own commands have it."""
    return given or os.environ.get("RAY_ADDRESS") or "auto"


def head_answers() -> bool:
    """Whether the head of the joined cluster takes connections."""
    with contextlib.suppress(OSError):
        _knock(library().get_runtime_context().gcs_address)
        return True
    return False


def _knock(address: str) -> None:
    """Connects to HOST:PORT. Raises OSError, OverflowError (no such port)."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()


def connect(address: str, *, shows: bool = False, tells: bool = False) -> bool:
    """Joins the cluster; False where this process is in one already, which then stays as it is. Raises BadOption.

    shows: whether what its workers print is printed here. tells: whether they are told which cluster is theirs, for
    those that look for it themselves, where another may run on the same machine.
    """
    ray = library()
    if ray.is_initialized():
        return False
    target = address if "://" in address else _answering(address)
    _show(shows)
    try:
        told = {"runtime_env": {"env_vars": {"RAY_ADDRESS": target}}} if tells else {}
        ray.init(address=target, log_to_driver=shows, configure_logging=False, **told)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise _refused(address, error) from error
    return True


def nodes() -> list[Node]:
    """Those that are alive."""
    found = []
    for node in library().nodes():
        if node.get("Alive"):
            has = node.get("Resources") or {}
            address = node.get("NodeManagerAddress") or node["NodeID"][:12]
            found.append(Node(node["NodeID"], address, float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))))
    return found


def said(error: BaseException) -> str:
    """The line of a Ray error that tells most: its last words, without the traceback above."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.match(r"(?:\w+\.)*([A-Z]\w+: .*)", line):
            return found[1][:200]
    return (lines[0] if lines else type(error).__name__)[:200]


def _show(shows: bool) -> None:
    """Whether Ray prints, which tells what becomes of nodes on standard output, where a batch's results may go; the
    runner says it too."""
    logging.getLogger("ray").setLevel(logging.NOTSET if shows else logging.CRITICAL)
    with contextlib.suppress(ImportError):
        from ray._private import worker

        printing = vars(worker).setdefault("_lowbit_found", worker.print_to_stdstream)
        worker.print_to_stdstream = printing if shows else lambda *_, **__: None


def _answering(address: str) -> str:
    """HOST:PORT of a head that listens: Ray itself would try for many minutes. Raises BadOption."""
    hint = "`ray start --head` starts a cluster, `ray status` shows it; --ray-address HOST:PORT names its head"
    target = address
    if address == "auto":
        from ray._private import services

        try:
            target = services.canonicalize_bootstrap_address_or_die(address)
        except ConnectionError:
            raise BadOption("no Ray cluster runs on this machine", where="--ray-address auto", hint=hint) from None
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise BadOption("not the address of a Ray cluster", where="--ray-address", found=target[:100],
                        expected="HOST:PORT, or auto")  # fmt: skip
    try:
        _knock(target)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadOption("no Ray cluster answers", where=f"--ray-address {target}", found=why, hint=hint) from None
    return target


def _refused(address: str, error: Exception) -> BadOption:
    text, where = str(error), f"--ray-address {address}"
    if "ersion mismatch" in text:
        pairs = [" ".join(pair) for pair in re.findall(r"(Ray|Python): (\S+)", text)]
        here, there = pairs[2:4], pairs[:2]
        return BadOption("the cluster has another Ray or Python", where=where, found=", ".join(there),
                         expected=", ".join(here) + ", as here", hint="All nodes need the same two")  # fmt: skip
    if "node_ip_address" in text or "No node" in text or "raylet" in text.lower():
        hint = (
            "The command runs on a machine of the cluster: `ray start --address=HEAD:PORT` makes this one a part of it"
        )
        return BadOption("this machine is no node of the cluster", where=where, found=said(error), hint=hint)
    hint = "Does it want a token? Then RAY_AUTH_MODE=token and that token are wanted here too"
    return BadOption("the Ray cluster cannot be joined", where=where, found=said(error), hint=hint)
