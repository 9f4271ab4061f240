"""Rows a slice at a time are the tensor's, in the file's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.pack.rows import file_rows, precision_of, row_slices


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"attention_bias": True}), ("gemma3", {})])
def test_the_slices_are_the_whole(request: pytest.FixtureRequest, family: str, changes: dict[str, bool]) -> None:
    with open_checkpoint(request.getfixturevalue(f"tiny_{family}")(**changes)) as source:
        assert any(spec.role == "bias" and spec.heads for spec in source.specs.values()) == bool(changes)
        for spec in source.specs.values():
            whole, order = source.read(spec.name) + np.float32(spec.gguf_offset), spec.gguf_rows()
            whole = (whole if order is None else whole[order]).reshape(-1, spec.shape[-1])
            for weights in (1, 1000, 1 << 20):
                slices = list(row_slices(spec, weights))
                assert [start for start, _ in slices[1:]] == [stop for _, stop in slices[:-1]]
                parts = [file_rows(source, spec, start, stop) for start, stop in slices]
                np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("shape", "heads", "weights", "steps"),
    [
        ((100, 64), 0, 640, 10),
        ((100, 64), 0, 1, 1),  # at least a row
        ((96, 64), 4, 640, 24),  # at least a head
        ((96, 64), 4, 64 * 50, 48),  # whole heads
        ((64,), 0, 8, 1),
        ((64,), 4, 8, 1),  # a bias of heads is one row too
        ((8, 30, 64), 0, 64 * 100, 100),  # experts follow one another
    ],
)
def test_slices(shape: tuple[int, ...], heads: int, weights: int, steps: int) -> None:
    spec = TensorSpec(name="x", gguf_name="x", role="attn_q", shape=shape, heads=heads)
    slices = list(row_slices(spec, weights))
    assert slices[0][0] == 0 and slices[-1][1] == spec.n_rows
    assert {stop - start for start, stop in slices[:-1]} <= {steps} and slices[0][1] == min(steps, spec.n_rows)


def test_the_precision_is_told_by_the_last_row_too(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(tiny_llama()) as source:
        values = {each: source.read(each) for each in source.names}
        for each in values.values():
            each.view(np.uint32)[...] &= 0xFFFF0000
        for finer in (False, True):
            values[name][-1, -1] += np.float32(2.0**-20) * finer
            write_checkpoint(tmp_path / "out", source, (Tensor(name=n, values=v) for n, v in values.items()))
            with open_checkpoint(tmp_path / "out") as made:
                assert precision_of(made, made.specs[name]) == ("F32" if finer else "BF16")
