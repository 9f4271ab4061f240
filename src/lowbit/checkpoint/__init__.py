"""Open-weight checkpoints in and out: Hugging Face folders of safetensors, and GGUF.

``open_checkpoint`` checks a checkpoint whole before it is believed and then gives its tensors one at a time, in
Hugging Face's names and layout whatever the container. ``write_checkpoint`` writes what training ended on, with the
codes and scales that the packer will copy.
"""

from __future__ import annotations

from lowbit.checkpoint.model import Checkpoint, TensorInfo
from lowbit.checkpoint.open import open_checkpoint
from lowbit.checkpoint.resolve import resolve
from lowbit.checkpoint.write import Tensor, write_checkpoint

__all__ = ["Checkpoint", "Tensor", "TensorInfo", "open_checkpoint", "resolve", "write_checkpoint"]
