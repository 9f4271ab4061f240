"""Pickles, remote code, templates that try to leave their sandbox, links out of the folder: refused and named."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import change_json, failures, set_key

from lowbit.check import check


class Call:
    """What a hostile pickle holds: something to be called."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo run > /tmp/lowbit-was-run",)


def zipped(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object))
    return buffer.getvalue()


def put(root: Path, name: str, data: bytes | str) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def out_of_the_sandbox(root: Path) -> None:
    change_json(root / "base" / "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")


def by_a_computed_name(root: Path) -> None:
    put(root, "base/chat_template.jinja", "{{ messages | attr('__cl' ~ 'ass__') }}")


def by_an_item(root: Path) -> None:
    put(root, "base/chat_template.jinja", "{{ ''['__class__'] }}")


def without_end(root: Path) -> None:
    loops = "".join(f"{{% for {c} in range(90000) %}}" for c in "abcd")
    put(root, "base/chat_template.jinja", f"{loops}{{% endfor %}}{{% endfor %}}{{% endfor %}}{{% endfor %}}")


def gigantic_range(root: Path) -> None:
    put(root, "base/chat_template.jinja", "{% for i in range(10 ** 12) %}x{% endfor %}")


def gigantic_text(root: Path) -> None:
    put(root, "base/chat_template.jinja", "{{ 'x' * 10 ** 11 }}")


def another_file(root: Path) -> None:
    put(root, "base/chat_template.jinja", "{% include '/etc/passwd' %}")


def in_a_gguf(root: Path) -> None:
    set_key(root / "model-q4_0.gguf", "tokenizer.chat_template", "{{ cycler.__init__.__globals__ }}")


def link_out(root: Path) -> None:
    (root / "base" / "extra.json").symlink_to("/etc/passwd")


def link_to_nothing(root: Path) -> None:
    (root / "base" / "extra.json").symlink_to(root / "nothing")


def folder_out(root: Path) -> None:
    (root / "more").symlink_to("/etc")


def pipe(root: Path) -> None:
    os.mkfifo(root / "base" / "pipe.json")


def auto_map(root: Path) -> None:
    change_json(root / "base" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def tokenizer_code(root: Path) -> None:
    change_json(root / "base" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.T", None]})


def mlx_model_file(root: Path) -> None:
    change_json(root / "mlx" / "config.json", model_file="evil.py")


def nested_auto_map(root: Path) -> None:
    put(root, "base/processor_config.json", json.dumps({"image_processor": {"auto_map": {"AutoProcessor": "x.Y"}}}))


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pytorch's weights": (lambda r: put(r, "base/pytorch_model.bin", b"x"), "'base/pytorch_model.bin': weights in"),
    "a .pt": (lambda r: put(r, "a.pt", b"anything"), "opened as a pickle"),
    "a pickle": (lambda r: put(r, "a.pkl", pickle.dumps(Call())), "a pickle"),
    "another suffix": (lambda r: put(r, "base/vocab.json", pickle.dumps(Call())), "'base/vocab.json': a pickle"),
    "an old protocol": (lambda r: put(r, "base/data.txt", pickle.dumps(Call(), 0)), "'base/data.txt': a pickle"),
    "protocol 1": (lambda r: put(r, "base/data.dat", pickle.dumps(Call(), 1)), "'base/data.dat': a pickle"),
    "a long one": (lambda r: put(r, "base/x.dat", pickle.dumps([Call(), b"x" * (3 << 20)])), "a pickle"),
    "a zip": (lambda r: put(r, "base/x.dat", zipped("archive/data.pkl", pickle.dumps(1))), "data.pkl in it"),
    "a zip, renamed": (lambda r: put(r, "x.gguf.zip", zipped("a/b", pickle.dumps(Call()))), "a zip with a pickle"),
    "behind other bytes": (
        lambda r: put(r, "x.dat", b"GGUFxxxx" + zipped("data.pkl", pickle.dumps(Call()))),
        "data.pkl in it",
    ),
    "an array of objects": (lambda r: put(r, "x.npy", objects()), "a numpy array of objects"),
    "a model's code": (lambda r: put(r, "code/modeling_gemma9.py", "x = 1"), "Python code of a model"),
    "code beside a config": (lambda r: put(r, "base/helper.py", "x = 1"), "Python code beside config.json"),
    "machine code": (lambda r: put(r, "kernel.so", b"\x7fELF"), "machine code"),
    "auto_map": (auto_map, "'base/config.json': auto_map"),
    "a tokenizer's code": (tokenizer_code, "'base/tokenizer_config.json': auto_map"),
    "mlx's model_file": (mlx_model_file, "'mlx/config.json': model_file"),
    "auto_map, deep": (nested_auto_map, "auto_map"),
    "a template out of its sandbox": (out_of_the_sandbox, "it reads __"),
    "by a computed name": (by_a_computed_name, "the filter attr"),
    "by an item": (by_an_item, "it names __class__"),
    "a template without end": (without_end, "does not end"),
    "a gigantic range": (gigantic_range, "asks for too much"),
    "a gigantic text": (gigantic_text, "asks for too much"),
    "a template of another file": (another_file, "loads another template"),
    "a GGUF's template": (in_a_gguf, "'model-q4_0.gguf': the chat template tokenizer.chat_template: it reads __"),
    "a link out": (link_out, "a link out of the folder"),
    "a link to nothing": (link_to_nothing, "a link to nothing"),
    "a folder out": (folder_out, "'more': a link out of the folder"),
    "a pipe": (pipe, "no file but a pipe"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_named(release: Path, case: str) -> None:
    spoil, words = CASES[case]
    spoil(release)
    found = failures(release, only=["safety"])
    assert list(found) == ["safety"], found
    assert words in found["safety"]
    assert not Path("/tmp/lowbit-was-run").exists()


def test_no_runtime_gets_such_a_file(release: Path) -> None:
    """Asked for or not, safety is looked at before anything that a runtime loads."""
    in_a_gguf(release)
    result = check(release, only=["tokenizer", "special-tokens"])
    assert {c["name"]: c["status"] for c in result["checks"]} == {
        "safety": "fail", "special-tokens": "n/a", "tokenizer": "n/a",
    }  # fmt: skip
    assert not result["passed"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("base/merges.txt", "#version: 0.2\nt h\nc os\n(a b\n"),
        ("base/vocab.json", '{"a": 0}'),
        ("a.npy", None),
        ("notes.txt", "cposix\nis no pickle, nor is (this)."),
        ("data.zip", zipped("a.txt", b"text")),
        ("tool/run.py", "print(1)"),
        ("imatrix.dat", bytes(range(256)) * 10),
        ("base/special_tokens_map.json", '{"auto_map": null}'),
    ],
)
def test_harmless_files_pass(release: Path, name: str, data: bytes | str | None) -> None:
    if data is None:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(3))
        data = buffer.getvalue()
    put(release, name, data)
    assert failures(release, only=["safety"]) == {}
