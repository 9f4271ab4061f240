"""Releases of more than one model, a projector or a drafter beside it: good ones, and bad ones caught and named."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import change_json, failures, save_base, set_key

import lowbit
from lowbit.check import check

MMPROJ = "mmproj-f16.gguf"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny_towers: Callable[..., tuple[Path, Any]]) -> Path:
    """A tiny Gemma 3 with a vision tower: base/, its text model and its mmproj. Not to be changed."""
    root = tmp_path_factory.mktemp("seeing") / "good"
    folder, _ = tiny_towers("gemma3")
    shutil.copytree(folder, root / "base")
    lowbit.pack(root / "base", "f16", root / "model-f16.gguf")
    lowbit.pack(root / "base", "f16", root / MMPROJ, mmproj=True)
    return root


def truncated(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    with open(root / MMPROJ, "r+b") as handle:
        handle.truncate((root / MMPROJ).stat().st_size * 2 // 3)


def cut_in_the_header(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    with open(root / MMPROJ, "r+b") as handle:
        handle.truncate(300)


def of_a_wider_model(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    set_key(root / MMPROJ, "clip.vision.projection_dim", 128)


def of_another_model(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    """The same shapes, other values."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    other = root / "other"
    shutil.copytree(root / "base", other)
    tensors, rng = load_file(other / "model.safetensors"), np.random.default_rng(7)
    tensors = {n: rng.permutation(t.reshape(-1)).reshape(t.shape) for n, t in tensors.items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    lowbit.pack(other, "f16", root / "again.gguf", mmproj=True)
    shutil.rmtree(other)
    (root / "again.gguf").replace(root / MMPROJ)


def of_another_family(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = towers("gemma4")
    lowbit.pack(folder, "f16", root / MMPROJ, mmproj=True)


def a_layer_is_missing(root: Path, towers: Callable[..., tuple[Path, Any]]) -> None:
    set_key(root / MMPROJ, "clip.vision.block_count", 4)


PROJECTORS: dict[Callable[..., None], str] = {
    truncated: "truncated",
    cut_in_the_header: "more than the file can hold",
    of_a_wider_model: "comes out 128 wide, and base is 64 wide",
    of_another_model: "is not base's",
    of_another_family: "another family",
    a_layer_is_missing: "3 of 4 layers",
}


@pytest.mark.parametrize("spoil", PROJECTORS, ids=lambda spoil: spoil.__name__)
def test_a_bad_projector_is_caught_and_named(
    seeing: Path, tmp_path: Path, tiny_towers: Callable[..., tuple[Path, Any]], spoil: Callable[..., None]
) -> None:
    root = Path(shutil.copytree(seeing, tmp_path / "release"))
    spoil(root, tiny_towers)
    found = failures(root, quick=True)
    assert list(found) == ["projector"], found
    assert PROJECTORS[spoil] in found["projector"]


def test_a_good_projector_passes_and_loads(seeing: Path) -> None:
    (found,) = check(seeing, only=["projector"])["checks"]
    assert found["status"] == "pass", found
    assert "its tensors are those of base" in found["detail"]
    assert "loads in llama.cpp beside model-f16.gguf; a picture of 96 x 96 became" in found["detail"]
    assert found["runtimes"]["llama.cpp"].startswith("xllamacpp")


SEES = """{% for m in messages %}<start>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}\
<start_of_image>{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<end>
{% endfor %}{% if add_generation_prompt %}<start>model
{% endif %}"""


def test_a_template_with_images_in_llama_cpp(seeing: Path, tmp_path: Path) -> None:
    """Beside its projector the server takes a picture in a message."""
    root = Path(shutil.copytree(seeing, tmp_path / "release"))
    change_json(root / "base" / "tokenizer_config.json", chat_template=SEES)
    set_key(root / "model-f16.gguf", "tokenizer.chat_template", SEES)
    (found,) = check(root, only=["chat-template"])["checks"]
    assert found["status"] == "pass", found
    assert "(images, plain, system, thinking)" in found["detail"]


# Drafters


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a smaller one of the same tokenizer for a drafter. Not to be changed."""
    root = tmp_path_factory.mktemp("drafted") / "good"
    root.mkdir()
    save_base(root / "base")
    save_base(root / "small", num_hidden_layers=1)
    lowbit.pack(root / "base", "f16", root / "model-f16.gguf")
    lowbit.pack(root / "small", "f16", root / "drafter-f16.gguf")
    shutil.rmtree(root / "small")
    return root


def test_a_good_drafter_passes_and_is_measured(drafted: Path) -> None:
    (found,) = check(drafted, only=["drafter"])["checks"]
    assert found["status"] == "pass", found
    assert "drafted tokens accepted" in found["detail"]
    assert "x the speed" in found["detail"]


def test_a_drafter_of_another_vocabulary(drafted: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drafted, tmp_path / "release"))
    from lowbit.checkpoint.gguf_file import GgufFile

    path = root / "drafter-f16.gguf"
    tokens = list(GgufFile(path).values["tokenizer.ggml.tokens"])
    tokens[70], tokens[80] = tokens[80], tokens[70]
    set_key(path, "tokenizer.ggml.tokens", tokens)
    found = failures(root, quick=True)
    assert list(found) == ["drafter"], found
    assert "another vocabulary than model-f16.gguf: 2 tokens differ" in found["drafter"]


def gemma4_release(root: Path, target: Path, drafter: Path) -> Path:
    root.mkdir()
    shutil.copytree(target, root / "base")
    lowbit.pack(target, "f16", root / "model-f16.gguf")
    lowbit.pack(drafter, "f16", root / "drafter-f16.gguf")
    return root


def test_gemma4s_own_drafter_passes(
    tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path], tmp_path: Path
) -> None:
    root = gemma4_release(tmp_path / "r", tiny_gemma4("E2B"), tiny_gemma4_assistant(num_key_value_heads=1))
    (found,) = check(root, only=["drafter"])["checks"]
    assert found["status"] == "pass", found
    assert "drafted tokens accepted" in found["detail"]


@pytest.mark.parametrize("quick", [True, False])
def test_a_drafter_of_other_key_value_heads(
    tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path], tmp_path: Path, quick: bool
) -> None:
    """llama.cpp aborts on this pair; lowbit does not."""
    root = gemma4_release(tmp_path / "r", tiny_gemma4("E2B"), tiny_gemma4_assistant())
    found = failures(root, only=["drafter"], quick=quick)
    assert list(found) == ["drafter"]
    assert "reads other key-value heads" in found["drafter"]


def test_a_pair_that_llama_cpp_dies_of_is_named(
    tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path], tmp_path: Path
) -> None:
    """Where no key tells it beforehand, the child's death does: this process goes on."""
    from lowbit.errors import LowbitError
    from lowbit.release import child

    root = gemma4_release(tmp_path / "r", tiny_gemma4("E2B"), tiny_gemma4_assistant())
    with pytest.raises(LowbitError):
        child.call(
            "draft", model=str(root / "model-f16.gguf"), drafter=str(root / "drafter-f16.gguf"), prompts=["a"], n=4
        )


def test_a_drafter_for_another_width(
    tiny_gemma4: Callable[..., Path], tiny_gemma4_assistant: Callable[..., Path], tmp_path: Path
) -> None:
    drafter = tiny_gemma4_assistant(num_key_value_heads=1, backbone=96)
    root = gemma4_release(tmp_path / "r", tiny_gemma4("E2B"), drafter)
    found = failures(root, only=["drafter"], quick=True)
    assert "is for a model 96 wide, and model-f16.gguf is 64 wide" in found["drafter"]
