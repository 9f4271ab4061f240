"""Shards and their index must agree: a tensor is in one shard, the one that the index names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import BadFile, NotFound, Unsupported

NORM = "model.norm.weight"


@pytest.fixture
def sharded(save_tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny model in several shards: model-0000x-of-0000y.safetensors and their index."""
    save_tiny_llama(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def another_shard(folder: Path, name: str) -> Path:
    """A shard that does not hold the tensor."""
    own = index_of(folder)[1]["weight_map"][name]
    return next(path for path in sorted(folder.glob("*.safetensors")) if path.name != own)


def put(path: Path, name: str) -> None:
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | {name: np.ones(64, np.float32)}, path)


@pytest.mark.parametrize("named", ["the shard it was in", "the other shard"])
def test_a_tensor_in_two_shards(sharded: Path, named: str) -> None:
    """Whichever of the two the index names, the other one is told."""
    second = another_shard(sharded, NORM)
    put(second, NORM)
    path, index = index_of(sharded)
    first = index["weight_map"][NORM]
    if named == "the other shard":
        index["weight_map"][NORM] = second.name
        path.write_text(json.dumps(index))
    told, owner = (second.name, first) if named == "the shard it was in" else (first, second.name)
    with pytest.raises(BadFile, match=rf"{told}: {NORM}: .* places elsewhere; found {owner} in the index"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    path, index = index_of(sharded)
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(BadFile, match=rf"{NORM}: .* places elsewhere; found nothing in the index"):
        open_checkpoint(sharded)


def test_a_tensor_that_no_shard_has(sharded: Path) -> None:
    path, index = index_of(sharded)
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(
        BadFile, match=r"layers\.9\.mlp\.up_proj\.weight: the index names a tensor that its shard lacks"
    ):
        open_checkpoint(sharded)


def test_a_shard_that_is_missing_or_cut_short(sharded: Path) -> None:
    path = another_shard(sharded, NORM)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BadFile, match=rf"{path.name}: .*truncated"):
        open_checkpoint(sharded)
    path.unlink()
    with pytest.raises(NotFound, match=rf"{path.name}: a shard is missing"):
        open_checkpoint(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    index_of(sharded)[0].unlink()
    with pytest.raises(Unsupported, match=r"several \.safetensors files and no model\.safetensors\.index\.json"):
        open_checkpoint(sharded)
    # One of them alone is taken for the whole, and is not.
    for path in sorted(sharded.glob("*.safetensors"))[1:]:
        path.unlink()
    with pytest.raises(BadFile, match=r"(more layers|a tensor of the model is missing).*The download is incomplete"):
        open_checkpoint(sharded)
