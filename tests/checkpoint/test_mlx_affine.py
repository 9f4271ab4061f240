"""MLX folders as checkpoints: written by MLX itself, read to the bit; what lies about itself is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, LowbitError

UP, HEAD = "model.layers.0.mlp.up_proj", "lm_head"


@pytest.fixture
def folder(tiny_llama: Callable[..., Path]) -> Path:
    """A folder quantized by mx.quantize: 4 bits in groups of 64, the head 8 in groups of 32, the embedding left."""
    folder = tiny_llama(intermediate_size=192)
    arrays: dict[str, Any] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        module, array = name.removesuffix(".weight"), mx.array(values).astype(mx.bfloat16)
        if values.ndim == 2 and "embed" not in name:
            group, bits = (32, 8) if module == HEAD else (64, 4)
            parts = mx.quantize(array, group_size=group, bits=bits, stream=mx.cpu)
            arrays |= {f"{module}.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=True)}
        else:
            arrays[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    change(folder, quantization={"group_size": 64, "bits": 4, HEAD: {"group_size": 32, "bits": 8}})
    return folder


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | keys), "utf-8")


def rewrite(folder: Path, **parts: mx.array | None) -> None:
    """Changes tensors; '/' stands for a dot in their names. None takes one away."""
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    changed = arrays | {name.replace("/", "."): array for name, array in parts.items()}
    kept = {name: array for name, array in changed.items() if array is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})


def test_the_values_are_mlxs(folder: Path) -> None:
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    with open_checkpoint(folder) as found:
        for name in found.names:
            module, info = name.removesuffix(".weight"), found.info(name)
            array = arrays[name].astype(mx.float32) if f"{module}.scales" not in arrays else None
            if array is None:
                group, bits = (32, 8) if module == HEAD else (64, 4)
                assert (info.dtype, info.grid) == (f"mlx_affine{bits}_g{group}", None)
                scales, biases = (arrays[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
                array = mx.dequantize(arrays[name], scales, biases, group, bits, stream=mx.cpu)
            assert np.array_equal(found.read(name), np.array(array)), name
            assert np.array_equal(found.read_rows(name, 0, 1)[0], found.read(name).reshape(-1, info.shape[-1])[0])


def test_what_inspect_says(folder: Path) -> None:
    found = lowbit.inspect(folder)
    assert (found["kind"], found["quantization"], found["problem"]) == ("mlx", "affine", None)
    assert {kind: of["count"] for kind, of in found["types"].items()} == {
        "mlx_affine4_g64": 21, "mlx_affine8_g32": 1, "BF16": 8,
    }  # fmt: skip
    [head] = [tensor for tensor in found["tensors"] if tensor["name"] == "lm_head.weight"]
    assert head == {"name": "lm_head.weight", "shape": [320, 64], "dtype": "mlx_affine8_g32", "bytes": 320 * 72}
    stored = sum(a.nbytes for a in mx.load(str(folder / "model.safetensors")).values())
    assert found["bits_per_weight"] == 8 * stored / found["weights"]
    with open_checkpoint(folder) as checkpoint:
        assert found["weights"] == checkpoint.n_weights


@pytest.mark.parametrize(("bits", "group", "mode"), [(6, 64, "affine"), (4, 128, "affine"), (4, 32, "mxfp4")])
def test_what_lowbit_does_not_read_is_told(folder: Path, bits: int, group: int, mode: str) -> None:
    """inspect shows the tensors all the same."""
    values = mx.array(np.zeros((192, 64), np.float32)) if group <= 64 else mx.array(np.zeros((192, 128), np.float32))
    words, scales, *biases = mx.quantize(values, group_size=group, bits=bits, mode=mode, stream=mx.cpu)
    rewrite(folder, **{f"{UP}.weight": words, f"{UP}.scales": scales, f"{UP}.biases": biases[0] if biases else None})
    own = {"group_size": group, "bits": bits, "mode": mode}
    change(folder, hidden_size=max(64, group), quantization={"group_size": 64, "bits": 4, UP: own})
    found = lowbit.inspect(folder)
    assert found["kind"] == "mlx" or mode != "affine"
    assert found["problem"] is not None and len(found["tensors"]) >= 30
    with pytest.raises(LowbitError):
        open_checkpoint(folder)


BROKEN: dict[str, tuple[dict[str, mx.array | None], str]] = {
    "no biases": ({f"{UP}.biases": None}, r"up_proj\.biases: a part of a packed matrix"),
    "scales of another shape": ({f"{UP}.scales": mx.zeros((192, 3))}, "codes and scales do not fit"),
    "scales of rows": ({f"{UP}.scales": mx.zeros((7, 1))}, r"up_proj\.scales: a part of a packed matrix"),
    "no groups at all": ({f"{UP}.scales": mx.zeros((192, 0))}, "codes and scales do not fit"),
    "scales of integers": ({f"{UP}.scales": mx.zeros((192, 1), mx.int32)}, "found I32"),
    "biases of another dtype": ({f"{UP}.biases": mx.zeros((192, 1), mx.float16)}, "found F16"),
    "words of another dtype": ({f"{UP}.weight": mx.zeros((192, 8), mx.int32)}, "found I32"),
    "too few words": ({f"{UP}.weight": mx.zeros((192, 7), mx.uint32)}, "codes and scales do not fit"),
    "no words": ({f"{UP}.weight": None}, "missing"),
    "scales alone": ({"model.norm.scales": mx.zeros((192, 1))}, r"norm\.weight: codes and scales of what is no matrix"),
    "scales of a scalar": ({f"{UP}.scales": mx.array(1.0)}, "codes and scales do not fit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_parts_are_named(folder: Path, case: str) -> None:
    parts, told = BROKEN[case]
    rewrite(folder, **parts)
    with pytest.raises(BadFile, match=told) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    lowbit.inspect(folder)


@pytest.mark.parametrize(
    "quantization",
    [[], "4bit", {}, {"bits": 4}, {"bits": "4", "group_size": 64}, {"bits": 4, "group_size": 64, "mode": "nvfp4"},
     {"bits": 4, "group_size": 64, UP: {"bits": 8, "group_size": 64}}, {"bits": 4, "group_size": 64, UP: {"mode": []}}],
    ids=str,
)  # fmt: skip
def test_a_config_that_does_not_say_it(folder: Path, quantization: Any) -> None:
    change(folder, quantization=quantization)
    with pytest.raises(LowbitError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_module_that_the_config_does_not_name(folder: Path) -> None:
    """mlx-lm tells its bits from the shapes, and so does lowbit; old folders use transformers' key."""
    change(folder, quantization=None, quantization_config={"group_size": 64, "bits": 4})
    with open_checkpoint(folder) as found:
        assert found.info("lm_head.weight").dtype == "mlx_affine8_g32"
    assert lowbit.inspect(folder)["kind"] == "mlx"


def test_a_scale_that_is_not_a_number(folder: Path, tmp_path: Path) -> None:
    scales = np.ones((192, 1), np.float32)
    scales[5] = np.nan
    part = mx.array(scales).astype(mx.bfloat16)
    rewrite(folder, **{f"{UP}.scales": part, f"{UP}.biases": part})
    for to in ("mlx", "gguf"):
        with pytest.raises(BadFile, match=r"up_proj\.weight: the weights are not finite; found NaN"):
            lowbit.pack(folder, "mlx_affine4_g64" if to == "mlx" else "q8_0", tmp_path / "x")
    assert not (tmp_path / "x").exists()
