"""How llama.cpp's server is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint.gguf_file import read_fields
from lowbit.errors import BadOption, NotFound
from lowbit.run import _kv_types
from lowbit.run.base import check_sizes


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Each as llama-server has it, with its flag in brackets; None leaves it to llama.cpp.

    context:         tokens of all slots together, or of each with a unified cache; 0 is what the model was trained for
                     [-c]
    slots:           requests at a time [-np]
    batch, ubatch:   tokens of a prompt taken, and decoded, at a time [-b, -ub]
    threads:         None means the physical cores this process may use [-t]
    kv_type:         of the cache, or two as K:V [-ctk, -ctv]
    flash_attention: [-fa]
    swa_full:        sliding-window layers keep the whole context: needed to use a shared prefix again [--swa-full]
    kv_unified:      one cache for all slots [-kvu]
    cache_ram:       MiB of memory for prompts that lost their slot; 0 keeps none [--cache-ram]
    idle_cache:      whether, each time a request starts, the slots at rest are copied to that memory and, with a
                     unified cache, emptied [--cache-idle-slots]
    drafter:         a GGUF that guesses ahead for speculative decoding [-md]
    draft_tokens:    how many it guesses [--spec-draft-n-max]
    mmproj:          projector for images and sound [-mm]
    template:        a file with the chat template to use instead of the model's own [--chat-template-file]
    slot_folder:     where slots are saved to and restored from [--slot-save-path]
    alias:           the model's name in the API; None means its file's name [-a]
    reasoning:       what becomes of thinking in answers: none, deepseek or auto [--reasoning-format]
    api_key:         what callers must send [--api-key]; never shown in a list of processes
    ui:              whether it has its web page [--ui]
    port:            on 127.0.0.1; 0 finds a free one
    verbosity:       of its log: 1 errors, 2 warnings, 3 all it says by itself, 4 more [-lv]
    start_timeout:   seconds until it must answer
    llama_server:    a llama-server binary to run; None runs the server of the package xllamacpp
    extra:           further arguments of the binary
    """

    context: int = 4096
    slots: int = 1
    batch: int = 2048
    ubatch: int = 512
    threads: int | None = None
    kv_type: str = "f16"
    flash_attention: bool | None = None
    swa_full: bool = False
    kv_unified: bool = False
    cache_ram: int | None = None
    idle_cache: bool | None = None
    drafter: str | os.PathLike[str] | None = None
    draft_tokens: int | None = None
    mmproj: str | os.PathLike[str] | None = None
    template: str | os.PathLike[str] | None = None
    slot_folder: str | os.PathLike[str] | None = None
    alias: str | None = None
    reasoning: str | None = None
    api_key: str | None = None
    ui: bool = False
    port: int = 0
    verbosity: int = 3
    start_timeout: float = 600.0
    llama_server: str | os.PathLike[str] | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_sizes(context=self.context, slots=self.slots, batch=self.batch, ubatch=self.ubatch)
        check_sizes(
            **{name: getattr(self, name) for name in ("threads", "draft_tokens") if getattr(self, name) is not None}
        )
        types = _kv_types.parse(self.kv_type)
        if types.quantized and self.flash_attention is False:
            raise BadOption("a quantized KV cache needs flash attention", found=self.kv_type)
        if not 0 <= self.port < 65536:
            raise BadOption("impossible port", found=self.port, expected="0 to 65535")
        if self.reasoning not in (None, "none", "deepseek", "auto"):
            raise BadOption("unknown reasoning format", found=self.reasoning, expected="none, deepseek or auto")
        if self.extra and self.llama_server is None:
            raise BadOption("extra arguments are of a llama-server binary", found=" ".join(self.extra))
        for name in ("drafter", "mmproj", "template"):
            if (path := getattr(self, name)) is not None and not Path(path).is_file():
                raise NotFound(f"no such file for {name}", where=path)
        if self.slot_folder is not None and not Path(self.slot_folder).is_dir():
            raise NotFound("no such folder for slots", where=self.slot_folder)

    def job(self, model: Path, threads: int) -> dict[str, Any]:
        """The options as JSON for the child process."""
        types = _kv_types.parse(self.kv_type)
        paths = {name: _text(getattr(self, name)) for name in ("drafter", "mmproj", "template", "slot_folder")}
        plain = {name: getattr(self, name) for name in _PLAIN}
        more = {"alias": self.alias or model.name, "port": self.port, "threads": threads, "api_key": self.api_key}
        more["draft_type"] = _draft_type(self.drafter)
        return {"model": os.fspath(model), "type_k": types.k, "type_v": types.v, **plain, **paths, **more}

    def arguments(self, model: Path, threads: int, port: int) -> list[str]:
        """The same for a llama-server binary."""
        types = _kv_types.parse(self.kv_type)
        words: list[Any] = ["-m", os.fspath(model), "--host", "127.0.0.1", "--port", port, "-c", self.context]
        words += [
            "-np",
            self.slots,
            "-b",
            self.batch,
            "-ub",
            self.ubatch,
            "-t",
            threads,
            "-ctk",
            types.k,
            "-ctv",
            types.v,
        ]
        words += ["-a", self.alias or model.name, "-lv", self.verbosity, "--props", "--slots", "--jinja"]
        words += [] if self.ui else ["--no-webui"]
        if self.flash_attention is not None:
            words += ["-fa", "on" if self.flash_attention else "off"]
        words += ["--swa-full"] if self.swa_full else []
        words += ["-kvu"] if self.kv_unified else ["-no-kvu"]
        if self.idle_cache is not None:
            words += ["--cache-idle-slots" if self.idle_cache else "--no-cache-idle-slots"]
        for flag, value in (
            ("-md", self.drafter), ("--spec-type", _draft_type(self.drafter)),
            ("--spec-draft-n-max", self.draft_tokens), ("-mm", self.mmproj),
            ("--chat-template-file", self.template), ("--slot-save-path", self.slot_folder),
            ("--reasoning-format", self.reasoning), ("--cache-ram", self.cache_ram),
        ):  # fmt: skip
            words += [] if value is None else [flag, value]
        return [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in (*words, *self.extra)]


_PLAIN = (
    "context", "slots", "batch", "ubatch", "flash_attention", "swa_full", "kv_unified", "draft_tokens", "reasoning",
    "verbosity", "ui", "cache_ram", "idle_cache",
)  # fmt: skip


def _draft_type(drafter: str | os.PathLike[str] | None) -> str | None:
    """llama.cpp's word for how a drafter works: reading its target's cache (Gemma 4's), or as a model of its own."""
    if drafter is None:
        return None
    values = {field.key: field.value for field in read_fields(Path(drafter))}
    return "draft-mtp" if str(values.get("general.architecture")).endswith("-assistant") else "draft-simple"


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)
