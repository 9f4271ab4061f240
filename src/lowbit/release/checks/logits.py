"""Does each runtime compute from an artifact what its values say: logits against transformers on the same values."""

from __future__ import annotations

import math
import shutil
import tempfile
from importlib import resources

from lowbit import memory
from lowbit.errors import LowbitError, RuntimeFailed
from lowbit.release import child, parity, tokenizing
from lowbit.release.checks.base import Check, Findings, NotApplicable
from lowbit.release.members import Member
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.units import format_bytes

_TOKENS = 64
_CHARACTERS = 2000
_BYTES_A_WEIGHT = 4
_COPIES = 2.5  # of the float32 values that are in memory at a time
_USUAL = 1 << 33  # bytes, where the machine does not say what it has
_RUNTIMES = {"gguf": ("llama.cpp", "xllamacpp"), "mlx": ("mlx-lm", "mlx-lm")}
_ADVICE = (
    "The runtime does not compute what this file says: try a newer one, or convert again; `lowbit measure` tells more"
)


class Logits(Check):
    name = "logits"
    question = "each runtime computes from an artifact what transformers computes from its values"
    rank = 130
    after = ("safety", "hashes", "architecture", "context", "weights", "vocabulary")
    measured = True
    roles = (*TEXT_MODELS, "tokenizer")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        artifacts = [m for m in release.text_models if m.role == "artifact"]
        if not artifacts:
            raise NotApplicable("no artifact that lowbit reads")
        if tokenizing.version("transformers") is None or tokenizing.version("torch") is None:
            raise NotApplicable("torch or transformers is not installed; run: pip install 'lowbit[train]'")
        reference = release.reference if release.reference not in artifacts else None
        kept, levels = self._that_fit(release, artifacts, found)
        if not kept:
            raise NotApplicable("; ".join(found.notes))
        ids = self._tokens(release, kept)
        for member, result in zip(kept, self._results(kept, reference, ids, found), strict=True):
            if result is not None:
                self._judge(member, reference, result, levels[member], found)

    def _that_fit(
        self, release: ReleaseSet, artifacts: list[Member], found: Findings
    ) -> tuple[list[Member], dict[Member, str]]:
        """The artifacts whose float32 values fit memory and disk, and the level that each is held to."""
        kept, levels = [], {}
        for member in artifacts:
            with found.problems_of(member), release.checkpoint(member) as opened:
                size = opened.n_weights * _BYTES_A_WEIGHT
                room = memory.available_bytes() or memory.total_bytes() or _USUAL
                free = min(room / _COPIES, shutil.disk_usage(tempfile.gettempdir()).free)
                if size > free:
                    needs = f"{format_bytes(size * _COPIES)} of memory and {format_bytes(size)} of disk"
                    found.note(f"{member}: not run, its values in float32 need {needs}")
                    continue
                levels[member] = parity.level(opened, member.container)
                kept.append(member)
        return kept, levels

    def _tokens(self, release: ReleaseSet, artifacts: list[Member]) -> list[int]:
        """A text's first tokens, by the first tokenizer that there is; by chance where there is none."""
        text = resources.files("lowbit").joinpath("data", "held-out.txt").read_text("utf-8")[:_CHARACTERS]
        for member in sorted(artifacts, key=lambda m: m.container != "gguf"):
            try:
                with tokenizing.opened(member) as (_, _, tokenize):
                    return tokenize(text, True)[:_TOKENS]
            except LowbitError:
                continue
        raise NotApplicable("no tokenizer to make a sequence with")

    def _results(
        self, artifacts: list[Member], reference: Member | None, ids: list[int], found: Findings
    ) -> list[dict[str, float] | None]:
        """Of all in one child, which loads the libraries once; where it fails, one by one, to name the culprit."""
        against = str(reference.path) if reference is not None else None

        def call(some: list[Member]) -> list[dict[str, float] | None]:
            paths = [str(member.path) for member in some]
            results: list[dict[str, float] | None] = child.call("logits", artifacts=paths, reference=against, ids=ids)
            return results

        try:
            return call(artifacts)
        except LowbitError as error:
            if len(artifacts) == 1:
                found.problem(_named(artifacts[0], error), _ADVICE)
                return [None]
        results: list[dict[str, float] | None] = []
        for member in artifacts:
            try:
                results += call([member])
            except LowbitError as error:
                found.problem(_named(member, error), _ADVICE)
                results.append(None)
        return results

    def _judge(
        self, member: Member, reference: Member | None, result: dict[str, float], level: str, found: Findings
    ) -> None:
        name, package = _RUNTIMES.get(member.container, ("transformers", "transformers"))
        version = tokenizing.version(package)
        found.runtimes[name] = f"xllamacpp {version}" if package == "xllamacpp" else str(version)
        kld, most = result["kld"], parity.MOST[level]
        figures = f"KLD {kld:.1e}, logits off by at most {result['largest']:.1e}, top-1 {100 * result['top1']:.0f}%"
        if not kld <= most:
            found.problem(
                f"{member}: {name} is not what its own values give: {figures}; at most {most:g} ({level})", _ADVICE
            )
            return
        off = result["from_reference"]
        far = f"; {off:.2g} nats from {reference}" if reference is not None and math.isfinite(off) else ""
        found.note(f"{member} in {name}: {figures}{far}")


def _named(member: Member, error: LowbitError) -> str:
    if isinstance(error, RuntimeFailed):
        return f"{member}: {error}"
    return str(error) if str(member) in str(error) else f"{member}: {error}"


CHECK = Logits
