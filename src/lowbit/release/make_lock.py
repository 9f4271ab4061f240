"""From a release to its lock: hashes of every member, and what its checks have proved."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from lowbit.release import lock as locks
from lowbit.release.checks.base import FAIL, PASS, Verdict
from lowbit.release.lock import Lock, Locked, Proof
from lowbit.release.members import Member
from lowbit.release.release_set import ReleaseSet
from lowbit.release.walk import LOCK_NAME, hash_member


def write_lock(release: ReleaseSet, verdicts: Iterable[Verdict] = (), *, proved: Iterable[Proof] = ()) -> Path:
    """Writes lowbit.lock into the release's folder (or over the lock that it was opened by), and returns its path.

    verdicts: of the checks that ran, of which those with a runtime are written down; proved: more of that kind.
    """
    path = release.lock_path or release.root / LOCK_NAME
    members = tuple(locked(member) for member in release.members)
    locks.write(path, Lock(members=members, proved=(*proofs(verdicts), *proved), created=locks.now()))
    return path


def locked(member: Member) -> Locked:
    """A member with its hashes. Raises OSError."""
    whole, parts = hash_member(member.path)
    return Locked(
        role=member.role, path=member.name, container=member.container,
        size=whole.size, sha256=whole.sha256, files=parts,
    )  # fmt: skip


def proofs(verdicts: Iterable[Verdict]) -> tuple[Proof, ...]:
    """One proof for each runtime that took part in a check that passed or failed."""
    checks: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        for runtime in verdict.runtimes if verdict.status in (PASS, FAIL) else ():
            checks.setdefault(runtime, []).append(verdict)
    return tuple(
        Proof(
            runtime=name, version=version, date=today(),
            result=FAIL if any(v.status == FAIL for v in found) else PASS, checks=tuple(v.name for v in found),
        )
        for (name, version), found in sorted(checks.items())
    )  # fmt: skip


def today() -> str:
    return datetime.now(UTC).date().isoformat()
