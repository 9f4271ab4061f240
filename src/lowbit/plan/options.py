"""What a plan is made for: the runtime and the settings that it will be started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import BadOption

_MOST = 1 << 31


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Settings of the runtime, in the words of llama-server; each runtime refuses those that it has no use for.

    runtime:         its name, one of plan.runtimes.names()
    context:         as llama-server's -c: tokens of all slots together, which a cache that is not unified divides by
                     the slots; 0 means what the model was trained for
    slots:           sequences at a time, as --parallel; None leaves it to the runtime (llama-server: 4, unified)
    kv_unified:      one cache that all slots share; None leaves it to the runtime
    batch, ubatch:   tokens accepted at a time, and computed at a time
    swa_full:        sliding layers keep all of the context, as --swa-full
    kv_type_k, kv_type_v: types of the cached keys and values; "" leaves them to the runtime
    flash_attention: None leaves it to the runtime
    recipe:          how the weights will be packed, one of lowbit.recipe.names(); None means as they are in a packed
                     file, and Q4_0 of a checkpoint
    drafter, mmproj: a drafter and a projector loaded beside the model
    mmap:            whether the file is mapped instead of read
    """

    runtime: str = "llama.cpp"
    context: int = 0
    slots: int | None = None
    kv_unified: bool | None = None
    batch: int = 2048
    ubatch: int = 512
    swa_full: bool = False
    kv_type_k: str = ""
    kv_type_v: str = ""
    flash_attention: bool | None = None
    recipe: str | None = None
    drafter: str | Path | None = None
    mmproj: str | Path | None = None
    mmap: bool = True

    def __post_init__(self) -> None:
        for name, least in (("context", 0), ("slots", 1), ("batch", 1), ("ubatch", 1)):
            value = getattr(self, name)
            if value is None and name == "slots":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
                expected = f"{least} to {_MOST - 1:,}"
                raise BadOption(f"bad value for {name}", found=repr(value)[:40], expected=expected)
