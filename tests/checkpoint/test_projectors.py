"""Towers and projectors: configs as released models carry them, tensors under every name, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowbit.checkpoint import projectors
from lowbit.checkpoint.projector import open_projector
from lowbit.checkpoint.projectors import preprocessor
from lowbit.checkpoint.projectors.base import ProjectorSpec
from lowbit.errors import BadConfig, BadFile, LowbitError, NotFound, Unsupported

Make = Callable[..., tuple[Path, Any]]
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "text_config": {"hidden_size": 2560}, "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
GEMMA_3_PIXELS = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5], "processor_class": "Gemma3Processor", "resample": 2,
    "rescale_factor": 0.00392156862745098, "size": {"height": 896, "width": 896},
}  # fmt: skip


def test_every_projector_is_found() -> None:
    assert projectors.names() == ("gemma3", "gemma4", "gemma4_unified")


def test_a_released_gemma_3() -> None:
    config = GEMMA_3_4B | {preprocessor.KEY: GEMMA_3_PIXELS}
    projector = projectors.by_config(config, "config.json")
    own = projector.text_config(config, "config.json")
    specs = projector.tensors(own)
    assert len(specs) == 3 + 27 * 16 + 4
    assert len({spec.gguf_name for spec in specs}) == len(specs)
    values = {field.key: field.value for field in projector.metadata(own)}
    assert values == {
        "clip.has_vision_encoder": True, "clip.projector_type": "gemma3", "clip.use_gelu": True,
        "clip.vision.projection_dim": 2560, "clip.vision.image_size": 896, "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 1152, "clip.vision.feed_forward_length": 4304,
        "clip.vision.block_count": 27, "clip.vision.attention.head_count": 16,
        "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip


def test_gemma_4_describes_each_of_its_towers() -> None:
    vision = {"model_type": "gemma4_vision", "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"}}
    text = {"model_type": "gemma4", "text_config": {"hidden_size": 1536}}
    deaf = text | {"vision_config": vision, "audio_config": None}
    blind = text | {"vision_config": None, "audio_config": {"model_type": "gemma4_audio"}}
    projector = projectors.by_config(deaf, "config.json")
    for config, prefix, kind in ((deaf, "v.", "vision"), (blind, "a.", "audio")):
        own = projector.text_config(config, "config.json")
        assert all(spec.gguf_name.startswith((prefix, "mm.")) for spec in projector.tensors(own))
        values = {field.key: field.value for field in projector.metadata(own)}
        assert [key for key in values if key.startswith("clip.has_")] == [f"clip.has_{kind}_encoder"]
    assert values["clip.audio.projector_type"] == "gemma4a"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"vision_config": {"num_channels": 4}}, "num_channels"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type"),
        ({"vision_config": {"window": 3}}, "unknown key window"),
        ({"vision_config": {"hidden_size": -1}}, "bad value for hidden_size"),
        ({"vision_config": {"hidden_size": 1150}}, "multiple"),
        ({"vision_config": {"num_hidden_layers": 1 << 20}}, "bad value for num_hidden_layers"),
        ({"vision_config": {"image_size": 900}}, "multiple of patch_size"),
        ({"vision_config": {"auto_map": {"AutoModel": "code.py"}}}, "remote code"),
        ({"mm_tokens_per_image": 250}, "not a square"),
        ({"mm_tokens_per_image": 49}, "not a square that divides"),
        ({"text_config": {"hidden_size": "wide"}}, "text_config.hidden_size"),
        ({preprocessor.KEY: {"image_mean": [0.5, 0.5]}}, "image_mean"),
        ({preprocessor.KEY: {"image_std": [0.5, 0.5, 0]}}, "image_std"),
        ({preprocessor.KEY: {"image_std": [0.5, 0.5, float("nan")]}}, "image_std"),
        ({preprocessor.KEY: {"size": {"height": 448, "width": 448}}}, "size"),
        ({preprocessor.KEY: {"resample": 3}}, "resample"),
        ({preprocessor.KEY: {"do_pan_and_scan": True}}, "do_pan_and_scan"),
        ({preprocessor.KEY: {"rescale_factor": 1.0}}, "rescale_factor"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], says: str) -> None:
    whole = {preprocessor.KEY: GEMMA_3_PIXELS} | GEMMA_3_4B
    config = {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in whole.items()}
    config |= {key: value for key, value in changes.items() if not isinstance(value, dict)}
    with pytest.raises((BadConfig, Unsupported), match=says):
        projectors.by_config(config, "config.json").text_config(config, "config.json")


@pytest.mark.parametrize(
    ("family", "part", "changes", "says"),
    [
        ("gemma4", "vision_config", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma4", "vision_config", {"num_key_value_heads": 6}, "heads"),
        ("gemma4", "vision_config", {"head_dim": 32}, "heads"),
        ("gemma4", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope_parameters"),
        ("gemma4", "audio_config", {"attention_chunk_size": 16}, "attention_chunk_size"),
        ("gemma4", "audio_config", {"conv_kernel_size": 3}, "conv_kernel_size"),
        ("gemma4", "audio_config", {"subsampling_conv_channels": [64, 32]}, "mel bins"),
        ("gemma4", "audio_config", {"subsampling_conv_channels": [128]}, "subsampling_conv_channels"),
        ("gemma4", "audio_config", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("gemma4", preprocessor.SOUND_KEY, {"mel_floor": 1e-5}, "mel_floor"),
        ("gemma4", "text_config", {"hidden_size": 64}, "another attention"),
        ("gemma4", "text_config", {"hidden_size": 1536, "use_bidirectional_attention": "vision"}, "another attention"),
        ("gemma4", "text_config", {"use_bidirectional_attention": "all"}, "another attention"),
        ("gemma4_unified", "text_config", {"use_bidirectional_attention": None}, "another attention"),
        ("gemma4_unified", "vision_config", {"output_proj_dims": 64}, "output_proj_dims"),
        ("gemma4_unified", "audio_config", {"audio_embed_dim": 320}, "audio_embed_dim"),
        ("gemma4_unified", "audio_config", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_of_gemma_4_too(family: str, part: str, changes: dict[str, Any], says: str) -> None:
    config = {"model_type": family, "text_config": {"hidden_size": 1536}, "vision_config": {}, "audio_config": {}}
    if family == "gemma4_unified":
        config["text_config"] = {"hidden_size": 3840}
    config[part] = changes
    with pytest.raises((BadConfig, Unsupported), match=says):
        projectors.by_config(config, "config.json").text_config(config, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3", "text_config": {}},
        {"model_type": "gemma4", "text_config": {}, "vision_config": None},
        {},
    ],
)
def test_a_model_without_towers(config: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="no vision or audio tower"):
        projectors.by_config(config, "config.json")


@pytest.fixture
def copied(tiny_towers: Make, tmp_path: Path) -> Path:
    """A Gemma 3 whose folder may be changed."""
    folder, _ = tiny_towers("gemma3")
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def restored(folder: Path, rename: Callable[[str], str | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {new: values for name, values in tensors.items() if (new := rename(name)) is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        lambda name: name if name.startswith("language_model") else "model." + name,
    ],
    ids=["transformers 5", "transformers 4", "model in front"],
)
def test_the_same_tensors_under_every_name(copied: Path, rename: Callable[[str], str]) -> None:
    with open_projector(copied) as first:
        expected = {name: first.read(name) for name in first.names}
    restored(copied, rename)
    with open_projector(copied) as found:
        assert set(found.names) == set(expected)
        assert all(np.array_equal(found.read(name), expected[name]) for name in expected)


def packed(folder: Path, *names: str) -> None:
    """As a w4a16 checkpoint: the named tensors in parts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": scheme | {"config_groups": {"group_0": {"weights": weights}}}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        values = tensors.pop(name)
        tensors[f"{name}_packed"] = np.zeros((len(values), values[0].size // 8), np.int32)
        tensors[f"{name}_scale"] = np.ones((len(values), values[0].size // 32), np.float32)
        tensors[f"{name}_shape"] = np.array(values.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_of_a_packed_text_model(copied: Path) -> None:
    with open_projector(copied) as plain:
        expected = plain.read("multi_modal_projector.mm_soft_emb_norm.weight")
    packed(copied, "language_model.model.layers.0.mlp.up_proj.weight")
    with open_projector(copied) as found:
        assert np.array_equal(found.read("multi_modal_projector.mm_soft_emb_norm.weight"), expected)


def test_a_packed_convolution(copied: Path) -> None:
    packed(copied, "vision_tower.embeddings.patch_embedding.weight")
    with pytest.raises(Unsupported, match="only matrices"):
        open_projector(copied)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_unified"])
def test_slices_of_rows_are_the_whole(tiny_towers: Make, family: str) -> None:
    """Whatever rows are asked for, in GGUF's order; the whole by what the description says of all axes at once."""
    rng = np.random.default_rng(0)
    with open_projector(tiny_towers(family)[0]) as source:
        for spec in source.specs.values():
            assert isinstance(spec, ProjectorSpec)
            values = source.read(spec.name) + np.float32(spec.gguf_offset)
            whole = values.reshape(spec.view).transpose(spec.axes) if spec.view else values
            whole = whole.reshape(spec.gguf_n_rows, -1)
            whole = spec.compute(whole) if spec.compute else whole

            def read(first: int, last: int, name: str = spec.name) -> np.ndarray:
                return source.read_rows(name, first, last)

            for _ in range(5):
                start = int(rng.integers(spec.gguf_n_rows))
                stop = int(rng.integers(start, spec.gguf_n_rows)) + 1
                assert np.array_equal(spec.gguf_values(read, start, stop), whole[start:stop]), spec.name


def test_siglips_own_head_is_left_out(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["vision_tower.vision_model.head.probe"] = np.zeros((1, 1, 64), np.float32)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with open_projector(copied) as found:
        assert not any("head" in name for name in found.names)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda name: None if "post_layernorm.bias" in name else name, BadFile, "missing"),
        (lambda name: None if "mm_soft_emb_norm" in name else name, BadFile, "missing"),
        (lambda name: name.replace("layers.2.layer_norm1.bias", "layers.3.layer_norm1.bias"), BadFile, "layers"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    copied: Path, damage: Callable[[str], str | None], error: type[LowbitError], says: str
) -> None:
    restored(copied, damage)
    with pytest.raises(error, match=says):
        open_projector(copied)


def test_a_shape_that_does_not_fit_the_config(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 96
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="shape"):
        open_projector(copied)


def test_a_broken_preprocessor_config(copied: Path) -> None:
    (copied / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadConfig, match="not valid JSON"):
        open_projector(copied)


def test_the_preprocessor_is_read(copied: Path) -> None:
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}
    (copied / "processor_config.json").write_text(json.dumps(nested))
    with open_projector(copied) as found:
        values = {field.key: field.value for field in found.family.metadata(found.config)}
    assert values["clip.vision.image_mean"] == [0.1, 0.2, 0.3]
    assert values["clip.vision.image_std"] == [0.4, 0.5, 0.6]


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Unsupported, match="not a checkpoint folder"):
        open_projector(tmp_path / "model.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound):
        open_projector(tmp_path / "empty")
