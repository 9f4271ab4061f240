"""Do context length, rotary positions, windows and caps agree between config.json and the artifacts' key-values?"""

from __future__ import annotations

from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.settings import differences, settings_of


class Context(Check):
    name = "context"
    question = "context length, rope, sliding window and soft caps agree"
    rank = 30
    after = ("architecture",)
    roles = TEXT_MODELS

    def run(self, release: ReleaseSet, found: Findings) -> None:
        models = release.text_models
        if len(models) < 2:
            raise NotApplicable("one model only, nothing to compare with")
        reference = models[0]
        first = settings_of(release, reference)
        for member in models[1:]:
            if wrong := differences(first, settings_of(release, member), behaviour=True):
                advice = f"Convert {member} from {reference} again: with other positions it computes something else"
                found.problem(f"{reference} and {member}: {shortened(wrong)}", advice)
        keys = ("context_length", "rope.freq_base", "attention.sliding_window")
        said = [f"{key} {first.keys[key]:g}" for key in keys if isinstance(first.keys.get(key), int | float)]
        found.note(", ".join(said) or "no such keys")


CHECK = Context
