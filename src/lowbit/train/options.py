"""What a user can choose about training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit import recipe as recipes
from lowbit.errors import BadOption
from lowbit.run import _kv_types as kv_types

STARTS = ("calibrated", "nearest")
PARAMETERS = ("full", "scales", "both")
ACTIVATIONS = ("float", "static", "runtime")
PRECISIONS = ("auto", "float32", "bfloat16")
_CHOICES = {"start": STARTS, "train": PARAMETERS, "activations": ACTIVATIONS, "precision": PRECISIONS}
# A sequence of one token has nothing to go on from.
_LEAST = {
    "steps": 1, "sequence_length": 2, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "threads": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of ``lowbit train`` and of the training stage of ``lowbit ship``.

    minutes:         wall-clock budget of sampling, calibration and distillation together
    steps:           optimizer steps instead of a time budget for distillation (deterministic); None: by the clock
    recipe:          which tensor goes on which grid ("q4_0", ...); several train one checkpoint for all
    start:           "calibrated" (scale search, error compensation) or "nearest" (the format's plain rounding)
    train:           "full" (weights, and norms), "scales" (codes stay as the start left them) or "both" (weights and
                     norms, and scales where the format leaves them free)
    activations:     "float", "static": int8 on scales that are calibrated and then trained, keys and values
                     too; or "runtime": rounded before products with low-bit weights, as llama.cpp's kernels do
    data:            text file, JSONL, Parquet or datasets id; None: sampled from the model itself, filled up with
                     the bundled text where the budget is too short to sample enough
    targets:         "hidden" (the reference's final hidden states: exact probabilities), "topk:K" (its K largest
                     probabilities and the mass of the rest) or "compact" (the largest, the mass of the rest, and a
                     sample of that; at most 287 bytes a token); None: "hidden", with ``reference`` "compact"
    reference:       a file of ``lowbit reference``, which holds the data too, or the URL of a process that answers;
                     None: the model itself is asked before it is trained
    kv:              types of the KV cache that the model is to work with in llama.cpp ("q4_0", or K:V): it is trained
                     with keys and values rounded as that cache rounds them; None: unrounded
    kv_share:        of the sequences of a forward pass, the part that is read with that cache; the rest, so that the
                     model stays good with f16, without
    sequence_length: tokens a training sequence
    batch_size:      sequences a forward pass
    accumulate:      forward passes an optimizer step
    learning_rate:   peak; None: 1e-4 for "full", 5e-5 for "scales"
    scale_rate:      peak of scales and minimums, in parts of their mean magnitude a step; None: for "both" 1e-4 where a
                     scale is a row's and 3e-5 where it is a block's, of activations 1e-3; for "scales" by learning_rate
    warmup_steps:    optimizer steps of linear warm-up, before the cosine
    clip:            gradient norm above which gradients are scaled down
    precision:       "auto" (bfloat16 products where this machine is measurably faster with them), "float32", "bfloat16"
    threads:         CPU threads; None: as torch chooses
    seed:            of sampling, data order and everything else random
    """

    minutes: float = 10.0
    steps: int | None = None
    recipe: str = "q4_0"
    start: str = "calibrated"
    train: str = "full"
    activations: str = "float"
    data: str | None = None
    targets: str | None = None
    reference: str | None = None
    kv: str | None = None
    kv_share: float = 1.0
    sequence_length: int = 512
    batch_size: int = 2
    accumulate: int = 1
    learning_rate: float | None = None
    scale_rate: float | None = None
    warmup_steps: int = 8
    clip: float = 1.0
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise BadOption("minutes must be a number above 0", found=self.minutes, hint="Try --minutes 10")
        object.__setattr__(self, "recipe", ",".join(each.name for each in recipes.several(self.recipe)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadOption(f"unknown {name}", found=getattr(self, name), expected=" or ".join(choices))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadOption(f"{name} must be {least} or more", found=value)
        if self.seed >= 1 << 32:
            raise BadOption("seed must be below 2^32", found=self.seed)
        for name in ("learning_rate", "scale_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadOption(f"{name} must be a number above 0", found=value)
        if self.kv is not None:
            kv_types.parse(self.kv)  # raises BadOption
            if self.activations == "static":
                raise BadOption("static activations have a cache of their own", found=f"kv {self.kv}")
        if not 0 < self.kv_share <= 1:
            raise BadOption("kv_share must be above 0 and at most 1", found=self.kv_share)
        if self.targets is None:
            object.__setattr__(self, "targets", "hidden" if self.reference is None else "compact")
        if self.targets not in ("hidden", "compact") and self.top_k is None:
            expected = "hidden, compact or topk:K, for example topk:64"
            raise BadOption("unknown targets", found=self.targets, expected=expected)
        if self.reference is not None and self.targets != "compact":
            raise BadOption("a reference elsewhere gives compact targets", found=self.targets, expected="compact")

    @property
    def top_k(self) -> int | None:
        """K of targets="topk:K", or None."""
        name, _, count = (self.targets or "").partition(":")
        return int(count) if name == "topk" and count.isdecimal() and int(count) > 0 else None

    @property
    def reference_url(self) -> str | None:
        """Where ``reference`` is a process that answers."""
        return self.reference if self.reference and self.reference.startswith(("http://", "https://")) else None

    @property
    def reference_file(self) -> str | None:
        """Where ``reference`` is a file."""
        return self.reference if self.reference_url is None else None

    @property
    def trained_for(self) -> dict[str, str]:
        """What of the runtime is simulated, for the record."""
        said = {"kv": str(kv_types.parse(self.kv))} if self.kv is not None else {}
        return said | ({"activations": self.activations} if self.activations != "float" else {})

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-5 if self.train == "scales" else 1e-4
