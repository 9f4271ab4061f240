"""Are the files the ones that the lock names, to the byte?"""

from __future__ import annotations

from lowbit.release.checks.base import Check, Findings, NotApplicable, printable
from lowbit.release.lock import Locked
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet
from lowbit.release.walk import hash_member
from lowbit.units import format_bytes

_ADVICE = (
    "Fetch the file that the lock names; if the new one is meant, check it and write the lock again (--write-lock)"
)


class Hashes(Check):
    name = "hashes"
    question = "every file is the one that the lock names"
    rank = 10

    def run(self, release: ReleaseSet, found: Findings) -> None:
        if release.lock is None:
            raise NotApplicable("no lowbit.lock here; --write-lock makes one")
        members = {(member.role, member.name): member for member in release.members}
        size = 0
        for locked in release.lock.members:
            member = members.get((locked.role, locked.path))
            if member is None:
                found.problem(f"{locked.role}: {locked.path} is not there", _ADVICE)
            else:
                self._compare(locked, member, found)
                size += locked.size
        found.note(f"{len(release.lock.members)} members, {format_bytes(size)}")

    def _compare(self, locked: Locked, member: Member, found: Findings) -> None:
        try:
            whole, parts = hash_member(member.path)
        except OSError as error:
            found.problem(f"{locked.path}: cannot be read, {error.strerror or error}")
            return
        if whole.sha256 == locked.sha256 and whole.size == locked.size:
            return
        if not locked.files:
            sizes = (
                f"{locked.size:,} bytes in the lock, {whole.size:,} here"
                if whole.size != locked.size
                else (f"of the same size, {whole.size:,} bytes")
            )
            hashes = f"sha256 {whole.sha256[:12]}…, {locked.sha256[:12]}… in the lock"
            found.problem(f"{locked.role}: {locked.path} is another file ({sizes}; {hashes})", _ADVICE)
            return
        then, now = {part.path: part for part in locked.files}, {part.path: part for part in parts}
        words = [
            *(f"{printable(name)} is missing" for name in sorted(then.keys() - now.keys())),
            *(f"{printable(name)} is new" for name in sorted(now.keys() - then.keys())),
            *(f"{printable(name)} was changed" for name in sorted(then) if name in now and then[name] != now[name]),
        ]
        said = ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
        found.problem(
            f"{locked.role}: in {locked.path} {said or 'the hash of the folder is not that of its files'}", _ADVICE
        )


CHECK = Hashes
