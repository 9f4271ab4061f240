"""LiteRT-LM's KV caches as planned against its converter's own, to the byte: public models x contexts x types.

Run where litert-torch is installed: python benchmarks/plan_litert.py. Nothing is converted: the converter's own cache
class is asked for its tensors, without memory behind them.
"""

from __future__ import annotations

import torch
import transformers
from litert_torch.generative.export_hf.core.cache import LiteRTLMCache
from litert_torch.generative.export_hf.core.exportable_module_config import ExportableModuleConfig

from lowbit.plan import PlanOptions, open_listed, plan_open
from lowbit.plan.catalogue import Listed, listed

CONTEXTS = (512, 1280, 4096)


def converted(model: Listed, context: int, kv_type: str) -> int:
    """Bytes of the cache tensors of a file converted for ``context`` tokens."""
    config = dict(model.config)
    made = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    # The converter allows itself this for the head size, and reads the key-value heads before it does.
    made.allow_global_per_layer_attribute_access = True
    settings = ExportableModuleConfig(model="", cache_length=context, experimental_use_fp16=kv_type == "f16")
    with torch.device("meta"):
        cache = LiteRTLMCache.create_from_config(made, settings)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def main() -> int:
    equal, refused = [], {}
    for model in listed():
        with open_listed(model) as opened:
            for context in CONTEXTS:
                for kv_type in ("f32", "f16"):
                    options = PlanOptions(runtime="litert-lm", context=context, kv_type_k=kv_type, kv_type_v=kv_type)
                    planned = plan_open(opened, options).bytes_of("kv")
                    try:
                        real = converted(model, context, kv_type)
                    except (
                        AttributeError,
                        RuntimeError,
                    ) as error:  # heads that differ between layers, with this transformers
                        refused[model.name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
                        continue
                    equal.append(planned == real)
                    if planned != real:
                        print(f"{model.name}, {context} tokens in {kv_type}: planned {planned:,}, converter {real:,}")
    for name, why in refused.items():
        print(f"{name}: the converter cannot: {why}")
    print(f"KV caches of LiteRT-LM: {sum(equal)} of {len(equal)} combinations equal to the byte")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    raise SystemExit(main())
