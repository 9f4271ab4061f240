"""Quantization-aware training on the exact grid of the file that ships. The only part of lowbit that imports torch.

``lowbit.train(model, out)`` is the whole verb. ``lowbit.train.prepare(model, recipe)`` makes a Hugging Face model
trainable by any Trainer; ``lowbit.train.load`` and ``save`` go from a checkpoint to a model and back.
"""

# ruff: noqa: E402 (how threads wait is set before torch is loaded)
from __future__ import annotations

from lowbit import threads, verbs
from lowbit.errors import Unsupported

threads.wait_passively()
threads.keep_freed_memory()  # a fifteenth of training's time was page faults
try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise Unsupported(
        "training needs torch and transformers", found=error, hint='pip install "lowbit[train]"'
    ) from None

from lowbit.run._hf_model import load
from lowbit.train.fake_quant import FakeQuantizer, prepare
from lowbit.train.loss import HiddenTargets, TopKTargets, distillation_loss
from lowbit.train.model import load_tokenizer, save
from lowbit.train.options import TrainOptions
from lowbit.train.pipeline import TrainResult, train

__all__ = [
    "FakeQuantizer",
    "HiddenTargets",
    "TopKTargets",
    "TrainOptions",
    "TrainResult",
    "distillation_loss",
    "load",
    "load_tokenizer",
    "prepare",
    "save",
    "train",
]

verbs.make_callable(__name__)
