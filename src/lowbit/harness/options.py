"""How much the harness may do for one answer, and which of its layers are on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lowbit.errors import BadOption
from lowbit.harness import dialects

LAYERS = {
    "escape": "special tokens in the text of users and tools are made plain text",
    "grammar": "the runtime is asked to generate inside the schema",
    "repair": "broken JSON in an answer is mended",
    "rescue": "tool calls that the runtime left in the text are found",
    "heal": "names and arguments of tool calls are mended",
    "guard": "repetition, identical calls, empty answers and missing steps count as failures",
    "retry": "an answer that failed is asked for again, with what was wrong",
    "fallback": "another model is asked when the tries are spent",
}


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Bounds and layers.

    tries:        requests to the model for one answer, the first included
    token_budget: completion tokens over all tries; None means no bound beyond each try's own max_tokens
    seconds:      wall time for one answer, all tries together
    layers:       which of LAYERS are on
    same_call:    how often a call with the same arguments may have been made before it counts as a loop
    max_steps:    rounds of tool calls that a conversation may have; None means any number
    required:     tools that must have been called before a final answer is one
    dialect:      how the model writes tool calls, a name in dialects/; None tries all
    nudge:        whether an answer that only announces a call ("I will now call ...") counts as a failure
    """

    tries: int = 3
    token_budget: int | None = None
    seconds: float = 300.0
    layers: frozenset[str] = frozenset(LAYERS)
    same_call: int = 3
    max_steps: int | None = None
    required: tuple[str, ...] = ()
    dialect: str | None = None
    nudge: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tries", 1), ("token_budget", 1), ("same_call", 1), ("max_steps", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise BadOption(f"impossible {name}", found=repr(value)[:60], expected=f"a whole number from {least}")
        if type(self.seconds) not in (int, float) or not self.seconds > 0:
            raise BadOption("impossible seconds", found=repr(self.seconds)[:60], expected="more than 0")
        if unknown := sorted(self.layers - set(LAYERS)):
            raise BadOption("unknown layer", found=unknown[0], expected=", ".join(LAYERS))
        if self.dialect is not None:
            dialects.get(self.dialect)

    def on(self, layer: str) -> bool:
        return layer in self.layers

    @classmethod
    def without(cls, layers: Iterable[str], **values: Any) -> HarnessOptions:
        """All layers but these. Raises BadOption for one that there is not."""
        off = frozenset(layers)
        if unknown := sorted(off - set(LAYERS)):
            raise BadOption("unknown layer", found=unknown[0], expected=", ".join(LAYERS))
        return cls(layers=frozenset(LAYERS) - off, **values)

    @classmethod
    def read(cls, given: dict[str, Any], base: HarnessOptions) -> HarnessOptions:
        """What a request's own ``"lowbit"`` object changes of ``base``. It can only tighten bounds that cost others:
        tries, tokens and seconds. Raises BadOption."""
        known = {"tries", "token_budget", "seconds", "layers", "same_call", "max_steps", "required", "dialect", "nudge"}
        if unknown := sorted(set(given) - known):
            raise BadOption("unknown key in lowbit", found=unknown[0][:60], expected=", ".join(sorted(known)))
        values = {name: getattr(base, name) for name in known} | {k: v for k, v in given.items() if v is not None}
        for name in ("layers", "required"):
            if not isinstance(values[name], list | tuple | frozenset) or not all(
                isinstance(item, str) for item in values[name]
            ):
                raise BadOption(f"impossible {name}", found=repr(values[name])[:60], expected="a list of names")
        if not isinstance(values["nudge"], bool):
            raise BadOption("impossible nudge", found=repr(values["nudge"])[:60], expected="true or false")
        if not isinstance(values["dialect"], str | None):
            raise BadOption("impossible dialect", found=repr(values["dialect"])[:60], expected="a name")
        values["layers"], values["required"] = frozenset(values["layers"]), tuple(values["required"])
        read = cls(**values)
        bounded = {"tries": min(read.tries, base.tries), "seconds": min(read.seconds, base.seconds)}
        if base.token_budget is not None:
            bounded["token_budget"] = min(read.token_budget or base.token_budget, base.token_budget)
        return cls(**(values | bounded))
