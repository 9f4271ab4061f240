"""The model's server that serve, chat and batch start: llama.cpp's, with what belongs to the artifact.

What is not said comes from the release set's lock (template, drafter, projector), from the plan (the longest context
that fits the memory) and from llama-server's own habits (four slots that share one cache).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit import console, memory, plan
from lowbit.checkpoint import resolve
from lowbit.checkpoint.resolve import is_packaged
from lowbit.errors import BadFile, BadOption, LowbitError, NotFound
from lowbit.harness import HttpUpstream, of_model
from lowbit.release import lock as locks
from lowbit.release.walk import hash_member
from lowbit.run import _kv_types
from lowbit.run.llama_server import LlamaServer
from lowbit.units import format_bytes

NOWHERE = "http://127.0.0.1:0/v1"  # the address of a server that is not started yet
_SLOTS = 4  # as llama-server's --parallel auto
_MARGIN = 1 << 30  # bytes left to others, as llama-server's --fit-target
_CACHE_RAM = 8192  # MiB, as llama-server's --cache-ram
_RESTARTS, _WITHIN = 5, 600.0  # so often within so many seconds


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How llama.cpp's server is started; None leaves it to the lock, the plan or llama.cpp.

    context:   tokens of all slots together; None is the longest that fits
    slots:     requests at a time, which share one cache unless kv_unified is False
    kv_type:   of the cache, or two as K:V
    cache_ram: MiB for prompts that lost their slot; None is half of what the plan leaves free, 8,192 at most
    swa_full, threads, drafter, mmproj, template, llama_server, idle_cache, slot_folder: as run.llama_server has them
    """

    context: int | None = None
    slots: int | None = None
    kv_type: str = "f16"
    kv_unified: bool | None = None
    swa_full: bool = False
    cache_ram: int | None = None
    threads: int | None = None
    drafter: Path | None = None
    mmproj: Path | None = None
    template: Path | None = None
    llama_server: str | None = None
    idle_cache: bool | None = None
    slot_folder: Path | None = None


COMPANIONS = ("drafter", "mmproj", "template")  # files that belong to an artifact, of ModelOptions


def artifact(model: str | Path) -> Path:
    """The GGUF to serve: a file, the product of a run folder, what a lock names, a packaged model.

    Raises NotFound, BadFile.
    """
    folder = Path(model).expanduser()
    # A release has several GGUFs, and its lock tells them apart.
    path = folder if folder.is_dir() and not is_packaged(model) else resolve(model)
    if path.is_file():
        return path
    if (path / locks.LOCK_NAME).is_file():
        named = [m for m in locks.read(path / locks.LOCK_NAME).of("artifact") if m.container == "gguf"]
        if len(named) == 1:
            return path / named[0].path
    found = sorted(p for p in path.glob("*.gguf") if p.name.startswith("model-")) or sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise NotFound(
            "no one GGUF to serve", where=path, found=", ".join(p.name for p in found)[:200] or "none",
            expected="one", hint="Name the file, or pack the checkpoint first: lowbit pack",
        )  # fmt: skip
    return found[0]


def settled(path: Path, options: ModelOptions) -> ModelOptions:
    """The options with what the lock beside the artifact names, a context that fits, and what is then left for cached
    prompts.

    Raises BadFile (a lock that is stale), NotFound, BadOption (not even a small context fits).
    """
    options = companions(path, options)
    slots = options.slots or _SLOTS
    unified = options.kv_unified if options.kv_unified is not None else options.slots is None or options.slots > 1
    options = replace(options, slots=slots, kv_unified=unified)
    free = memory.available_bytes()
    with plan.open_model(path) as model:
        if options.context is None:
            options = replace(options, context=fitting(model, options, free))
        return replace(options, cache_ram=prompt_cache(model, options, free))


def companions(path: Path, options: ModelOptions) -> ModelOptions:
    """The options with the drafter, projector and template that the lock beside the artifact names, where none are
    given. Raises BadFile (a lock that is stale), NotFound."""
    lock = path.parent / locks.LOCK_NAME
    if lock.is_file():
        options = _from_lock(path, locks.read(lock), options)
    for name, given in files_of(options).items():
        if not given.is_file():
            raise NotFound(f"no such file for {name}", where=given)
    return options


def files_of(options: ModelOptions) -> dict[str, Path]:
    """Those of COMPANIONS that are named, by name."""
    return {name: path for name in COMPANIONS if (path := getattr(options, name)) is not None}


def apart(path: Path, options: ModelOptions, tokens: int) -> ModelOptions | None:
    """Slots with caches of their own, each for so many tokens (no more than the model was trained for): as many, of
    ``options.slots`` and its halves, as leave a GiB of memory free. None where not even two do.

    A cache that all share takes any mix of lengths, but every token then looks at the cells of every slot: with 16
    slots on a CPU that cost a quarter of the throughput (dev/LOG.md).
    """
    slots, free = options.slots or _SLOTS, memory.available_bytes()
    with plan.open_model(path) as model:
        tokens = min(tokens, model.trained_context)
        while slots > 1:
            found = replace(options, slots=slots, kv_unified=False, context=slots * tokens)
            if free is None or plan.plan_open(model, _plan_options(found)).total_bytes <= free - _MARGIN:
                return found
            slots //= 2
    return None


def _plan_options(options: ModelOptions) -> plan.PlanOptions:
    types = _kv_types.parse(options.kv_type)
    return plan.PlanOptions(
        context=options.context or 0, slots=options.slots, kv_unified=options.kv_unified, swa_full=options.swa_full,
        kv_type_k=types.k, kv_type_v=types.v, drafter=options.drafter, mmproj=options.mmproj,
    )  # fmt: skip


def fitting(model: plan.PlanModel, options: ModelOptions, free: int | None) -> int:
    """The longest context, of the trained one and its halves, with which the plan leaves a GiB of memory free."""
    asked = _plan_options(options)
    first = plan.plan_open(model, asked)
    context, total = int(first.settings["context"]), first.total_bytes
    while free is not None and total > free - _MARGIN:
        context //= 2
        if context < 256:
            raise BadOption(
                "the model does not fit the memory", where=model.path, found=f"{format_bytes(free)} free",
                expected=f"{format_bytes(total + _MARGIN)} with a context of {context * 2}",
                hint="lowbit plan says what would fit",
            )  # fmt: skip
        total = plan.plan_open(model, replace(asked, context=context)).total_bytes
    return context


def prompt_cache(model: plan.PlanModel, options: ModelOptions, free: int | None) -> int:
    """MiB for llama-server's cache of prompts that lost their slot: half of what is free beside the model as planned
    and the margin. Its own 8 GiB come on top of everything else, as the prompts come, and take a small machine down.
    """
    if options.cache_ram is not None:
        return options.cache_ram
    if free is None:
        return _CACHE_RAM
    spare = free - _MARGIN - plan.plan_open(model, _plan_options(options)).total_bytes
    return min(_CACHE_RAM, max(0, spare // 2) >> 20)


class ModelServer:
    """The server, kept running: started again when its process ends.

    on_start: called with its URL, up to and with /v1, each time it answers
    page:     whether it has its web page
    restarts: at most, in ten minutes
    given_up: why it is not started again any more, or None

    key: what it must be sent, made for it. It listens on this machine, where it would answer every other program and,
    as llama.cpp allows all origins, every page in a browser.
    """

    def __init__(
        self,
        path: Path,
        options: ModelOptions,
        on_start: Callable[[str], Any],
        *,
        page: bool = False,
        restarts: int = _RESTARTS,
    ) -> None:
        self._path, self._options, self._on_start, self._page = path, options, on_start, page
        self._restarts = restarts
        self.given_up: str | None = None
        self.key = secrets.token_urlsafe(24)
        self._server: LlamaServer | None = None
        self._watch: asyncio.Task[None] | None = None
        self._started: list[float] = []

    async def start(self) -> None:
        """Raises RuntimeFailed, BadFile, ... where it does not come up."""
        await self._start()
        self._watch = asyncio.create_task(self._keep())

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    @property
    def server(self) -> LlamaServer | None:
        return self._server

    async def _start(self) -> None:
        o = self._options
        assert o.context is not None and o.slots is not None
        self._started.append(time.monotonic())
        self._server = await asyncio.to_thread(
            LlamaServer, self._path, context=o.context, slots=o.slots, kv_unified=bool(o.kv_unified),
            kv_type=o.kv_type, swa_full=o.swa_full, threads=o.threads, drafter=o.drafter, mmproj=o.mmproj,
            template=o.template, llama_server=o.llama_server, alias=self._path.stem, api_key=self.key, ui=self._page,
            idle_cache=o.idle_cache, slot_folder=o.slot_folder, cache_ram=o.cache_ram,
        )  # fmt: skip
        self._on_start(self._server.url)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            server = self._server
            if server is None or server.alive():
                continue
            last = next((line for line in reversed(server.log_tail()) if line.strip()), "")
            console.log(f"The model's server ended; starting it again. Its last words: {last[-300:]}")
            await asyncio.to_thread(server.close)
            self._server = None
            now = time.monotonic()
            self._started = [t for t in self._started if now - t < _WITHIN]
            if len(self._started) > self._restarts:
                self._give_up(f"It ended {self._restarts} times in {_WITHIN / 60:.0f} minutes; it is not started again")
                return
            try:
                await self._start()
            except LowbitError as error:
                self._give_up(f"It does not come up: {error}")
                return

    def _give_up(self, why: str) -> None:
        self.given_up = why
        console.log(why)


def prepared(
    path: Path,
    options: ModelOptions,
    *,
    page: bool = False,
    restarts: int = _RESTARTS,
    upstream: HttpUpstream | None = None,
) -> tuple[HttpUpstream, ModelServer, list[str]]:
    """A server that is not started yet, the upstream that follows its address (the given one, or a new one), and the
    model's control tokens. What the file says of the model is known to the upstream: its dialect, and whether its
    template has tools."""
    upstream = upstream or HttpUpstream(NOWHERE)
    of_model.introduce(upstream, path, options.template)

    def moved(url: str) -> None:
        upstream.url = url

    server = ModelServer(path, options, moved, page=page, restarts=restarts)
    upstream.key = server.key
    return upstream, server, of_model.control_tokens(path)


def _from_lock(path: Path, lock: locks.Lock, options: ModelOptions) -> ModelOptions:
    if path.name not in {member.path for member in lock.of("artifact")}:
        return options
    for name, role in (("drafter", "drafter"), ("mmproj", "projector"), ("template", "chat_template")):
        for member in lock.of(role):
            usable = member.container == ("text" if role == "chat_template" else "gguf")
            file = path.parent / member.path
            if not usable or getattr(options, name) is not None:
                continue
            same = file.is_file() and file.stat().st_size == member.size
            # Model files are not hashed again at every start: `lowbit check` does that.
            if same and usable and role == "chat_template":
                same = hash_member(file)[0].sha256 == member.sha256
            if not same:
                raise BadFile("not what the lock names", where=file, hint="`lowbit check` says what is out of step")
            changed: Any = {name: file}
            options = replace(options, **changed)
    return options
