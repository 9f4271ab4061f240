"""LiteRT-LM: caches whose size the converter wrote into the .litertlm file, allocated whole before the first token.

Read from litert-torch (generative/export_hf/core/cache.py, exportable_module_config.py), which makes the files, and
LiteRT-LM (runtime/executor), which runs them:

- Every layer's cache has ``cache_length`` tokens (4096 unless the converter is told otherwise), sliding layers too,
  unless it was given ``sliding_window_ring_buffer_size``. A longer context needs another file.
- Caches are float32; float16 with the converter's ``experimental_use_fp16``.
- On a CPU they are updated in place. On a GPU there are two banks of them, read and written in turn.
- One sequence at a time.
"""

from __future__ import annotations

from typing import Any

from lowbit.errors import BadOption
from lowbit.plan.model import PlanModel, PlannedTensor
from lowbit.plan.options import PlanOptions
from lowbit.plan.result import Row
from lowbit.plan.runtimes import _common
from lowbit.plan.runtimes.base import Runtime

PREFILL = 128  # tokens computed at a time: the converter's prefill_lengths
_BYTES = {"f32": 4, "f16": 2}
_BITS = {"int8": 8, "int4": 4, "f32": 32}
_PACKED = ("mobile", "mobile_mlp2", "mobile_w4", "mobile_w8")  # what `lowbit pack --to litert-lm` writes


class LiteRtLm(Runtime):
    name = "litert-lm"
    kv_types = tuple(_BYTES)
    usual_kv_types = tuple(_BYTES)
    recipes = ("int4", "int8")

    def settings(self, model: PlanModel, options: PlanOptions) -> dict[str, Any]:
        unused = ("kv_unified", "batch", "ubatch", "swa_full", "flash_attention", "mmap", "mmproj", "drafter")
        _common.refuse(self.name, options, unused)
        if options.slots not in (None, 1):
            raise BadOption("LiteRT-LM runs one sequence at a time", found=f"{options.slots} slots", expected="1")
        recipe = options.recipe or "int8"
        if recipe not in (*_BITS, *_PACKED):
            expected = ", ".join((*_BITS, *_PACKED))
            raise BadOption("the converter has no such weights", found=recipe, expected=expected)
        kv_type = _common.one_kv_type(self.name, self.kv_types, options)
        return {**_common.contexts(model, options, 1), "kv_type": kv_type, "recipe": recipe}

    def rows(self, model: PlanModel, options: PlanOptions) -> tuple[Row, ...]:
        settings = self.settings(model, options)
        found = [_weights_row(model, settings["recipe"])]
        layers, tokens = _common.owners(model), settings["context"]
        for window in sorted({layer.window for layer in layers}, key=lambda w: w or 0):
            alike = [layer for layer in layers if layer.window == window]
            each = sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in alike) * _BYTES[settings["kv_type"]]
            why = f"{tokens:,} tokens x {each:,} bytes in {settings['kv_type']}, allocated whole"
            if window is not None:
                why += ": the converter gives sliding layers the whole context"
            what = _common.layers_of(len(alike), window)
            found.append(Row(part="kv", what=what, bytes=tokens * each, why=why, found="the converter's rule"))
        found.append(_scratch_row(model, settings))
        return tuple(found)

    def notes(self, model: PlanModel, options: PlanOptions) -> tuple[str, ...]:
        return (
            "For a CPU. A GPU has a second bank of the same caches",
            "The context is the file's own: convert with cache_length set to it",
            "XNNPACK keeps a packed copy of the weights in a cache file beside the model; it is mapped, not counted",
            *_common.beyond_training(model, self.settings(model, options)["context_per_slot"]),
        )


def _weights_row(model: PlanModel, recipe: str) -> Row:
    """Matrices in whole bytes or half ones with a float32 scale a row (dynamic_wi8_afp32), vectors in float32."""
    _common.owners(model)
    if recipe in _PACKED:
        why = "codes, and a scale in f32 for each row; mapped from the file"
        return _common.weights_row(list(model.packed(recipe)), why, "formula")
    tensors = []
    for spec in model.specs:
        rows, wide = spec.n_rows, spec.shape[-1]
        matrix = len(spec.shape) > 1 and recipe != "f32"
        size = rows * (wide * _BITS[recipe] // 8 + 4) if matrix else rows * wide * 4
        tensors.append(
            PlannedTensor(name=spec.gguf_name, shape=spec.shape, dtype=recipe if matrix else "f32", n_bytes=size)
        )
    why = "a scale in f32 for each row; mapped from the file"
    return _common.weights_row(tensors, why, "formula; tied embeddings may be stored twice")


def _scratch_row(model: PlanModel, settings: dict[str, Any]) -> Row:
    size = _common.sizes(model)
    scores = PREFILL * settings["context"] * size["heads"]
    n_bytes = 4 * (PREFILL * (4 * size["hidden"] + 3 * size["wide"]) + 2 * scores + model.vocab_size)
    why = f"{PREFILL} tokens at {settings['context']:,} of context in f32, attention scores and their softmax"
    return Row(part="scratch", what="activations", bytes=n_bytes, why=why, found="estimate, not measured")


RUNTIME = LiteRtLm()
