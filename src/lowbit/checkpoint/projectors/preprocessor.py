"""How pixels become numbers before the tower sees them: preprocessor_config.json and processor_config.json.

llama.cpp resizes and scales in its own code; an mmproj tells it the mean and the standard deviation only. So settings
that its code does not follow are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.families.base import Keys, positive
from lowbit.errors import BadConfig

KEY = "lowbit_preprocessor"  # where a projector finds them in its config
FILES = ("preprocessor_config.json", "processor_config.json")
BILINEAR, BICUBIC = 2, 3  # PIL's numbers
_RESCALE = 1 / 255


def image_settings(config: Mapping[str, Any], where: object, *, resample: int) -> dict[str, Any]:
    """``image_mean`` and ``image_std``, three numbers each, where the checkpoint says them; and that the other settings
    are what llama.cpp does. resample: how its code resizes for this projector. Raises BadConfig or Unsupported."""
    where = f"{Path(str(where)).parent}: preprocessor config"
    settings = config.get(KEY, {})
    keys = Keys(settings, where)
    keys.only("resample", resample)
    for key in ("do_resize", "do_rescale"):
        keys.only(key, True)
    keys.only("do_pan_and_scan", False)
    rescale = keys.number("rescale_factor", _RESCALE)
    if abs(rescale - _RESCALE) > 1e-7:
        keys.only("rescale_factor", _RESCALE)
    found: dict[str, Any] = {}
    if keys.flag("do_normalize", True):
        for key in ("image_mean", "image_std"):
            if keys.get(key) is not None:
                found[key] = _three_numbers(key, keys.get(key), where)
    else:
        found = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for value in found.get("image_std", []):
        positive("image_std", value, where)
    return found | {"size": keys.get("size"), "image_seq_length": keys.get("image_seq_length")}


def _three_numbers(key: str, value: Any, where: object) -> list[float]:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise BadConfig(f"bad value for {key}", where=where, found=repr(value)[:60], expected="three numbers")
    if not all(abs(x) < 1e6 for x in numbers):
        raise BadConfig(f"bad value for {key}", where=where, found=repr(value)[:60], expected="three finite numbers")
    return [float(x) for x in numbers]
