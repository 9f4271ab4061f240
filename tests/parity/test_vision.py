"""The packed mmproj computes in llama.cpp what transformers' towers compute for the same pixels and sounds.

llama.cpp rounds in some places whatever the file's types: the inputs and kernels of convolutions, and the inputs and
outputs of GELU, are float16 (ggml_conv_2d's im2col and ggml's table of GELU). So each tower is compared with
transformers as it is, where these roundings are the whole difference (up to 3e-2 of values around 1), and with
transformers rounding in the same places, where what is left is the order of float32 sums and a GELU input now and then
that falls on the other side of a float16 (up to 8e-4). A wrong name, order or key differs by 0.1 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from lowbit.run.vision.llama_cpp import LlamaCppVision

Make = Callable[..., tuple[Path, Any]]
AS_IT_IS, ROUNDED_ALIKE, EXACT = 5e-2, 2e-3, 2e-5
GEMMA3: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as released": ({"patch_size": 2}, {}),  # 16 patches a side, 4 of which are pooled
    "another pooling": ({}, {}),
    "no pooling": ({}, {"mm_tokens_per_image": 64}),
    "one layer, two heads, another epsilon": (
        {"num_hidden_layers": 1, "num_attention_heads": 2, "layer_norm_eps": 1e-2}, {},
    ),
}  # fmt: skip
GEMMA4: dict[str, dict[str, Any]] = {
    "clipped and standardized": {},
    "plain": {"use_clipped_linears": False, "standardize": False},
    "another pooling": {"pooling_kernel_size": 2},
    "another epsilon": {"rms_norm_eps": 1e-2},
}
SIDES = {3: (84, 120), 2: (56, 80)}  # 70 tokens, the least that llama.cpp makes of an image, so that it resizes nothing


@pytest.fixture(scope="session")
def text_model(tiny_towers: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model as wide as all the towers' projections; which one does not matter to an embedding."""
    return lowbit.pack(tiny_towers("gemma3")[0], "f32", tmp_path_factory.mktemp("text") / "text.gguf").path


@contextmanager
def opened(text_model: Path, folder: Path, recipe: str, out: Path) -> Iterator[LlamaCppVision]:
    lowbit.pack(folder, recipe, out, mmproj=True)
    with LlamaCppVision(text_model, out, context=256, threads=1, kv_type="f32", flash_attention=False) as model:
        yield model


@contextmanager
def rounding(convolutions: list[Any], activations: list[tuple[Any, str]]) -> Iterator[None]:
    """transformers rounding where llama.cpp does; activations: (module, name of its GELU)."""
    import torch

    class Gelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    def rounded(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: forward(x.half().float())

    with pytest.MonkeyPatch.context() as patch:
        for module in convolutions:
            patch.setattr(module, "forward", rounded(module.forward))
            patch.setattr(module.weight, "data", module.weight.data.half().float())
        before = [getattr(owner, name) for owner, name in activations]  # monkeypatch does not put modules back
        for owner, name in activations:
            setattr(owner, name, Gelu())
        yield
        for (owner, name), module in zip(activations, before, strict=True):
            setattr(owner, name, module)


def differences(ours: np.ndarray, theirs: np.ndarray, record: Any, name: str) -> float:
    assert ours.shape == theirs.shape
    assert 0.5 < theirs.std() < 5  # the tolerances are of values around 1
    assert np.ptp(theirs, axis=0).min() > 0.1  # positions differ
    largest = float(np.abs(ours - theirs).max())
    record(f"largest difference {name}", largest)
    return largest


def features(model: Any, *inputs: Any, kind: str = "image") -> np.ndarray:
    import torch

    inner = getattr(model, "model", model)
    with torch.no_grad():
        found = getattr(inner, f"get_{kind}_features")(*inputs).pooler_output
    values = found[0] if isinstance(found, tuple | list) else found
    return values.reshape(-1, values.shape[-1]).numpy()


@pytest.mark.parametrize("variant", GEMMA3)
def test_gemma3(tiny_towers: Make, text_model: Path, tmp_path: Path, record_property: Any, variant: str) -> None:
    import towers

    folder, whole = tiny_towers("gemma3", GEMMA3[variant][0], **GEMMA3[variant][1])
    image = towers.picture(32, 32)
    with opened(text_model, folder, "f32", tmp_path / "mmproj.gguf") as model:
        ours = model.embed(image)
        assert (ours == model.embed(image)).all()
        assert (model.sees, model.hears) == (True, False)
    pixels, tower = towers.normalized(image), whole.model.vision_tower
    assert differences(ours, features(whole, pixels), record_property, "as it is") < AS_IT_IS
    patch, gelu = tower.embeddings.patch_embedding, [(layer.mlp, "activation_fn") for layer in tower.encoder.layers]
    with rounding([patch], gelu):
        assert differences(ours, features(whole, pixels), record_property, "rounded alike") < ROUNDED_ALIKE


@pytest.mark.parametrize("variant", GEMMA4)
def test_gemma4(tiny_towers: Make, text_model: Path, tmp_path: Path, record_property: Any, variant: str) -> None:
    import towers

    folder, whole = tiny_towers("gemma4", GEMMA4[variant])
    tower = whole.model.vision_tower
    image = towers.picture(*SIDES[tower.config.pooling_kernel_size])
    with opened(text_model, folder, "f32", tmp_path / "mmproj.gguf") as model:
        ours = model.embed(image)
    assert ours.shape == (70, 64)
    pixels, patch = towers.patches(image, 4), tower.patch_embedder.input_proj
    assert differences(ours, features(whole, *pixels), record_property, "as it is") < AS_IT_IS
    with rounding([patch], [(layer.mlp, "act_fn") for layer in tower.encoder.layers]):
        assert differences(ours, features(whole, *pixels), record_property, "rounded alike") < ROUNDED_ALIKE


def test_gemma4_by_the_keys_of_llama_cpps_own_conversion(
    tiny_towers: Make, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Without clip.use_gelu the tower computes quick GELU: further off than all rounding. Shown with what it costs."""
    import towers
    from lowbit.checkpoint.projectors import gemma4

    keys = gemma4.Gemma4.metadata
    monkeypatch.setattr(
        gemma4.Gemma4, "metadata", lambda *given: [key for key in keys(*given) if key.key != "clip.use_gelu"]
    )
    folder, whole = tiny_towers("gemma4")
    image = towers.picture(*SIDES[3])
    with opened(text_model, folder, "f32", tmp_path / "mmproj.gguf") as model:
        ours = model.embed(image)
    theirs = features(whole, *towers.patches(image, 4))
    assert differences(ours, theirs, record_property, "without clip.use_gelu") > AS_IT_IS


def test_gemma4_hears(tiny_towers: Make, text_model: Path, tmp_path: Path, record_property: Any) -> None:
    """llama.cpp takes the larger of a spectrogram's value and its floor where transformers takes their sum."""
    import torch
    from transformers import Gemma4AudioFeatureExtractor

    folder, whole = tiny_towers("gemma4")
    sound = (np.random.default_rng(1).standard_normal(16_000) * 0.1).astype(np.float32)
    with opened(text_model, folder, "f32", tmp_path / "mmproj.gguf") as model:
        ours = model.embed(sound)
        assert (model.sees, model.hears, model.sample_rate) == (True, True, 16_000)
    log_mel, mask = Gemma4AudioFeatureExtractor()._extract_spectrogram(sound, np.ones(len(sound), np.int64))
    floor = 1e-3
    log_mel_as_theirs = np.log(np.maximum(np.exp(log_mel.astype(np.float64)) - floor, floor))

    def theirs(values: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(values.astype(np.float32))[None], torch.from_numpy(mask)[None]
        return features(whole, *inputs, kind="audio")

    assert differences(ours, theirs(log_mel), record_property, "as it is") < AS_IT_IS
    front = whole.model.audio_tower.subsample_conv_projection
    with rounding([front.layer0.conv, front.layer1.conv], []):
        assert differences(ours, theirs(log_mel_as_theirs), record_property, "rounded alike") < ROUNDED_ALIKE


def test_gemma4_unified(tiny_towers: Make, text_model: Path, tmp_path: Path, record_property: Any) -> None:
    """Neither a convolution nor a GELU: nothing but the order of float32 sums."""
    import torch

    import towers

    folder, whole = tiny_towers("gemma4_unified")
    image = towers.picture(84, 120)
    sound = (np.random.default_rng(1).standard_normal(640 * 20) * 0.1).astype(np.float32)
    with opened(text_model, folder, "f32", tmp_path / "mmproj.gguf") as model:
        seen, heard = model.embed(image), model.embed(sound)
    assert differences(seen, features(whole, *towers.patches(image, 12)), record_property, "of an image") < EXACT
    frames = torch.from_numpy(sound.reshape(1, 20, 640))
    theirs = features(whole, frames, torch.ones(1, 20, dtype=torch.bool), kind="audio")
    assert differences(heard, theirs, record_property, "of a sound") < EXACT


@pytest.mark.parametrize(("recipe", "most"), [("f16", 1e-2), ("bf16", 1e-1), ("q8_0", 3e-1)])
def test_other_types_are_near(tiny_towers: Make, text_model: Path, tmp_path: Path, recipe: str, most: float) -> None:
    """llama.cpp has kernels for what the recipes choose, and the result is nearer the finer the type."""
    import towers

    folder, whole = tiny_towers("gemma3")
    image = towers.picture(32, 32)
    with opened(text_model, folder, recipe, tmp_path / "mmproj.gguf") as model:
        ours = model.embed(image)
    assert 1e-5 < np.abs(ours - features(whole, towers.normalized(image))).max() < most


def multimodal_logits(
    text_model: Path, folder: Path, out: Path, prompt: str, images: list[np.ndarray]
) -> tuple[list[int], list[int], np.ndarray]:
    """llama.cpp's logits of a prompt's text: token ids with those of images, positions of the text, its logits."""
    import towers

    ids: list[int] = []
    positions: list[int] = []
    found = []
    with opened(text_model, folder, "f32", out) as model:
        for first, tokens, logits in model.logits_with(prompt, images):
            ids += [towers.IMAGE_TOKEN] * (first - len(ids)) + tokens
            positions += range(first, first + len(tokens))
            found.append(logits)
    return ids, positions, np.concatenate(found)


def test_text_after_an_image(tiny_towers: Make, text_model: Path, tmp_path: Path, record_property: Any) -> None:
    """The whole of Gemma 3: text model and mmproj in llama.cpp, one model in transformers, logits of all text."""
    import torch

    import towers

    folder, whole = tiny_towers("gemma3")
    images = [towers.picture(32, 32, seed) for seed in (0, 1)]
    prompt = "the thing in <__media__> is nearer the thing in <__media__> and in the text"
    ids, positions, ours = multimodal_logits(text_model, folder, tmp_path / "mmproj.gguf", prompt, images)
    assert ids.count(towers.IMAGE_TOKEN) == 32
    tokens = torch.tensor([ids])

    def theirs(images: list[np.ndarray]) -> np.ndarray:
        pixels = torch.cat([towers.normalized(image) for image in images])
        kinds = (tokens == towers.IMAGE_TOKEN).long()
        with torch.no_grad():
            logits = whole(input_ids=tokens, pixel_values=pixels, token_type_ids=kinds).logits[0]
        return logits.numpy()[positions]

    tower, text = whole.model.vision_tower, whole.model.language_model
    patch, gelu = tower.embeddings.patch_embedding, [(layer.mlp, "activation_fn") for layer in tower.encoder.layers]
    gelu += [(layer.mlp, "act_fn") for layer in text.layers]
    assert differences(ours, theirs(images), record_property, "of logits as they are") < AS_IT_IS
    with rounding([patch], gelu):
        expected = theirs(images)
        assert differences(ours, expected, record_property, "of logits rounded alike") < ROUNDED_ALIKE
    assert (ours.argmax(-1) == expected.argmax(-1)).all()
    # The images matter: in the other order they are another text.
    assert np.abs(theirs(images[::-1]) - theirs(images)).max() > 0.5


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
def test_text_after_an_image_of_gemma4(tiny_towers: Make, tmp_path: Path, record_property: Any, family: str) -> None:
    """The same of Gemma 4, with per-layer embeddings and of 12B; of the latter with an image within the window."""
    import torch

    import towers

    folder, whole = tiny_towers(
        family, text_config=towers.TEXT_4 | {"sliding_window": 128} | towers.PER_LAYER_OF[family]
    )
    lowbit.pack(folder, "f32", tmp_path / "text.gguf")
    image = towers.picture(84, 120)
    prompt = "the thing in <__media__> is the thing in the text"
    ids, positions, ours = multimodal_logits(tmp_path / "text.gguf", folder, tmp_path / "mmproj.gguf", prompt, [image])
    assert ids.count(towers.IMAGE_TOKEN) == 70
    tokens = torch.tensor([ids])

    def theirs(image: np.ndarray) -> np.ndarray:
        pixels, places = towers.patches(image, 12 if family == "gemma4_unified" else 4)
        kinds = (tokens == towers.IMAGE_TOKEN).long()
        with torch.no_grad():
            found = whole(input_ids=tokens, pixel_values=pixels, image_position_ids=places, mm_token_type_ids=kinds)
        return found.logits[0].numpy()[positions]

    expected = theirs(image)
    assert differences(ours, expected, record_property, "of logits as they are") < AS_IT_IS
    assert np.abs(theirs(image[::-1].copy()) - expected).max() > 0.5
