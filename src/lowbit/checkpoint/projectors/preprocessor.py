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

KEY = "lowbit_preprocessor"  # where a projector finds an image processor's settings in its config
SOUND_KEY = "lowbit_feature_extractor"  # and a feature extractor's
FILES = ("preprocessor_config.json", "processor_config.json")
BILINEAR, BICUBIC = 2, 3  # PIL's numbers
_RESCALE = 1 / 255


def image_settings(
    config: Mapping[str, Any], where: object, *, resample: int, mean: float, std: float
) -> dict[str, list[float]]:
    """``image_mean`` and ``image_std``, three numbers each; and that the other settings are what llama.cpp does.

    resample: how its code resizes for this projector. mean, std: of a checkpoint that does not say.
    Raises BadConfig or Unsupported.
    """
    where = f"{Path(str(where)).parent}: preprocessor config"
    keys = Keys(config.get(KEY, {}), where)
    keys.only("resample", resample)
    for key in ("do_resize", "do_rescale"):
        keys.only(key, True)
    keys.only("do_pan_and_scan", False)
    if abs(keys.number("rescale_factor", _RESCALE) - _RESCALE) > 1e-7:
        keys.only("rescale_factor", _RESCALE)
    if not keys.flag("do_normalize", True):
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    found = {"image_mean": keys.get("image_mean", [mean] * 3), "image_std": keys.get("image_std", [std] * 3)}
    for key, values in found.items():
        _check_three_numbers(key, values, where)
    for value in found["image_std"]:
        positive("image_std", value, where)
    return {key: [float(value) for value in values] for key, values in found.items()}


def check_sound_settings(config: Mapping[str, Any], where: object, expected: Mapping[str, Any]) -> None:
    """Raises Unsupported where a setting of the feature extractor is neither absent nor what llama.cpp's code has."""
    keys = Keys(config.get(SOUND_KEY, {}), f"{Path(str(where)).parent}: feature extractor config")
    for key, value in expected.items():
        keys.only(key, value)


def _check_three_numbers(key: str, value: Any, where: object) -> None:
    numbers = value if isinstance(value, list) and len(value) == 3 else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e6 for x in numbers):
        raise BadConfig(f"bad value for {key}", where=where, found=repr(value)[:60], expected="three numbers")
