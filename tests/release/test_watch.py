"""--watch: what changed is checked again, and only that; and the command line of ``lowbit check``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import change_json, set_key

import lowbit
from lowbit.check import watch
from lowbit.cli import main
from lowbit.errors import BadFile, BadOption, NotFound
from lowbit.release import checks

ONLY = ["hashes", "architecture", "context", "vocabulary", "quantization"]


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {found["name"]: found["status"] for found in result["checks"]}


def test_only_what_changed_is_checked_again(release: Path) -> None:
    results = watch(release, only=ONLY, every=0.01)
    first = next(results)
    assert set(first["ran"]) == set(ONLY)
    assert first["passed"]
    tokenizer = release / "base" / "tokenizer.json"
    good = tokenizer.read_bytes()
    vocab = json.loads(good)
    vocab["model"]["vocab"]["A"], vocab["model"]["vocab"]["B"] = 69, 68
    tokenizer.write_text(json.dumps(vocab))
    second = next(results)
    assert statuses(second)["vocabulary"] == "fail"
    set_key(release / "model-q4_0.gguf", "llama.rope.freq_base", 77.0)
    assert statuses(next(results))["context"] == "fail"
    tokenizer.write_bytes(good)
    fourth = next(results)
    assert statuses(fourth)["vocabulary"] == "pass"
    assert "quantization" not in fourth["ran"], "the artifacts have not changed"


def test_a_broken_lock_is_told_and_watched_on(release: Path) -> None:
    results = watch(release, only=["quantization"], every=0.01)
    assert next(results)["passed"]
    (release / "lowbit.lock").write_text("x")
    broken = next(results)
    assert not broken["passed"]
    assert "not valid TOML" in broken["error"]
    (release / "lowbit.lock").unlink()
    assert next(results)["passed"]


def command(*words: object, **more: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "lowbit", "check", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


def test_watch_prints_a_line_of_json_each_time(release: Path) -> None:
    with command(release, "--watch", "--json", "-", "--only", "quantization") as watching:
        assert watching.stdout is not None
        try:
            assert json.loads(watching.stdout.readline())["passed"]
            (release / "model-q4_0.gguf").rename(release / "model-q6_k.gguf")
            second = json.loads(watching.stdout.readline())
            assert statuses(second) == {"quantization": "fail"}
            assert second["ran"] == ["quantization"]
        finally:
            watching.terminate()


def test_the_command_line(good_release: Path, release: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(good_release), "--only", "architecture,context", "--json", "-"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [set(found) >= {"name", "status", "detail"} for found in result["checks"]] == [True, True]
    change_json(release / "mlx" / "config.json", max_position_embeddings=99)
    assert main(["check", str(release), "--quick", "--only", "context", "--quiet"]) == 1
    shown = capfd.readouterr().out
    assert "fail" in shown and "context_length 512 and 99" in shown and "→ Convert mlx from base again" in shown
    assert (
        main(["check", str(release), "--skip", "context,logits,tokenizer,chat_template", "--quick", "--json", "-"]) == 1
    )
    names = [found["name"] for found in json.loads(capfd.readouterr().out)["checks"]]
    assert "context" not in names and "chat-template" not in names and "certificate" in names


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{release}", "--only", "nonsense"], "no such check; found 'nonsense'; expected one of safety, "),
        (["{release}/no-such"], "no such folder or lock file"),
        (["{release}/model-q4_0.gguf"], "not a folder and not a lock file"),
        (["{release}/base/tokenizer.json", "--write-lock"], "a lock is written into a folder"),
        (["{release}", "--watch", "--write-lock"], "not allowed with"),
        (["{empty}"], "no model in this folder"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    good_release: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    spelled = [word.format(release=good_release, empty=tmp_path / "empty") for word in words]
    assert main(["check", *spelled, "--quiet"]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert says in shown.err and shown.err.count("\n") == 1


def test_two_bases_are_refused(release: Path) -> None:
    import shutil

    for name in ("one", "two"):
        shutil.copytree(release / "base", release / name)
    with pytest.raises(BadOption, match="two files could be the base"):
        lowbit.check(release)  # type: ignore[operator]


def test_no_release(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model in this folder"):
        lowbit.check(tmp_path)  # type: ignore[operator]


# Discovery


def test_every_check_has_its_file_and_its_place() -> None:
    found = checks.all_checks()
    assert [check.name for check in found][:2] == ["safety", "hashes"]
    assert len({check.rank for check in found}) == len(found)
    assert all(check.question and check.question[0].islower() for check in found)


BEGIN = "from lowbit.release.checks.base import Check\nclass CHECK(Check):\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("CHECK = 3", "needs CHECK, a subclass of lowbit.release.checks.base.Check"),
        (
            "from lowbit.release.checks.base import Check\nclass CHECK(Check):\n    name = 'odd'",
            "misses part of its contract",
        ),
        (
            f"{BEGIN}    name, question, rank = 'other', '', 1\n    def run(self, release, found): ...",
            "its file's",
        ),
        (
            f"{BEGIN}    name, question, rank = 'odd', '', 1\n"
            "    after = ('later',)\n    def run(self, release, found): ...",
            "waits for one that does not come before it",
        ),
    ],
)
def test_a_check_that_misses_its_contract_fails_at_discovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    package = tmp_path / "some_checks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "odd.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.startswith("some_checks")]:
        del sys.modules[name]
    with pytest.raises(BadFile, match=says):
        checks.discover("some_checks")
