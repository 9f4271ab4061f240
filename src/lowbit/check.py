"""``lowbit check``: does this release set belong together, and does each runtime agree with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lowbit import verbs
from lowbit.errors import BadOption
from lowbit.release import checks
from lowbit.release.checks.base import FAIL, Verdict
from lowbit.release.make_lock import write_lock as _write_lock
from lowbit.release.release_set import ReleaseSet, open_release, scan_release
from lowbit.release.runner import run_checks
from lowbit.release.walk import LOCK_NAME
from lowbit.release.watch import watch as _watch

Tell = Callable[[str], None]


def check(
    path: str | Path,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    quick: bool = False,
    write_lock: bool = False,
    tell: Tell = lambda name: None,
) -> dict[str, Any]:
    """Checks the release in a folder, or the one that a lock file names.

    only, skip: names of checks. quick: leave out what a runtime computes. write_lock: take the members by what they
    are, check them, and write lowbit.lock where nothing failed. tell: is called with each check's name before it runs.

    The result is JSON as it stands: path, lock (its path, or None), members [{role, path, container}], checks [{name,
    status 'pass' / 'fail' / 'n/a', detail, advice, seconds, runtimes}], passed, written (the lock's path, or None).
    Raises NotFound, BadFile (a broken lock), BadOption.
    """
    wanted = checks.chosen(tuple(only), tuple(skip))
    path = Path(path).expanduser()
    if write_lock:
        if path.is_file() and path.name != LOCK_NAME:
            raise BadOption("a lock is written into a folder", where=path, expected=f"a folder, or its {LOCK_NAME}")
        release = scan_release(open_release(path).root if path.is_file() else _existing(path))
        wanted = wanted - {"hashes"}  # which the new lock states
    else:
        release = open_release(path)
    verdicts = run_checks(release, wanted, quick=quick, tell=tell)
    result = describe(release, verdicts)
    if write_lock and result["passed"]:
        result["written"] = str(_write_lock(release, verdicts))
    return result


def watch(
    path: str | Path,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    quick: bool = False,
    every: float = 1.0,
    tell: Tell = lambda name: None,
) -> Iterator[dict[str, Any]]:
    """``check`` now and after each change of a file, without end; a check whose files are the same is not run again.

    every: seconds between looks. The results are check's, with ``ran``: the names of the checks that ran.
    """
    open_release(path)  # raises now for what is no release
    wanted = checks.chosen(tuple(only), tuple(skip))
    return _watch(Path(path).expanduser(), wanted, functools.partial(describe), quick=quick, every=every, tell=tell)


def describe(release: ReleaseSet, verdicts: Sequence[Verdict], ran: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``check`` returns of the verdicts."""
    found = {
        "path": str(release.root),
        "lock": str(release.lock_path) if release.lock_path else None,
        "members": [{"role": m.role, "path": m.name, "container": m.container} for m in release.members],
        "checks": [verdict.to_json() for verdict in verdicts],
        "passed": all(verdict.status != FAIL for verdict in verdicts),
        "written": None,
    }
    return found if ran is None else found | {"ran": list(ran)}


def _existing(path: Path) -> Path:
    return path if path.is_dir() else open_release(path).root  # which says that there is none


verbs.make_callable(__name__)
