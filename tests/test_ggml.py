"""The C library by ctypes: what it is asked is checked first, because it aborts or reads on where it is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from lowbit import ggml
from lowbit.errors import BadFile, Unsupported

Q4_0, Q4_1, Q4_K, Q8_K, IQ2_XXS, Q8_1, I8 = 2, 3, 12, 15, 16, 9, 24


def test_quantize_and_back_stays_within_half_a_step() -> None:
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    raw = ggml.quantize(x, Q4_1)
    assert raw.shape == (2, ggml.row_bytes(256, Q4_1)) == (2, 256 // 32 * 20)
    step = (x.reshape(-1, 32).max(1) - x.reshape(-1, 32).min(1)).max() / 15
    assert np.abs(ggml.dequantize(raw, Q4_1, 256) - x).max() <= 0.52 * step  # the offset is a float16


def test_sizes() -> None:
    assert (ggml.type_size(Q4_K), ggml.blck_size(Q4_K), ggml.row_bytes(512, Q4_K)) == (144, 256, 288)
    assert ggml.type_name(Q4_0) == "q4_0"


@pytest.mark.parametrize("ggml_type", [-1, 4, 31, 99, 10**6])
def test_a_type_that_ggml_does_not_have_is_refused(ggml_type: int) -> None:
    with pytest.raises(Unsupported, match="no such ggml type"):
        ggml.quantize(np.zeros((1, 256), np.float32), ggml_type)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(Unsupported, match="q4_0 rows are whole blocks; found 48 weights; expected a multiple of 32"):
        ggml.quantize(np.zeros((1, 48), np.float32), Q4_0)
    with pytest.raises(Unsupported, match="importance matrix"):
        ggml.quantize(np.zeros((1, 256), np.float32), IQ2_XXS)
    for not_for_weights in (Q8_1, Q8_K, I8):
        with pytest.raises(Unsupported, match="cannot quantize to this type"):
            ggml.quantize(np.zeros((1, 256), np.float32), not_for_weights)
    with pytest.raises(BadFile, match="not finite"):
        ggml.quantize(np.full((1, 32), np.nan, np.float32), Q4_0)
    with pytest.raises(BadFile, match="bytes do not fit"):
        ggml.dequantize(np.zeros((1, 17), np.uint8), Q4_0, 32)


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ggml.library.cache_clear()
    try:
        with pytest.raises(Unsupported, match=r"not installed; found no package xllamacpp\. Install it with: pip"):
            ggml.library()
    finally:
        ggml.library.cache_clear()


def test_threads_wait_passively_and_the_package_is_not_imported() -> None:
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None); from lowbit import ggml; ggml.library();"
        "print(os.environ['OMP_WAIT_POLICY'], 'xllamacpp' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["passive", "False", "False"]
