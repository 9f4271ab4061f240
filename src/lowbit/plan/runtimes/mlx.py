"""MLX, as mlx-lm runs a model: caches that grow with what was read, in steps.

Read from mlx-lm 0.32.2 (models/cache.py, generate.py, server.py) and checked against it to the byte
(tests/plan/test_mlx.py, benchmarks/plan_mlx.py). Four things differ from llama.cpp:

- A global layer's cache grows by 256 tokens at a time: a context costs what was read, not what was promised.
- A sliding layer's cache holds a window, but while a prompt is read it holds ``window - 1`` and the prompt's step.
- ``--kv-bits`` quantizes caches once they hold ``--quantized-kv-start`` tokens (5000), and below that does nothing.
  A model with sliding layers cannot have it: mlx-lm stops with an error.
- Sequences at a time are a batch, each as long as the longest. With a quantized cache they wait for each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowbit.checkpoint.families.base import LayerCache
from lowbit.errors import BadOption
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Row
from lowbit.plan.runtimes import _common
from lowbit.plan.runtimes.base import Runtime
from lowbit.units import GIB, format_bytes

STEP = 256  # tokens that a cache grows by
QUANTIZED_FROM = 5000  # tokens: mlx-lm's --quantized-kv-start
# mlx/backend/metal/scaled_dot_product_attention.cpp, for prompts: the kernels of 192 and 256 are not chosen there.
_FUSED = (64, 72, 80, 96, 128)
_RECIPE = "mlx_affine4_g64"
_FLOATS = {"f16": 2, "bf16": 2, "f32": 4}
_QUANTIZED = re.compile(r"q(?P<bits>[234568])_g(?P<group>32|64|128)")


class Mlx(Runtime):
    name = "mlx"
    kv_types = (*_FLOATS, *(f"q{bits}_g{group}" for bits in (8, 6, 5, 4, 3, 2) for group in (64, 32, 128)))
    usual_kv_types = ("f16", "q8_g64", "q4_g64")
    recipes = ("mlx_affine4_g64", "mlx_affine8_g64", "bf16")
    margin_why = "what macOS keeps from the GPU: a third of up to 36 GiB, a quarter of more"

    def margin(self, room: int) -> int:
        return room // 3 if room <= 36 * GIB else room // 4

    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        unused = ("kv_unified", "ubatch", "swa_full", "flash_attention", "mmap", "mmproj", "drafter")
        _common.refuse(self.name, options, unused)
        if options.recipe and not options.recipe.startswith(("mlx_", "f16", "bf16", "f32")):
            expected = "mlx_affine4_g64 and the like, or f16, bf16, f32"
            raise BadOption("MLX does not run this format", found=options.recipe, expected=expected)
        kv_type = _common.one_kv_type(self.name, self.kv_types, options)
        slots = options.slots or 1
        if kv_type not in _FLOATS:
            _check_quantized(model, kv_type, slots)
        stored = options.recipe is None and model.stored and model.gguf is None
        return {
            **_common.contexts(model, options, slots),
            "prefill_step_size": options.batch,
            "kv_type": kv_type,
            "recipe": None if stored else options.recipe or _RECIPE,
        }

    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        settings = self.settings(model, options)
        recipe = settings["recipe"]
        weights = model.stored if recipe is None else _as_written(model.packed(recipe))
        return (
            _common.weights_row(weights, "loaded whole", "file" if recipe is None else "formula"),
            *_cache_rows(_common.owners(model), settings),
            *_scratch_rows(model, settings),
        )

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        settings = self.settings(model, options)
        tokens = settings["context_per_slot"]
        said = ["For a context that is read in full: until then the caches are smaller"]
        if settings["kv_type"] not in _FLOATS and tokens < QUANTIZED_FROM:
            said.append(
                f"--kv-bits does nothing below {QUANTIZED_FROM:,} tokens unless --quantized-kv-start is lowered: at "
                f"{tokens:,} the cache stays in 16 bits"
            )
        said.append("mlx_lm.server also keeps the caches of up to 10 finished prompts (--prompt-cache-size)")
        if model.gguf:
            said.append("mlx-lm does not load this GGUF: planned for what `lowbit pack --to mlx` makes of it")
        return (*said, *_common.beyond_training(model, tokens))


def _as_written(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """What a recipe calls F32 is written in the checkpoint's 16-bit type where there is one."""
    return [
        PlannedTensor(name=t.name, shape=t.shape, dtype="16 bit", n_bytes=2 * t.n_weights) if t.dtype == "F32" else t
        for t in tensors
    ]


def _check_quantized(model: PlanModel, kv_type: str, slots: int) -> None:
    if any(layer.window is not None for layer in model.cache):
        raise BadOption(
            "mlx-lm cannot quantize the cache of a model with sliding layers", found=f"KV type {kv_type}",
            expected=", ".join(_FLOATS), hint="It would stop with 'RotatingKVCache Quantization NYI'",
        )  # fmt: skip
    if slots > 1:
        what = "mlx-lm serves one sequence at a time with a quantized cache"
        raise BadOption(what, found=f"{slots} slots", expected="1")
    group = _parts(kv_type)[1]
    for layer in model.cache:
        if layer.k_dim % group or layer.v_dim % group:
            found, expected = f"heads of {layer.k_dim}, KV type {kv_type}", f"a multiple of {group}"
            raise BadOption("the heads are not whole groups", found=found, expected=expected)


def _parts(kv_type: str) -> tuple[int, int]:
    match = _QUANTIZED.fullmatch(kv_type)
    assert match
    return int(match["bits"]), int(match["group"])


def cell_bytes(layer: LayerCache, kv_type: str) -> int:
    """Bytes of one token's key and value in one layer."""
    if kv_type in _FLOATS:
        return layer.kv_heads * (layer.k_dim + layer.v_dim) * _FLOATS[kv_type]
    bits, group = _parts(kv_type)
    # Codes, and a scale and a bias of 16 bits for each group.
    return layer.kv_heads * sum(dim * bits // 8 + dim // group * 4 for dim in (layer.k_dim, layer.v_dim))


def lengths(tokens: int, window: int | None, prefill: int) -> Iterator[tuple[int, int]]:
    """What one layer's cache has room for while ``tokens`` are read: (tokens read, room in tokens) after each step of
    the prompt, and after the last token, which is computed by itself."""
    room = read = 0
    while read < tokens:
        chunk = min(prefill, tokens - 1 - read) or 1
        if window is None:
            if read + chunk > room:  # grown from what was used, not from what there was room for
                room = read + -(-chunk // STEP) * STEP
        elif chunk > 1:
            room = min(room, read, window - 1) + chunk
        else:
            if read >= room and room < window:
                room += min(STEP, window - read)
            room = min(room, window)
        read += chunk
        yield read, room


def peak(layers: Sequence[LayerCache], kv_type: str, tokens: int, prefill: int) -> dict[int | None, tuple[int, int]]:
    """By window: tokens that there is room for, and bytes of all layers of that kind, at the moment when the caches of
    all layers are largest together."""
    windows = sorted({layer.window for layer in layers}, key=lambda w: w or 0)
    float_type = kv_type if kv_type in _FLOATS else "f16"
    cells = {
        kind: {w: sum(cell_bytes(layer, kind) for layer in layers if layer.window == w) for w in windows}
        for kind in {kv_type, float_type}
    }
    best: dict[int | None, tuple[int, int]] = {}
    for steps in zip(*(lengths(tokens, window, prefill) for window in windows), strict=True):
        kind = kv_type if steps[0][0] >= QUANTIZED_FROM else float_type
        now = {w: (room, room * cells[kind][w]) for w, (_, room) in zip(windows, steps, strict=True)}
        if sum(size for _, size in now.values()) > sum(size for _, size in best.values()):
            best = now
    return best


def _cache_rows(layers: Sequence[LayerCache], settings: Mapping[str, Any]) -> list[Row]:
    tokens, slots, kv_type = settings["context_per_slot"], settings["slots"], settings["kv_type"]
    prefill, found = settings["prefill_step_size"], []
    for window, (room, size) in peak(layers, kv_type, tokens, prefill).items():
        count = sum(layer.window == window for layer in layers)
        each = size // room
        why = f"{slots} slots x " if slots > 1 else ""
        why += f"{room:,} tokens x {each:,} bytes in {kv_type}"
        if window is None:
            why += f", grown by {STEP} at a time"
        elif room > window:
            after = format_bytes(slots * each * min(window, tokens))
            why += f": a prompt's step on top of the window of {window:,}; {after} once it is read"
        what = _common.layers_of(count, window)
        found.append(Row(part="kv", what=what, bytes=slots * size, why=why, found="mlx-lm's own rule"))
    return found


def _scratch_rows(model: PlanModel, settings: Mapping[str, Any]) -> list[Row]:
    """Activations of a prompt's step, and the attention scores of layers that Metal's kernel does not fuse."""
    size, slots, context = _common.sizes(model), settings["slots"], settings["context_per_slot"]
    step = min(settings["prefill_step_size"], context)
    n_bytes = slots * (step * (4 * size["hidden"] + 3 * size["wide"]) * 2 + model.vocab_size * 4)
    why = f"{slots * step:,} tokens through the widest layer, and {slots} x {model.vocab_size:,} scores in f32"
    rows = [Row(part="scratch", what="activations", bytes=n_bytes, why=why, found="estimate")]
    unfused = [layer for layer in model.cache if layer.k_dim not in _FUSED]
    if unfused:
        seen = max(context if x.window is None else min(context, x.window - 1 + step) for x in unfused)
        n_bytes = slots * size["heads"] * step * seen * 2
        why = (
            f"heads of {max(layer.k_dim for layer in unfused)} are not fused while a prompt is read: {size['heads']} "
            f"heads x {slots * step:,} x {seen:,} tokens in 16 bits"
        )
        rows.append(Row(part="scratch", what="attention scores", bytes=n_bytes, why=why, found="estimate"))
    return rows


RUNTIME = Mlx()
