"""Which scheme of quantized matrices a folder's config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint import compressed_tensors, mlx_affine
from lowbit.checkpoint.packed import Scheme

KEYS = ("quantization", "quantization_config")  # of config.json


def scheme_of(config: Mapping[str, Any], where: object) -> Scheme | None:
    """How a folder with this config stores its quantized matrices; None where it has none.

    Raises Unsupported for a quantization that lowbit does not read, BadConfig for a malformed description.
    """
    return mlx_affine.scheme_of(config, where) or compressed_tensors.scheme_of(config, where)
