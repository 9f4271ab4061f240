"""Runs the checks of a release in their order, one at a time, and says of each what it found."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.release import checks
from lowbit.release.checks.base import FAIL, NOT_APPLICABLE, PASS, Check, Findings, NotApplicable, Verdict
from lowbit.release.release_set import ReleaseSet
from lowbit.release.walk import counted_files, every_file

SAFETY = "safety"  # runs before whatever gives a file to a runtime, asked for or not
Seen = dict[str, tuple[str, Verdict]]


def run_checks(
    release: ReleaseSet,
    wanted: Collection[str],
    *,
    quick: bool = False,
    seen: Seen | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> tuple[Verdict, ...]:
    """The verdicts of the checks named ``wanted``.

    quick: leave out what a runtime computes. seen: verdicts of an earlier call by name, each with what its files were
    then; where they are still the same the check is not run again, and new ones are put there. tell: is called with
    the name of each check before it runs.
    """
    verdicts: dict[str, Verdict] = {}
    needed = [c for c in checks.all_checks() if c.name in wanted or (c.name == SAFETY and _guarded(wanted))]
    for check in needed:
        state = _state(release, check, verdicts, quick)
        if seen is not None and check.name in seen and seen[check.name][0] == state:
            verdicts[check.name] = seen[check.name][1]
            continue
        tell(check.name)
        verdicts[check.name] = _verdict(release, check, verdicts, quick)
        if seen is not None:
            seen[check.name] = state, verdicts[check.name]
    return tuple(v for v in verdicts.values() if v.name in wanted or v.status == FAIL)


def _guarded(wanted: Collection[str]) -> bool:
    return any(SAFETY in check.after for check in checks.all_checks() if check.name in wanted)


def _verdict(release: ReleaseSet, check: Check, before: Mapping[str, Verdict], quick: bool) -> Verdict:
    failed = [name for name in check.after if name in before and before[name].status == FAIL]
    if failed:
        return Verdict(name=check.name, status=NOT_APPLICABLE, detail=f"not run, as {' and '.join(failed)} failed")
    if quick and check.measured:
        return Verdict(name=check.name, status=NOT_APPLICABLE, detail="not run with --quick")
    found, start = Findings(quick=quick), time.monotonic()
    status, detail = "", ""
    try:
        check.run(release, found)
    except NotApplicable as reason:
        status, detail = NOT_APPLICABLE, str(reason)
    except LowbitError as error:
        found.problem(str(error))
    if found.problems:
        status, detail = FAIL, "; ".join(found.problems)
    elif not status:
        status, detail = PASS, "; ".join(found.notes)
    return Verdict(
        name=check.name,
        status=status,
        detail=_one_line(detail),
        advice=_one_line(". ".join(found.advice)) if status == FAIL else "",
        seconds=time.monotonic() - start,
        runtimes=tuple(found.runtimes.items()),
    )


def _one_line(text: str) -> str:
    """No control characters of a stranger's file, nor bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode())


def _state(release: ReleaseSet, check: Check, before: Mapping[str, Verdict], quick: bool) -> str:
    """What a check's result depends on, short of the files' content: names, sizes, times, and what came before it."""
    told: list[object] = [quick, [before[name].status for name in check.after if name in before], release.lock]
    if check.roles:
        paths = [path for member in release.of(*check.roles) for path in counted_files(member.path)]
        told += [member.name for member in release.of(*check.roles)]
    else:
        paths = list(every_file(release.root))
    told += [_fingerprint(path) for path in paths]
    return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()


def _fingerprint(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
