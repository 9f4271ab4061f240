"""Is each certificate that of the file beside it and of this release's checkpoint, and is what it says so?"""

from __future__ import annotations

from lowbit.errors import LowbitError
from lowbit.pack import certificate
from lowbit.release.checks.base import Check, Findings, NotApplicable
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet
from lowbit.units import format_share

_ADVICE = "Pack again with `lowbit pack`, which writes the certificate of what it writes; or remove this one"


class Certificate(Check):
    name = "certificate"
    question = "each certificate is of the file beside it and of this checkpoint, and says what is so"
    rank = 100
    after = ("hashes", "architecture")
    roles = ()

    def run(self, release: ReleaseSet, found: Findings) -> None:
        certified = [
            m for m in release.of("artifact", "projector", "drafter") if certificate.path_beside(m.path).is_file()
        ]
        if not certified:
            raise NotApplicable("no certificate here; `lowbit pack` writes one beside what it writes")
        for member in certified:
            with found.problems_of(member, _ADVICE):
                self._check(release, member, found)

    def _check(self, release: ReleaseSet, member: Member, found: Findings) -> None:
        stated = certificate.stated_of(member.path)
        assert stated is not None
        said = stated.get("source_sha256")
        sources = release.of("checkpoint", "base") if member.role == "artifact" else ()
        if not sources:
            found.note(f"{member}: its own certificate; what it was made from is not here")
            return
        of = next((source for source in sources if _hash_of(release, source) == said), None)
        if of is None:
            name = str(stated.get("source"))[:60]
            found.problem(f"{member}: the certificate is of another source, {name}, and not of {sources[0]}", _ADVICE)
            return
        if found.quick:
            found.note(f"{member}: of this file and of {of} by their hashes; not proved again with --quick")
            return
        proved = certificate.verify(member.path, of.path)
        share = format_share(proved.totals["exact"], proved.totals["blocks"])
        found.note(f"{member}: {share} of {proved.totals['blocks']:,} blocks are {of}'s, bit for bit, proved again")


def _hash_of(release: ReleaseSet, source: Member) -> str | None:
    try:
        with release.checkpoint(source) as opened:
            return certificate.source_sha256(opened)
    except LowbitError:
        return None


CHECK = Certificate
