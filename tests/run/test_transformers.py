"""transformers as a runtime: streamed logits, generation, three kinds of artifact, and one line for what fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lowbit
from lowbit.errors import BadConfig, BadFile, BadOption, BadText, LowbitError, NotFound, RuntimeFailed, Unsupported
from lowbit.run.transformers import Transformers

TOKENS = np.random.default_rng(2).integers(3, 263, 60).astype(np.int32)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=2)


def test_logits_are_streamed_and_are_the_models(tiny_gemma3: Callable[..., Path]) -> None:
    """Also past a window of 16; of the last positions only they are computed."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_gemma3()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        expected = plain(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].numpy()
    with Transformers(folder, threads=1) as model:
        [(offset, whole)] = model.logits(TOKENS)
        assert offset == 0 and whole.dtype == np.float32
        np.testing.assert_allclose(whole, expected, atol=1e-5)
        [(offset, late)] = model.logits(TOKENS, start=37)
        assert offset == 37
        np.testing.assert_allclose(late, expected[37:], atol=1e-5)
    with Transformers(folder, ubatch=7, threads=1) as model:
        runs = list(model.logits(TOKENS, start=10))
        assert [(first, len(rows)) for first, rows in runs][:3] == [(10, 4), (14, 7), (21, 7)]
        np.testing.assert_allclose(np.concatenate([rows for _, rows in runs]), expected[10:], atol=1e-4)


def test_generation_is_the_argmax_of_the_logits(folder: Path) -> None:
    with Transformers(folder, context=64, threads=1) as model:
        made = list(model.generate([5, 6, 7], 9, ignore_end=True))
        [(_, rows)] = model.logits([5, 6, 7, *made[:-1]], 2)
        assert made == rows.argmax(-1).tolist()
        assert "".join(model.chat([{"role": "user", "content": "the"}], 5)) == model.detokenize(
            list(model.generate(model.prompt_of([{"role": "user", "content": "the"}]), 5))
        )
    with Transformers(folder, context=20, threads=1) as model:
        assert len(list(model.generate([5, 6, 7], ignore_end=True))) == 20 - 3 + 1


def test_the_stored_dtype_and_another(folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    with (
        Transformers(folder, threads=1) as exact,
        Transformers(tmp_path / "bf16", threads=1) as rough,
        Transformers(tmp_path / "bf16", threads=1, dtype="float32") as widened,
    ):
        rows = [next(model.logits(TOKENS))[1] for model in (exact, rough, widened)]
        assert exact.model_bytes == 2 * rough.model_bytes == 4 * exact.n_weights
    assert np.abs(rows[2] - rows[0]).max() > 0 and not np.array_equal(rows[1], rows[2])
    assert set(np.unique(rows[1].view(np.uint32) & 0xFFFF)) == {0}  # computed in bfloat16


def test_a_gguf_and_a_compressed_tensors_folder(folder: Path, tmp_path: Path) -> None:
    """The GGUF's tokenizer and template too; what is packed counts its weights, not its integers."""
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    lowbit.pack(folder, "int4_g32", tmp_path / "ct")
    with (
        Transformers(folder, threads=1) as plain,
        Transformers(tmp_path / "f32.gguf", threads=1) as gguf,
        Transformers(tmp_path / "ct", threads=1) as packed,
    ):
        expected, found = next(plain.logits(TOKENS))[1], next(gguf.logits(TOKENS))[1]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        text = "the thing, 42 <|im_end|>"
        assert gguf.tokenize(text) == plain.tokenize(text) == packed.tokenize(text)
        assert 2 not in plain.tokenize(text) and plain.tokenize(text, parse_special=True)[-1] == 2
        assert gguf.ends(2) and not gguf.ends(5)
        assert gguf.n_weights == plain.n_weights == packed.n_weights
        assert gguf.model_bytes == 4 * gguf.n_weights > 2 * packed.model_bytes
        assert gguf.chat_template == plain.chat_template


def test_bad_options_and_uses(folder: Path) -> None:
    for options in ({"context": -1}, {"ubatch": 0}, {"threads": 0}, {"dtype": "int8"}):
        with pytest.raises(BadOption):
            Transformers(folder, **options)  # type: ignore[arg-type]
    model = Transformers(folder, context=0, threads=1)
    assert model.context == 512
    for tokens in ([], [320], [-1], [5] * 513):
        with pytest.raises(BadOption):
            list(model.logits(tokens))
    with pytest.raises(BadText, match="lone surrogate"):
        model.tokenize("\ud800")
    model.close()
    for use in (lambda: list(model.logits([5])), lambda: model.tokenize("a"), lambda: list(model.generate([5]))):
        with pytest.raises(RuntimeFailed, match="this model was closed"):
            use()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("nothing there", NotFound), ("no config", BadFile), ("not JSON", BadConfig), ("truncated", BadFile),
        ("an unknown model", BadFile), ("remote code", BadFile), ("a pickle", Unsupported), ("a cut GGUF", BadFile),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line(folder: Path, tmp_path: Path, case: str, kind: type[LowbitError]) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    target = folder
    if case == "nothing there":
        target = tmp_path / "nowhere"
    elif case == "no config":
        config.unlink()
    elif case == "not JSON":
        config.write_text("{")
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif case == "a pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif case == "a cut GGUF":
        target = tmp_path / "cut.gguf"
        target.write_bytes(lowbit.pack(folder, "f32", tmp_path / "f32.gguf").path.read_bytes()[:-99])
    else:
        changes = {"model_type": "mystery"}
        if case == "remote code":
            (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
            changes["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}  # type: ignore[assignment]
        config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(kind) as caught:
        Transformers(target)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "ran").exists()
