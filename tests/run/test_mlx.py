"""MLX as a runtime: streamed logits, and one clear line for whatever cannot be run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit
from lowbit.errors import BadConfig, BadFile, BadOption, BadText, LowbitError, NotFound, RuntimeFailed
from lowbit.run.mlx import Mlx

TOKENS = np.random.default_rng(2).integers(3, 263, 60).astype(np.int32)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return lowbit.pack(tiny_llama(num_hidden_layers=2), "mlx_affine4_g32", tmp_path / "mlx").path


def test_logits_are_streamed(tiny_gemma3: Callable[..., Path], tmp_path: Path) -> None:
    """In runs of ubatch through the cache as at once, also past a window of 16; from ``start`` on."""
    folder = lowbit.pack(tiny_gemma3(), "mlx_affine4_g32", tmp_path / "mlx").path
    with Mlx(folder, dtype="float32") as model:
        [(offset, whole)] = model.logits(TOKENS)
        assert offset == 0 and whole.shape == (60, model.n_vocab) and whole.dtype == np.float32
        [(offset, late)] = model.logits(TOKENS, start=37)
        assert offset == 37 and np.array_equal(late, whole[37:])
    with Mlx(folder, ubatch=7, dtype="float32") as model:
        runs = list(model.logits(TOKENS, start=10))
        assert [(first, len(rows)) for first, rows in runs][:3] == [(10, 4), (14, 7), (21, 7)]
        np.testing.assert_allclose(np.concatenate([rows for _, rows in runs]), whole[10:], atol=1e-4)


def test_the_folders_own_dtype(folder: Path) -> None:
    """float16 scales, float32 norms: MLX computes in float32 but for an embedding's row, which is float16."""
    with Mlx(folder) as model, Mlx(folder, dtype="float32") as exact, Mlx(folder, dtype="bfloat16") as rough:
        assert (model.threads, model.context, model.n_vocab) == (1, 512, 320)
        ours, theirs, near = (next(m.logits(TOKENS))[1] for m in (model, exact, rough))
    assert 0 < np.abs(ours - theirs).max() < 0.05 < np.abs(near - theirs).max() < 1


def test_text(folder: Path) -> None:
    from transformers import AutoTokenizer

    with Mlx(folder) as model:
        assert model.tokenize("the thing, 42") == AutoTokenizer.from_pretrained(folder)("the thing, 42").input_ids
        with pytest.raises(BadText, match="lone surrogate"):
            model.tokenize("\ud800")


def test_bad_options(folder: Path) -> None:
    for options in ({"context": -1}, {"ubatch": 0}, {"threads": 2}, {"dtype": "int8"}):
        with pytest.raises(BadOption):
            Mlx(folder, **options)  # type: ignore[arg-type]
    model = Mlx(folder, context=0)
    assert model.context == 512  # what it was trained for
    for tokens in ([], [320], [-1], [5] * 513):
        with pytest.raises(BadOption):
            list(model.logits(tokens))
    model.close()
    for use in (lambda: list(model.logits([5])), lambda: model.tokenize("a")):
        with pytest.raises(RuntimeFailed, match="this model was closed"):
            use()


def damage(folder: Path, case: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if case == "nothing there":
        shutil.rmtree(folder)
    elif case == "no config":
        config.unlink()
    elif case == "not JSON":
        config.write_text("{")
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif case == "scales missing":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.scales"]
        save_file(tensors, weights)
    else:
        changes = {
            "an unknown model": {"model_type": "mystery"},
            "no layers": {"num_hidden_layers": None},
            "other sizes": {"hidden_size": 96},
            "a program to run": {"model_file": "evil.py"},
            "no vocabulary": {"vocab_size": "many"},
        }[case]
        config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("nothing there", NotFound), ("no config", BadFile), ("not JSON", BadConfig), ("truncated", BadFile),
        ("scales missing", BadFile), ("an unknown model", BadFile), ("no layers", BadFile), ("other sizes", BadFile),
        ("a program to run", BadFile), ("no vocabulary", LowbitError),
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line(folder: Path, case: str, kind: type[LowbitError]) -> None:
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    damage(folder, case)
    with pytest.raises(kind) as caught:
        Mlx(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "ran").exists()
