"""What a GGUF tells the harness."""

from __future__ import annotations

from lowbit import checkpoint
from lowbit.harness import of_model


def test_a_packaged_model() -> None:
    path = checkpoint.resolve("smollm2-135m")
    assert "<|im_start|>" in of_model.control_tokens(path)
    assert of_model.told_by_template(path, None) == (None, False)  # SmolLM2's template knows no tools
