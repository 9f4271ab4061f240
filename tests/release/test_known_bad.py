"""Known-bad releases: each is caught, and named by exactly the check that is about it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import change_json, failures, save_base, set_key

import lowbit
from lowbit.check import check

GGUF = "model-q4_0.gguf"


def test_a_good_release_passes(good_release: Path) -> None:
    result = check(good_release)
    assert result["passed"], result
    status = {c["name"]: c["status"] for c in result["checks"]}
    not_here = {"hashes", "projector", "drafter"}
    assert {name for name, said in status.items() if said == "n/a"} == not_here, result


def swap_two_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    one, other = "A", "B"
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


def swapped_tokenizer(root: Path) -> None:
    swap_two_tokens(root / "base")


def swapped_tokenizer_of_mlx(root: Path) -> None:
    swap_two_tokens(root / "mlx")


def wrong_rope_theta(root: Path) -> None:
    set_key(root / GGUF, "llama.rope.freq_base", 500_000.0)
    (root / f"{GGUF}.certificate.json").unlink(missing_ok=True)


def shorter_context(root: Path) -> None:
    change_json(root / "mlx" / "config.json", max_position_embeddings=256)
    (root / "mlx" / "certificate.json").unlink()


def wrong_eos(root: Path) -> None:
    set_key(root / GGUF, "tokenizer.ggml.eos_token_id", 60)
    (root / f"{GGUF}.certificate.json").unlink(missing_ok=True)


def missing_add_bos(root: Path) -> None:
    set_key(root / GGUF, "tokenizer.ggml.add_bos_token", None)
    (root / f"{GGUF}.certificate.json").unlink(missing_ok=True)


def one_more_end(root: Path) -> None:
    """generation_config.json ends answers at a token that llama.cpp goes on after."""
    change_json(root / "base" / "generation_config.json", eos_token_id=[2, 65])
    (root / "mlx" / "generation_config.json").unlink(missing_ok=True)


def wider_model(root: Path) -> None:
    save_base(root / "wide", intermediate_size=128)
    (root / GGUF).unlink()
    lowbit.pack(root / "wide", "q4_0", root / GGUF)
    (root / f"{GGUF}.certificate.json").unlink(missing_ok=True)
    shutil.rmtree(root / "wide")


def model_of_another_seed(root: Path) -> None:
    save_base(root / "other", seed=5)
    (root / GGUF).unlink()
    lowbit.pack(root / "other", "q4_0", root / GGUF)
    (root / f"{GGUF}.certificate.json").unlink(missing_ok=True)
    shutil.rmtree(root / "other")


def one_wrong_matrix(root: Path) -> None:
    path = root / "mlx" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.scales"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    codes = "model.layers.1.mlp.down_proj.weight"
    tensors[codes] = np.ascontiguousarray(tensors[codes][::-1])
    save_file(tensors, path, metadata={"format": "mlx"})
    (root / "mlx" / "certificate.json").unlink()


def requantized_with_the_old_certificate(root: Path) -> None:
    (root / GGUF).unlink()
    lowbit.pack(root / "base", "q4_1", root / "other.gguf")
    (root / "other.gguf").rename(root / GGUF.replace("q4_0", "q4_1"))
    (root / f"{GGUF}.certificate.json").rename(root / f"{GGUF.replace('q4_0', 'q4_1')}.certificate.json")


def certificate_of_another_checkpoint(root: Path) -> None:
    change_json(root / f"{GGUF}.certificate.json", source_sha256="0" * 64, source="another")


def wrong_name(root: Path) -> None:
    (root / GGUF).rename(root / "model-q8_0.gguf")
    (root / f"{GGUF}.certificate.json").rename(root / "model-q8_0.gguf.certificate.json")


def truncated_artifact(root: Path) -> None:
    with open(root / GGUF, "r+b") as handle:
        handle.truncate((root / GGUF).stat().st_size - 5000)


CASES: dict[Callable[[Path], None], tuple[str, str]] = {
    swapped_tokenizer: ("vocabulary", "token 68 is 'A', should be 'B'"),
    swapped_tokenizer_of_mlx: ("vocabulary", "mlx: token 68 is 'B', should be 'A'"),
    wrong_rope_theta: ("context", "rope.freq_base 10000 and 500000"),
    shorter_context: ("context", "context_length 512 and 256"),
    wrong_eos: ("special-tokens", "eos is 60"),
    missing_add_bos: ("special-tokens", "begins a text with bos, llama.cpp does not"),
    one_more_end: ("special-tokens", "llama.cpp does not stop at 65"),
    wider_model: ("architecture", "feed_forward_length 96 and 128"),
    model_of_another_seed: ("weights", "tensors are not those of base"),
    one_wrong_matrix: ("weights", "model.layers.1.mlp.down_proj.weight by"),
    requantized_with_the_old_certificate: ("certificate", "the certificate is of another file"),
    certificate_of_another_checkpoint: ("certificate", "of another source, another"),
    wrong_name: ("quantization", "its name says Q8_0"),
    truncated_artifact: ("architecture", "truncated"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_it_is_caught_and_named(release: Path, spoil: Callable[[Path], None]) -> None:
    name, words = CASES[spoil]
    spoil(release)
    found = failures(release, quick=True)
    assert list(found) == [name], found
    assert words in found[name]


def test_advice_is_given(release: Path) -> None:
    wrong_rope_theta(release)
    (found,) = [c for c in check(release, only=["context"])["checks"] if c["status"] == "fail"]
    assert "Convert model-q4_0.gguf from base again" in found["advice"]
