"""The class around mtmd: what it refuses, and that it refuses before llama.cpp aborts the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadFile, BadOption, NotFound, RuntimeFailed
from lowbit.run import _llama_h, _mtmd_h
from lowbit.run.vision.llama_cpp import LlamaCppVision

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def files(tiny_towers: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny Gemma 3 as text model and mmproj."""
    folder, out = tiny_towers("gemma3")[0], tmp_path_factory.mktemp("vision")
    lowbit.pack(folder, "q8_0", out / "text.gguf")
    lowbit.pack(folder, "q8_0", out / "mmproj.gguf", mmproj=True)
    return out / "text.gguf", out / "mmproj.gguf"


def test_images_of_any_size_and_no_other_input(files: Files) -> None:
    import towers

    with LlamaCppVision(*files, context=64, threads=1) as model:
        small, wide = model.embed(towers.picture(7, 5)), model.embed(towers.picture(60, 200))
        assert small.shape == wide.shape == (16, 64)  # resized to the tower's size
        assert np.abs(small - wide).max() > 0.1
        for wrong in (np.zeros((3, 3), np.uint8), np.zeros((3, 3, 3), np.float32), np.zeros(16_000, np.float32)):
            with pytest.raises(BadOption, match="not what this mmproj takes"):
                model.embed(wrong)
        with pytest.raises(BadOption, match="one <__media__> for each image"):
            list(model.logits_with("no place for it", [towers.picture(4, 4)]))
        with pytest.raises(BadOption, match="does not fit the context"):
            list(model.logits_with("<__media__> " * 5, [towers.picture(4, 4)] * 5))
    with pytest.raises(RuntimeFailed, match="closed"):
        model.embed(towers.picture(4, 4))


def test_an_image_is_decoded_at_once(files: Files) -> None:
    import towers

    with (
        LlamaCppVision(*files, context=64, ubatch=8, threads=1) as model,
        pytest.raises(BadOption, match="at most ubatch = 8"),
    ):
        list(model.logits_with("<__media__>", [towers.picture(4, 4)]))


def test_the_same_logits_whatever_the_slices(files: Files) -> None:
    """A text that is longer than the rows of logits computed at a time."""
    import towers

    text, images = "the thing <__media__> that I saw " * 2, [towers.picture(32, 32, seed) for seed in (0, 1)]

    def logits(**options: Any) -> np.ndarray:
        options = {"context": 256, "threads": 1, "kv_type": "f32", "flash_attention": False} | options
        with LlamaCppVision(*files, **options) as model:
            return np.concatenate([rows for _, _, rows in model.logits_with(text, images)])

    assert np.abs(logits() - logits(logits_rows=3)).max() < 1e-3


def test_an_mmproj_of_another_width(files: Files, tiny_towers: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    import towers

    wider, _ = tiny_towers("gemma3", text_config=towers.TEXT_3 | {"hidden_size": 96})
    lowbit.pack(wider, "q8_0", tmp_path / "text.gguf")
    with pytest.raises(RuntimeFailed, match="mismatch between text model"):
        LlamaCppVision(tmp_path / "text.gguf", files[1], context=64, threads=1)


def test_what_is_no_mmproj(files: Files, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        LlamaCppVision(files[0], tmp_path / "none.gguf", context=64)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(BadFile, match="not a GGUF"):
        LlamaCppVision(files[0], tmp_path / "text.gguf", context=64)
    with pytest.raises(RuntimeFailed, match="cannot load the mmproj"):
        LlamaCppVision(files[0], files[0], context=64)


def test_an_mmproj_that_llama_cpp_dies_of(files: Files, tmp_path: Path) -> None:
    """Its attention would have no heads. Only the child process dies."""
    data, key = bytearray(files[1].read_bytes()), b"clip.vision.attention.head_count"
    at = data.index(key) + len(key) + 4
    assert int.from_bytes(data[at : at + 4], "little") == GgufFile(files[1]).values[key.decode()] == 4
    data[at : at + 4] = (0).to_bytes(4, "little")
    (tmp_path / "lies.gguf").write_bytes(data)
    with pytest.raises((BadFile, RuntimeFailed)):
        LlamaCppVision(files[0], tmp_path / "lies.gguf", context=64, threads=1)


def test_another_layout_of_mtmd_is_refused() -> None:
    params = _mtmd_h.load().lib.mtmd_context_params_default()
    params.batch_max_tokens = 7
    with pytest.raises(RuntimeFailed, match="laid out differently") as error:
        _llama_h.check("mtmd_context_params", params, _mtmd_h._DEFAULTS)
    assert "batch_max_tokens = 7" in str(error.value)


def test_text_that_mtmd_reads_otherwise_is_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a struct of another layout would make it."""
    monkeypatch.setattr(_mtmd_h.InputText, "text_len", 1)
    with pytest.raises(RuntimeFailed, match="tokenizes text differently"):
        LlamaCppVision(*files, context=64, threads=1)
