"""lowbit.lock: written, read back, stale; hostile ones refused in one line."""

from __future__ import annotations

import random
import shutil
import sys
import time
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import failures

from lowbit.check import check
from lowbit.errors import BadFile, LowbitError, NotFound
from lowbit.release import lock as locks
from lowbit.release.release_set import open_release

LOCK = "lowbit.lock"
QUICK = ["hashes", "architecture", "vocabulary"]


@pytest.fixture
def locked(release: Path) -> Path:
    result = check(release, write_lock=True, only=["safety", *QUICK, "tokenizer"])
    assert result["written"] == str(release / LOCK), result
    return release


def test_a_lock_names_every_member(locked: Path) -> None:
    document = tomllib.loads((locked / LOCK).read_text("utf-8"))
    assert document["format"] == locks.FORMAT
    assert document["base"]["path"] == "base"
    assert {a["container"]: a["path"] for a in document["artifact"]} == {"gguf": "model-q4_0.gguf", "mlx": "mlx"}
    assert document["tokenizer"]["path"] == "base/tokenizer.json"
    assert document["chat_template"]["path"] == "base/tokenizer_config.json"
    assert set(document["base"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    proved = {p["runtime"]: (p["result"], p["checks"]) for p in document["proved"]}
    assert proved["llama.cpp"] == ("pass", ["tokenizer"])
    assert {"transformers", "mlx-lm"} <= proved.keys()


def test_it_is_read_back_as_it_was_written(locked: Path, tmp_path: Path) -> None:
    lock = locks.read(locked / LOCK)
    locks.write(tmp_path / "again.lock", lock)
    assert locks.read(tmp_path / "again.lock") == lock
    assert failures(locked, only=QUICK) == {}
    assert failures(locked / LOCK, only=QUICK) == {}


def test_a_folders_hash_is_what_sha256sum_gives(locked: Path) -> None:
    import hashlib

    base = locks.read(locked / LOCK).of("base")[0]
    lines = "".join(
        f"{hashlib.sha256((locked / 'base' / part.path).read_bytes()).hexdigest()}  {part.path}\n"
        for part in sorted(base.files, key=lambda part: part.path)
    )
    assert base.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_documentation_does_not_count(locked: Path) -> None:
    (locked / "base" / "README.md").write_text("read me")
    (locked / "base" / ".cache").mkdir()
    assert failures(locked, only=QUICK) == {}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("base/config.json", "base: in base 'config.json' was changed"),
        ("base/extra.json", "'extra.json' is new"),
        ("model-q4_0.gguf", "artifact: model-q4_0.gguf is another file (of the same size"),
    ],
)
def test_a_stale_lock_is_named(locked: Path, path: str, words: str) -> None:
    """A byte more, or another byte: the artifact swapped for one of the same size."""
    file = locked / path
    if path.endswith(".gguf"):
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    else:
        file.write_text((file.read_text() if file.exists() else "{}") + "\n")
    found = failures(locked)
    assert list(found) == ["hashes"], found
    assert words in found["hashes"]


def test_what_is_missing_is_named(locked: Path) -> None:
    shutil.rmtree(locked / "mlx")
    found = failures(locked, quick=True)
    assert list(found) == ["hashes"]
    assert "artifact: mlx is not there" in found["hashes"]


def test_no_lock_is_written_of_a_bad_release(release: Path) -> None:
    (release / "base" / "modeling_x.py").write_text("")
    result = check(release, write_lock=True, quick=True)
    assert not result["passed"]
    assert result["written"] is None
    assert not (release / LOCK).exists()


MEMBER = f'container = "gguf"\nsize = 1\nsha256 = "{"0" * 64}"\n'
HOSTILE: dict[str, tuple[str, str]] = {
    "not TOML": ("format = ", "not valid TOML"),
    "of another format": ('format = "other/1"', "not a lock file; found format 'other/1'"),
    "nested deep": (f"x = {'[' * 5000}", "not valid TOML"),
    "an unknown key": ("{format}evil = 1", "evil"),
    "an absolute path": ('{format}[base]\npath = "/etc/passwd"\n{member}', "may leave the folder"),
    "a path upwards": ('{format}[base]\npath = "a/../../x"\n{member}', "may leave the folder"),
    "a home": ('{format}[base]\npath = "~/x"\n{member}', "may leave the folder"),
    "a drive": ('{format}[base]\npath = "C:x"\n{member}', "may leave the folder"),
    "backslashes": ('{format}[base]\npath = "a\\\\..\\\\x"\n{member}', "may leave the folder"),
    "a control character": ('{format}[base]\npath = "a\\u001b[2J"\n{member}', "may leave the folder"),
    "no path": ("{format}[base]\n{member}", "not a path"),
    "a number for a path": ("{format}[base]\npath = 3\n{member}", "not a path"),
    "a table for artifacts": ('{format}[artifact]\npath = "x"\n{member}', "[[artifact]] tables"),
    "a list for a base": ('{format}[[base]]\npath = "x"\n{member}', "expected a table"),
    "a size that is none": ('{format}[base]\npath = "x"\ncontainer = "gguf"\nsize = -1', "base.size"),
    "a hash that is none": ('{format}[base]\npath = "x"\ncontainer = "gguf"\nsize = 1\nsha256 = "x"', "base.sha256"),
    "a container that is none": ('{format}[base]\npath = "x"\ncontainer = "exe"', "base.container"),
    "an artifact twice": (
        '{format}[[artifact]]\npath = "x"\n{member}[[artifact]]\npath = "x"\n{member}',
        "named twice",
    ),
    "a file upwards": (
        '{format}[base]\npath = "x"\n{member}files."../y" = {{ size = 1, sha256 = "' + "0" * 64 + '" }}',
        "may leave the folder",
    ),
    "no member": ("{format}", "names no file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_lock_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    text, words = HOSTILE[case]
    if "{" in text:
        text = text.format(format=f'format = "{locks.FORMAT}"\n', member=MEMBER)
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    with pytest.raises(BadFile) as refused:
        open_release(tmp_path)
    said = str(refused.value)
    assert words in said
    assert said.isprintable()


def test_a_lock_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / LOCK, "wb") as handle:
        handle.truncate(1 << 40)  # a hole
    with pytest.raises(BadFile, match="larger than any lock file"):
        open_release(tmp_path)


def test_a_member_that_leads_out_by_a_link_is_refused(locked: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.gguf"
    shutil.move(locked / "model-q4_0.gguf", outside)
    (locked / "model-q4_0.gguf").symlink_to(outside)
    with pytest.raises(BadFile, match="a link that leads out of the folder"):
        check(locked, quick=True)


def test_no_such_lock(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder or lock file"):
        check(tmp_path / LOCK)


def test_any_lock_is_read_or_refused(locked: Path, tmp_path: Path) -> None:
    """Bytes changed, cut, doubled and moved about: nothing but a LowbitError comes out, in one line and at once."""
    good = (locked / LOCK).read_bytes()
    pieces = [
        b"[",
        b"]",
        b'"',
        b"=",
        b"\n",
        b"[[artifact]]\n",
        b"{",
        b"}",
        b"\x00",
        b"\xff",
        b"1e999",
        b"..",
        b"9" * 5000,
    ]
    rng, path = random.Random(4), tmp_path / "fuzzed.lock"
    kinds = set()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            at, n = rng.randrange(len(data) + 1), rng.randrange(0, 60)
            what = rng.choice([b"", rng.choice(pieces), bytes(data[at : at + n]), bytes([rng.randrange(256)])])
            data[at : at + rng.choice([0, n])] = what
        path.write_bytes(data)
        start = time.process_time()
        try:
            locks.read(path)
            kinds.add("read")
        except LowbitError as error:
            kinds.add(error.what)
            assert str(error).isprintable()
        assert time.process_time() - start < 2
    assert {"read", "not valid TOML", "not the structure of a lock file"} <= kinds
