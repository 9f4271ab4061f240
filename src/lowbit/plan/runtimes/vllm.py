"""vLLM: pages of a pool that the caches of all sequences share.

Read from vLLM's v1/core/kv_cache_utils.py and v1/kv_cache_interface.py (0.13 to 0.28), and checked against what its log
said (tests/plan/test_vllm.py). vLLM fills the GPU up to --gpu-memory-utilization whatever the model needs; a plan says
what ``slots`` sequences of the context need of it. How layers are charged:

- Layers that all attend to everything are pages of 16 tokens each, one block table for all.
- Of a model with sliding layers the pages are made equal by giving the smaller layers more tokens a page, and the
  layers are dealt into groups as large as the smaller kind (10 of 50 sliding and 10 global layers: 6 groups of 10). A
  group that is not full is padded, and the padding is paid for. A sliding group is charged its window and what is in
  flight, at most the context, and a page more.
- Before 0.21 Gemma 4's sliding layers were charged the whole context, because their heads differ from the global ones'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint.families.base import LayerCache
from lowbit.errors import BadOption, Unsupported
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Row
from lowbit.plan.runtimes import _common
from lowbit.plan.runtimes.base import Runtime

BLOCK = 16  # tokens a page, --block-size
_BYTES = {"bf16": 2, "f16": 2, "fp8": 1}
_RECIPES = ("bf16", "f16", "int4_g32", "int4_g128")
_RULE = "vLLM's own rule"


class Vllm(Runtime):
    name = "vllm"
    kv_types = tuple(_BYTES)
    usual_kv_types = ("bf16", "fp8")
    recipes = ("int4_g128", "bf16")
    margin_why = "8%: --gpu-memory-utilization is 0.92 (0.9 in older versions)"

    def margin(self, room: int) -> int:
        return room * 8 // 100

    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        unused = ("kv_unified", "ubatch", "swa_full", "flash_attention", "mmap", "mmproj", "drafter")
        _common.refuse(self.name, options, unused)
        recipe = options.recipe or _RECIPES[0]
        if recipe not in _RECIPES:
            raise BadOption("vLLM is not planned for with this recipe", found=recipe, expected=", ".join(_RECIPES))
        return {
            **_common.contexts(model, options, options.slots or 1),
            "max_num_batched_tokens": options.batch,
            "kv_type": _common.one_kv_type(self.name, self.kv_types, options),
            "block_size": BLOCK,
            "recipe": recipe,
        }

    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        settings = self.settings(model, options)
        return (
            _common.weights_row(
                _as_loaded(model.packed(settings["recipe"])), "held on the GPU, floats in 16 bits", "formula"
            ),
            *_cache_rows(_common.owners(model), settings),
            _activation_row(model, settings),
        )

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        settings = self.settings(model, options)
        return (
            "vLLM takes --gpu-memory-utilization of the GPU and turns what is left over into more cache",
            "CUDA graphs (0.1 to 2 GiB; none with --enforce-eager), the CUDA context and other processes are not in "
            "this plan: vLLM measures them when it starts",
            *_common.beyond_training(model, settings["context_per_slot"]),
        )


def _as_loaded(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """What a recipe leaves in float32 is in the model's 16-bit type on the GPU."""
    return [
        PlannedTensor(name=t.name, shape=t.shape, dtype="16 bit", n_bytes=2 * t.n_weights)
        if t.dtype in ("F32", "F16", "BF16")
        else t
        for t in tensors
    ]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that share a block table: how many, their window (None: all of the context) and tokens a page."""

    layers: int
    window: int | None
    block: int

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Pages of each layer that one sequence of ``tokens`` is charged. in_flight: tokens scheduled and not yet
        done, on top of a window."""
        if self.window is None:
            return -(-tokens // self.block)
        return -(-min(self.window - 1 + in_flight, tokens) // self.block) + 1


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How a model's layers share the pool. page_bytes: of one page in every layer of a group, padding included."""

    groups: tuple[Group, ...]
    page_bytes: int

    def blocks(self, tokens: int, in_flight: int) -> int:
        return sum(group.blocks(tokens, in_flight) for group in self.groups)


def pool(layers: Sequence[LayerCache], kv_type: str, block: int = BLOCK) -> Pool:
    """The groups of layers as vLLM makes them. Raises Unsupported where the pages cannot be made equal."""
    pages = [block * layer.kv_heads * (layer.k_dim + layer.v_dim) * _BYTES[kv_type] for layer in layers]
    windows = {layer.window for layer in layers}
    if len(windows) == 1:
        return Pool(groups=(Group(layers=len(layers), window=windows.pop(), block=block),), page_bytes=sum(pages))
    largest = max(pages)
    kinds: dict[tuple[int | None, int], int] = {}
    for layer, page in zip(layers, pages, strict=True):
        if largest % page:
            raise Unsupported(
                "vLLM cannot make the pages of these layers equal", found=f"{page:,} and {largest:,} bytes"
            )
        kind = (layer.window, block * (largest // page))
        kinds[kind] = kinds.get(kind, 0) + 1
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * least else least
    groups = [
        Group(layers=min(size, count - size * i), window=window, block=tokens)
        for (window, tokens), count in kinds.items()
        for i in range(-(-count // size))
    ]
    return Pool(groups=tuple(groups), page_bytes=size * largest)


def _cache_rows(layers: Sequence[LayerCache], settings: dict[str, Any]) -> list[Row]:
    shared = pool(layers, settings["kv_type"])
    tokens, slots = settings["context_per_slot"], settings["slots"]
    in_flight = 2 * settings["max_num_batched_tokens"]  # scheduling is asynchronous: a step ahead of the last
    found = []
    for window in sorted({group.window for group in shared.groups}, key=lambda w: w or 0):
        groups = [group for group in shared.groups if group.window == window]
        count = sum(group.layers for group in groups)
        blocks = groups[0].blocks(tokens, in_flight)
        why = f"{blocks:,} pages of {groups[0].block} tokens"
        if len(shared.groups) > 1:
            why += f" in {len(groups)} group{'s' if len(groups) > 1 else ''} x {shared.page_bytes:,} bytes"
            padding = len(groups) * max(group.layers for group in shared.groups) - count
            why += f", {padding} layers of padding among them" if padding else ""
        if window is not None and blocks < -(-tokens // groups[0].block):
            why += f": the window of {window:,} and {in_flight:,} tokens in flight"
        why += f", {slots} sequences" if slots > 1 else ""
        size = slots * blocks * len(groups) * shared.page_bytes
        found.append(Row(part="kv", what=_common.layers_of(count, window), bytes=size, why=why, found=_RULE))
    found.append(
        Row(part="kv", what="null page", bytes=shared.page_bytes, why="stands for pages that were let go", found=_RULE)
    )
    return found


def _activation_row(model: PlanModel, settings: dict[str, Any]) -> Row:
    size, tokens = _common.sizes(model), settings["max_num_batched_tokens"]
    n_bytes = tokens * (4 * size["hidden"] + 3 * size["wide"]) * 2 + 4 * settings["slots"] * model.vocab_size
    why = f"{tokens:,} tokens through the widest layer, and {settings['slots']} rows of scores in f32"
    return Row(part="scratch", what="activations", bytes=n_bytes, why=why, found="estimate, not measured")


RUNTIME = Vllm()
