"""Are base, checkpoint and every artifact one architecture in the same sizes?"""

from __future__ import annotations

from lowbit.release.checks.base import Check, Findings, NotApplicable, shortened
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.settings import differences, settings_of


class Architecture(Check):
    name = "architecture"
    question = "base, checkpoint and artifacts are one architecture in the same sizes"
    rank = 20
    roles = TEXT_MODELS

    def run(self, release: ReleaseSet, found: Findings) -> None:
        models = release.text_models
        if not models:
            raise NotApplicable("no model that lowbit reads")
        reference, others = models[0], models[1:]
        advice = f"Make the artifact from {reference} again, or take the {reference.role} that it was made from"
        settings = {}
        for member in models:
            hint = "The file is damaged or not whole: fetch it again"
            with found.problems_of(member, hint):
                settings[member] = settings_of(release, member)
        if reference not in settings:
            return
        first = settings[reference]
        for member in others:
            if member not in settings:
                continue
            second = settings[member]
            if first.known and second.known and first.architecture != second.architecture:
                found.problem(f"{member} is {second.architecture}, {reference} is {first.architecture}", advice)
            elif wrong := differences(first, second, behaviour=False):
                found.problem(f"{reference} and {member}: {shortened(wrong)}", advice)
        sizes = [f"{first.keys[key]} {word}" for key, word in _SHOWN.items() if key in first.keys]
        found.note(f"{first.architecture}, {', '.join(sizes)}; {len(models)} model{'s' * (len(models) > 1)}")
        if not first.known:
            found.note(f"compared by the keys that both have ({first.problem})")


_SHOWN = {"block_count": "layers", "embedding_length": "wide", "vocab_size": "tokens"}
CHECK = Architecture
