"""The packed file: what training ended on, byte for byte; and nothing half-written where it fails."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import lowbit
from lowbit import ggml
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint, Tensor, open_checkpoint, write_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.errors import BadFile, CannotWrite, NotFound, Unsupported


def trained(checkpoint: Checkpoint, recipe: str = "q4_0") -> Iterator[Tensor]:
    """As training leaves it: on the recipe's grids, with scales that rounding its values does not find again."""
    from lowbit import recipe as recipes

    rng = np.random.default_rng(0)
    for name, grid_name in recipes.get(recipe).assign(checkpoint).items():
        grid, values = grids.get(grid_name), checkpoint.read(name)
        if not grid.has_scales:
            yield Tensor(name=name, values=values)
            continue
        matrix = values.reshape(-1, values.shape[-1])  # experts lie one below the other
        blocks = grid.quantize(matrix)
        scales = (blocks.scales.astype(np.float32) * rng.uniform(1.1, 1.4, blocks.scales.shape)).astype(np.float16)
        blocks = grid.encode(matrix, scales)
        values = grid.dequantize(blocks).reshape(values.shape)
        yield Tensor(name=name, values=values, grid=grid_name, blocks=grid.pack(blocks))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4_moe"])
def test_what_training_ended_on_is_in_the_file(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    """Every weight: the file's codes and scales are the checkpoint's, and llama.cpp's values are training's."""
    with open_checkpoint(request.getfixturevalue(f"tiny_{family}")()) as source:
        tensors = {tensor.name: tensor for tensor in trained(source)}
        write_checkpoint(tmp_path / "trained", source, tensors.values())
    result = lowbit.pack(tmp_path / "trained", "q4_0", tmp_path / "out.gguf")
    on_grid = [tensor for tensor in tensors.values() if tensor.grid]
    assert {tensor.grid for tensor in on_grid} == {"q4_0", "q8_0"}
    with open_checkpoint(tmp_path / "out.gguf") as packed:
        for tensor in on_grid:
            blocks = packed.blocks(tensor.name)
            assert blocks is not None
            assert tensor.blocks is not None
            assert (blocks == tensor.blocks).all()
            assert (packed.read(tensor.name) == tensor.values).all()
            assert result.types[tensor.name] == packed.info(tensor.name).grid == tensor.grid
    # The same by another reader, whose rows are in the file's order.
    order = {spec.gguf_name: spec.gguf_rows() for spec in packed.specs.values()}
    names = {packed.info(name).gguf_name: name for name in packed.names}
    for stored in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        of_file = tensors.get(names.get(stored.name, ""))  # none for one that GGUF computes
        expected = of_file.blocks if of_file else None
        if expected is not None:
            rows = order[stored.name]
            found = stored.data.reshape(len(expected), -1)
            assert (found == (expected if rows is None else expected[rows])).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4_moe"])
def test_naive_is_the_c_library(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    """Also from a checkpoint with blocks of its own: naive means rounding its values."""
    with open_checkpoint(request.getfixturevalue(f"tiny_{family}")()) as source:
        write_checkpoint(tmp_path / "trained", source, trained(source))
    lowbit.pack(tmp_path / "trained", "q4_0", tmp_path / "naive.gguf", naive=True)
    file = GgufFile(tmp_path / "naive.gguf")
    with open_checkpoint(tmp_path / "trained") as source:
        for spec in source.specs.values():
            values, rows = source.read(spec.name) + np.float32(spec.gguf_offset), spec.gguf_rows()
            values = (values if rows is None else values[rows]).reshape(-1, spec.shape[-1])
            ggml_type = gguf.GGMLQuantizationType[file.entries[spec.gguf_name].dtype]
            assert (file.raw(spec.gguf_name) == ggml.quantize(values, ggml_type).reshape(-1)).all()


@pytest.mark.parametrize("recipe", ["q8_0", "q5_0", "q5_1", "q4_1"])
def test_a_gguf_on_the_recipes_grids_keeps_its_blocks(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    """A source's own tensors go through untouched: packing a pack changes no byte."""
    first = lowbit.pack(tiny_llama(), recipe, tmp_path / "first.gguf").path
    second = lowbit.pack(first, recipe, tmp_path / "second.gguf").path
    assert first.read_bytes() == second.read_bytes()


def test_experts_keep_their_blocks(tiny_gemma4_moe: Callable[..., Path], tmp_path: Path) -> None:
    first = lowbit.pack(tiny_gemma4_moe(), "q4_0", tmp_path / "first.gguf").path
    second = lowbit.pack(first, "q4_0", tmp_path / "second.gguf").path
    assert first.read_bytes() == second.read_bytes()
    entry = GgufFile(first).entries["blk.1.ffn_gate_up_exps.weight"]
    assert (entry.dtype, entry.shape) == ("Q4_0", (8, 64, 64))


def test_the_readers_of_others_agree(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """gguf-py reads every key-value and every tensor of the file as lowbit wrote it."""
    path = lowbit.pack(tiny_llama(), "q4_0", tmp_path / "x.gguf").path
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert values == ours.values
    assert {t.name: t.data.tobytes() for t in theirs.tensors} == {n: ours.raw(n).tobytes() for n in ours.entries}


def test_every_key_of_a_gguf_is_carried_over(packaged_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    source = packaged_gguf("smollm2-135m")
    with open_checkpoint(source) as checkpoint:
        write_checkpoint(
            tmp_path / "trained",
            checkpoint,
            (Tensor(name=name, values=checkpoint.read(name)) for name in checkpoint.names),
        )
    expected = {field.key: field for field in GgufFile(source).fields}
    for model in (source, tmp_path / "trained"):
        made = {f.key: f for f in GgufFile(lowbit.pack(model, "q4_0", tmp_path / "x.gguf").path).fields}
        assert set(made) == set(expected)
        assert {key for key in made if made[key] != expected[key]} == {"general.file_type"}
        assert made["general.file_type"].value == 2


@pytest.mark.parametrize(
    ("recipe", "file_type"),
    [("f32", 0), ("f16", 1), ("q4_0", 2), ("q4_1", 3), ("q8_0", 7), ("q5_0", 8), ("q5_1", 9), ("bf16", 32)],
)
def test_the_file_type_is_told(tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str, file_type: int) -> None:
    result = lowbit.pack(tiny_llama(), recipe, tmp_path / "x.gguf")
    values = GgufFile(result.path).values
    assert values["general.file_type"] == file_type
    assert values["general.quantization_version"] == 2
    assert values["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert result.size_bytes == result.path.stat().st_size


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_the_source_keeps_its_precision(
    tiny_llama: Callable[..., Path], tmp_path: Path, dtype: str, stored: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_llama()
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
    lowbit.pack(folder, "source", tmp_path / "x.gguf")
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "x.gguf") as packed:
        assert {packed.info(n).dtype for n in packed.names if len(packed.info(n).shape) > 1} == {stored}
        assert all((packed.read(name) == source.read(name)).all() for name in source.names)


def test_the_source_of_a_quantized_file_is_f32(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    lowbit.pack(tiny_llama(), "q8_0", tmp_path / "q8.gguf")
    lowbit.pack(tmp_path / "q8.gguf", "source", tmp_path / "reference.gguf")
    with open_checkpoint(tmp_path / "q8.gguf") as source, open_checkpoint(tmp_path / "reference.gguf") as packed:
        assert {packed.info(name).dtype for name in packed.names} == {"F32"}
        assert all((packed.read(name) == source.read(name)).all() for name in source.names)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_weight_is_named(tiny_llama: Callable[..., Path], tmp_path: Path, value: float) -> None:
    with open_checkpoint(tiny_llama()) as source:
        tensors = [Tensor(name=name, values=source.read(name)) for name in source.names]
        tensors[4].values.flat[7] = value
        write_checkpoint(tmp_path / "broken", source, tensors)
    with pytest.raises(BadFile, match=rf"{tensors[4].name}: the weights are not finite; found (NaN|Inf)"):
        lowbit.pack(tmp_path / "broken", "q4_0", tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir() if "gguf" in p.name] == []


def test_rows_that_are_not_whole_blocks(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(intermediate_size=72)
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp\.down_proj\.weight: .* a multiple of 32"):
        lowbit.pack(folder, "q4_0", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    lowbit.pack(folder, "f16", tmp_path / "x.gguf")


def test_a_full_disk(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """A file size limit stands in for it: the write fails half-way, the old file stays, nothing else does."""
    folder, out = tiny_llama(), tmp_path / "out" / "x.gguf"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    code = (
        "import sys, lowbit\nfrom lowbit.errors import CannotWrite\n"
        "try: lowbit.pack(sys.argv[1], 'f32', sys.argv[2])\n"
        "except CannotWrite as error: print(error)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(folder), str(out)],
        preexec_fn=limit, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{out}: cannot write")
    assert [p.name for p in out.parent.iterdir()] == ["x.gguf"]
    assert out.read_bytes() == b"what was there"


def test_no_such_place(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CannotWrite, match=r"x\.gguf: cannot write"):
        lowbit.pack(tiny_llama(), "f32", tmp_path / "file" / "x.gguf")


def test_no_tokenizer(save_tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", tokenizer=False)
    with pytest.raises(NotFound, match=r"no tokenizer\.json.*save_pretrained"):
        lowbit.pack(tmp_path / "model", "f32", tmp_path / "x.gguf")
