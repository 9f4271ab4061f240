"""Static int8 activations in a compressed-tensors folder: transformers computes what training simulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_for_phones import trained

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, Unsupported
from lowbit.run._hf_model import load
from lowbit.train import static_ranges

Make = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(3, 200, (2, 24))
V_CACHE = "model.layers.0.self_attn.v_cache_scale"


def calibrated(folder: Path, out: Path, name: str) -> tuple[Path, Any]:
    """A trained checkpoint with scales of its activations beside it; and the model that training saw last."""
    folder, _ = trained(folder, out, name)
    with open_checkpoint(folder) as checkpoint:
        model = load(checkpoint)
        modules = tuple(n.removesuffix(".weight") for n in checkpoint.names if checkpoint.info(n).grid)
    found = static_ranges.calibrate(model, modules, TOKENS, torch.float32)
    note(folder, found)
    static_ranges.attach(model, modules, found)
    return folder, model


def note(folder: Path, scales: dict[str, torch.Tensor]) -> None:
    save_file(scales, folder / "activations.safetensors")
    manifest = json.loads((folder / "lowbit.json").read_text("utf-8"))
    manifest["activations"] = {"kind": "static-int8", "file": "activations.safetensors"}
    (folder / "lowbit.json").write_text(json.dumps(manifest), encoding="utf-8")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.from_numpy(TOKENS)).logits
    return found


def in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "mobile_mlp2"), ("gemma3", "mobile"), ("qwen3", "mobile_w8"), ("gemma4 E2B", "mobile")],
)
def test_transformers_computes_what_training_simulated(
    family: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family, _, layout = family.partition(" ")
    model = request.getfixturevalue(f"tiny_{family}")(*filter(None, [layout]))
    folder, simulated = calibrated(model, tmp_path / "trained", name)
    out = tmp_path / "ct"
    lowbit.pack(folder, name, out, to="compressed-tensors", certificate=True)
    if family == "gemma4":  # the library has no caches whose heads are of two sizes
        for _, each in filter(lambda found: found[0].endswith("_cache_scale"), static_ranges.ranges(simulated)):
            each.range_scale.data.zero_()
    expected = logits(simulated)
    static_ranges.detach(simulated)
    without, found = logits(simulated), logits(in_transformers(out))
    # But for sums that land between two codes, as the kernels add up in another order.
    assert float((found - expected).abs().median()) < 1e-5
    assert float((found - expected).abs().mean()) < 0.1 * float((without - expected).abs().mean())
    stored = load_file(folder / "activations.safetensors")
    with open_checkpoint(folder) as source, open_checkpoint(out) as packed:
        assert source.activation_scales() == {n: float(scale) for n, scale in stored.items()}
        # The input of a head of its own is not rounded in training: a scale of 0, which is left out.
        left_out = ("lm_head.", "_cache_scale") if family == "gemma4" else ("lm_head.",)
        seen = {n: s for n, s in source.activation_scales().items() if not any(part in n for part in left_out)}
        assert packed.activation_scales() == seen and all(scale > 0 for scale in seen.values())


def test_the_folder_goes_on_to_another(tiny_llama: Make, tmp_path: Path) -> None:
    folder, _ = calibrated(tiny_llama(), tmp_path / "trained", "mobile_w4")
    for source, out in ((folder, "first"), (tmp_path / "first", "second")):
        lowbit.pack(source, "mobile_w4", tmp_path / out, to="compressed-tensors")
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert first.keys() == second.keys()
    # But for the embedding, which such a folder holds as values: they are rounded once more.
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["model.embed_tokens.weight"]
    configs = [json.loads((tmp_path / out / "config.json").read_text("utf-8")) for out in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_what_was_never_seen_stays_a_float(
    tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = calibrated(tiny_llama(), tmp_path / "trained", "mobile_w4")
    scales = load_file(folder / "activations.safetensors")
    down = "model.layers.1.mlp.down_proj"
    note(folder, scales | {f"{down}.input_activation_scale": torch.zeros(())})
    lowbit.pack(folder, "mobile_w4", tmp_path / "ct", to="compressed-tensors")
    of_head = 2  # never rounded in training
    assert f"{1 + of_head} of {len(scales)} activations stay floats" in capsys.readouterr().err
    config = json.loads((tmp_path / "ct" / "config.json").read_text("utf-8"))["quantization_config"]
    of = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    assert of[down]["input_activations"] is None and of[down]["output_activations"]["num_bits"] == 8
    assert f"{down}.input_scale" not in load_file(tmp_path / "ct" / "model.safetensors")
    assert torch.isfinite(logits(in_transformers(tmp_path / "ct"))).all()

    note(folder, scales | {V_CACHE: torch.zeros(())})
    lowbit.pack(folder, "mobile_w4", tmp_path / "no-cache", to="compressed-tensors")
    caches = sum(name.endswith("_cache_scale") for name in scales)
    assert f"{caches + of_head} of {len(scales)} activations stay floats" in capsys.readouterr().err
    config = json.loads((tmp_path / "no-cache" / "config.json").read_text("utf-8"))["quantization_config"]
    assert config["kv_cache_scheme"] is None
    assert torch.isfinite(logits(in_transformers(tmp_path / "no-cache"))).all()


def test_another_container_says_that_it_leaves_them_out(
    tiny_llama: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = calibrated(tiny_llama(), tmp_path / "trained", "mobile_w4")
    lowbit.pack(folder, "f32", tmp_path / "x.gguf")
    assert "scales of static activations are left out" in capsys.readouterr().err


def test_scales_that_lie(tiny_llama: Make, tmp_path: Path) -> None:
    folder, _ = calibrated(tiny_llama(), tmp_path / "trained", "mobile_w4")
    scales, out = load_file(folder / "activations.safetensors"), tmp_path / "ct"
    for value, told in ((torch.tensor(-1.0), "found -1.0"), (torch.ones(2), r"F32 \[2\]"), (torch.tensor(1), "I64")):
        note(folder, scales | {V_CACHE: value})
        with pytest.raises(BadFile, match=rf"{V_CACHE}: not a scale.*{told}"):
            lowbit.pack(folder, "mobile_w4", out, to="compressed-tensors")
        assert not out.exists()
    note(folder, scales)
    lowbit.pack(folder, "mobile_w4", out, to="compressed-tensors")
    good, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text("utf-8"))
    stored = V_CACHE.replace("v_cache_scale", "v_scale")
    save_file(good | {stored: torch.tensor([float("nan")])}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadFile, match="not a scale"):
        open_checkpoint(out)
    save_file({n: t for n, t in good.items() if not n.endswith(("put_scale", ".k_scale", ".v_scale"))},
              out / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(BadFile, match="no scale of the activations"):
        open_checkpoint(out)
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Unsupported, match=r"kv_cache_scheme\.num_bits = 4; expected 8"):
        open_checkpoint(out)
