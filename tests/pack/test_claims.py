"""What a certificate must not claim: each case is a file that is not quite its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit import grid as grids
from lowbit.checkpoint import compressed_tensors
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.cli import tables
from lowbit.errors import BadFile, Unsupported
from lowbit.grid.base import Blocks
from lowbit.pack import certificate, lattice

Make = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def change(path: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes a tensor's bytes (uint8) in a GGUF."""
    entry, data = GgufFile(path).entries[name], bytearray(path.read_bytes())
    part = slice(entry.start, entry.start + entry.n_bytes)
    data[part] = np.ascontiguousarray(edit(np.frombuffer(bytes(data[part]), np.uint8))).tobytes()
    path.unlink()
    path.write_bytes(data)


def proved(path: Path, source: Path) -> dict[str, certificate.TensorProof]:
    return {tensor.name: tensor for tensor in lowbit.pack.verify(path, source).tensors}


def test_norms_of_a_gguf_keep_their_bits(tiny_gemma3: Make, tmp_path: Path) -> None:
    """Hugging Face's are one less; there and back, numbers below a half lose their last bits."""
    source, out = lowbit.pack(tiny_gemma3(), "f16", tmp_path / "source.gguf").path, tmp_path / "out.gguf"
    norms = np.linspace(0.01, 0.49, 64, dtype="<f4")
    assert ((norms - np.float32(1)) + np.float32(1) != norms).any()
    change(source, "output_norm.weight", lambda raw: norms.view(np.uint8))
    saved = lowbit.pack(source, "q8_0", out, certificate=True).certificate
    assert np.array_equal(GgufFile(out).raw("output_norm.weight").view("<f4"), norms)
    assert saved is not None and {t.name: t for t in saved.tensors}["model.norm.weight"].exact == 1
    change(out, "output_norm.weight", lambda raw: ((norms - np.float32(1)) + np.float32(1)).view(np.uint8))
    certificate.path_beside(out).unlink()
    assert proved(out, source)["model.norm.weight"].off_lattice == 1


def test_norms_without_their_offset_are_off(tiny_gemma3: Make, tmp_path: Path) -> None:
    folder, out = tiny_gemma3(), tmp_path / "x.gguf"
    lowbit.pack(folder, "f32", out)
    change(out, "output_norm.weight", lambda raw: (raw.view("<f4") - np.float32(1)).view(np.uint8))
    tensor = proved(out, folder)["model.norm.weight"]
    assert tensor.exact == 0 and tensor.max_error == pytest.approx(1)


def test_queries_in_hugging_faces_row_order_are_off(tiny_llama: Make, tmp_path: Path) -> None:
    folder, out = tiny_llama(), tmp_path / "x.gguf"
    lowbit.pack(folder, "f32", out)
    back = lambda raw: raw.reshape(4, 8, 2, -1).swapaxes(1, 2)  # noqa: E731
    change(out, "blk.0.attn_q.weight", back)
    tensor = proved(out, folder)["model.layers.0.self_attn.q_proj.weight"]
    assert tensor.off_lattice == 64 - 4 * 2  # the first and the last row of a head lie where they did


def test_rotary_frequencies_are_compared_too(tiny_llama: Make, tmp_path: Path) -> None:
    """A config's, which no tensor of the source holds."""
    folder, out = tiny_llama(rope_parameters=LLAMA3), tmp_path / "x.gguf"
    lowbit.pack(folder, "q4_0", out)
    assert proved(out, folder)["rope_freqs.weight"].exact == 1
    change(out, "rope_freqs.weight", lambda raw: (raw.view("<f4") * np.float32(2)).view(np.uint8))
    assert proved(out, folder)["rope_freqs.weight"].off_lattice == 1
    lowbit.pack(tiny_llama(), "q4_0", out)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": LLAMA3}), "utf-8")
    with pytest.raises(BadFile, match=r"rope_freqs\.weight: not what the source's config gives; found nothing"):
        lowbit.pack.verify(out, folder)


def test_a_certificate_that_moves_a_block_between_tensors(tiny_llama: Make, tmp_path: Path) -> None:
    """The totals are right, and what is said of two tensors is not."""
    folder, out = tiny_llama(), tmp_path / "x.gguf"
    lowbit.pack(folder, "q4_0", out, certificate=True)
    path = certificate.path_beside(out)
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    worst, best = (next(t for t in saved["tensors"] if t[key]) for key in ("off_lattice", "exact"))
    for tensor, by in ((worst, 1), (best, -1)):
        tensor["exact"] += by
        tensor["off_lattice"] -= by
    path.write_text(json.dumps(saved), "utf-8")
    with pytest.raises(BadFile, match="does not say what is so"):
        lowbit.pack.verify(out, folder)


def test_the_summary_tells_of_what_was_not_compared(
    tiny_llama: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import sys

    folder, out = tiny_llama(), tmp_path / "x.gguf"
    saved = lowbit.pack(folder, "q4_0", out, certificate=True).certificate
    assert saved is not None
    found = saved.to_json()
    tables.show_certificate(found, sys.stdout)
    assert "could not be compared" not in capfd.readouterr().out
    found["tensors"][0]["note"] = "lowbit cannot decode iq2_xxs: not compared"
    tables.show_certificate(found, sys.stdout)
    assert "; 1 tensor could not be compared" in capfd.readouterr().out


SCALES = {
    "zero": 0.0,
    "the least subnormal": 2.0**-24,
    "a subnormal": 3 * 2.0**-24,
    "the largest": 65504.0,
    "negative": -0.0123291015625,
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", SCALES)
def test_odd_scales(rounded: Callable[..., np.ndarray], name: str, dtype: str) -> None:
    """Exact where the values are the codes times this scale, and off with any value moved by its last bit."""
    scale = np.float16(SCALES[name])
    codes = (np.arange(32) % 15 - 7).astype(np.int8).reshape(1, 1, 32)
    if name == "the largest":
        codes = np.clip(codes, -1, 1)
    blocks = Blocks(codes=codes, scales=np.array([[scale]]))
    values = rounded(codes.reshape(1, 32) * np.float32(scale), dtype)
    assert lattice.judge(values, blocks, dtype) == lattice.EXACT
    for i in (0, 14, 31):
        moved = values.copy()
        moved[0, i] = rounded(
            np.nextafter(moved[0, i], np.float32(np.inf)) + np.abs(moved[0, i]) * 2.0**-7 + 2.0**-20, dtype
        )
        assert moved[0, i] != values[0, i]
        assert lattice.judge(moved, blocks, dtype) != lattice.EXACT


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number_proves_nothing(scale: float) -> None:
    blocks = Blocks(codes=np.zeros((1, 1, 32), np.int8), scales=np.array([[scale]], np.float16))
    assert lattice.judge(np.zeros((1, 32), np.float32), blocks, "BF16") == lattice.OFF_LATTICE


def test_a_flushed_scale_of_compressed_tensors_is_off(rounded: Callable[..., np.ndarray]) -> None:
    """A bfloat16 scale below float16's least becomes 0, and the block all zeros: no rounding of a scale."""
    scale = np.float32(2.0**-30)
    codes = (np.arange(32) % 15 - 7).astype(np.int8).reshape(1, 1, 32)
    values = codes.reshape(1, 32) * scale
    stored = grids.get("q4_0").unpack(grids.get("q4_0").pack(Blocks(codes=codes, scales=np.float16([[scale]]))))
    assert lattice.judge(values, stored, "F32") == lattice.OFF_LATTICE


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config", "kv_cache_scheme"])
def test_more_than_a_quantization(key: str) -> None:
    """Rotated or sparse weights are not their codes times their scales."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    described = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": weights}},
    }
    assert compressed_tensors.scheme_of({"quantization_config": described | {key: None}}, "config.json")
    with pytest.raises(Unsupported, match=key):
        compressed_tensors.scheme_of({"quantization_config": described | {key: {"a": 1}}}, "config.json")
