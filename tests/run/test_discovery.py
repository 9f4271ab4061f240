"""Runtimes are found by their files' names, and each artifact by the runtime that it is for."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lowbit
from lowbit import run
from lowbit.cli import build_parser
from lowbit.errors import BadFile, BadOption, LowbitError, NotFound, Unsupported


def test_each_file_is_a_runtime() -> None:
    files = {p.stem for p in Path(run.__file__).parent.glob("[!_]*.py")} - {"base"}
    found = run.runtimes()
    assert {name.replace(".", "_").replace("-", "_") for name in found} == files
    for name, runtime in found.items():
        assert run.get(name) is runtime is run.get(name.replace(".", "-").upper())
        version = runtime.installed()
        assert version is None or any(c.isdigit() for c in version)
    assert found["llama.cpp"].installed()


def test_the_help_names_every_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser("measure").parse_args(["measure", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in run.runtimes())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "needs RUNTIME"),
        ("RUNTIME = 3", "needs RUNTIME"),
        (
            "from lowbit.run.base import Runtime\nclass X(Runtime):\n    name = 'odd'\nRUNTIME = X",
            "no close, installed",
        ),
        ("from lowbit.run.mlx import Mlx\nRUNTIME = Mlx", "its file's"),
    ],
)
def test_a_file_that_breaks_the_contract_is_named(
    tmp_path: Path, source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(source)
    package = types.ModuleType("strange_runtimes")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "strange_runtimes", package)
    monkeypatch.delitem(sys.modules, "strange_runtimes.odd", raising=False)
    with pytest.raises(BadFile, match=says) as error:
        run.discover("strange_runtimes")
    assert "odd" in str(error.value)


def test_each_artifact_has_its_runtime(tiny: Path, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama()
    lowbit.pack(folder, "mlx_affine4_g32", tmp_path / "mlx")
    lowbit.pack(folder, "f32", tmp_path / "mlx-plain", to="mlx")
    lowbit.pack(folder, "int4_g32", tmp_path / "ct")
    blob = tmp_path / "sha256-0123"  # as Ollama names a GGUF
    blob.write_bytes(tiny.read_bytes())
    for target, name in (
        (tiny, "llama.cpp"), (blob, "llama.cpp"), (tmp_path / "mlx", "mlx"), (tmp_path / "mlx-plain", "mlx"),
        (folder, "transformers"), (tmp_path / "ct", "transformers"),
    ):  # fmt: skip
        assert run.runtime_for(target).name == name
        with run.open_artifact(target, context=32) as model:
            assert model.name == name and model.context == 32
    with run.open_artifact(folder, "mlx", context=32) as model:
        assert model.name == "mlx"
    with pytest.raises(Unsupported, match="mlx does not run this"):
        run.open_artifact(tiny, "mlx")


def test_wrong_calls_are_one_line(tiny: Path, tmp_path: Path) -> None:
    cases: list[tuple[type[LowbitError], str, str | Path, dict[str, object]]] = [
        (BadOption, "no such runtime; found 'nonsense'; expected one of", tiny, {"runtime": "nonsense"}),
        (BadOption, "llama.cpp has no option gpu", tiny, {"gpu": 1}),
        (NotFound, "no-such.gguf", tmp_path / "no-such.gguf", {}),
        (NotFound, "no such model", "no-such-model", {}),
        (Unsupported, "no runtime is known", Path(__file__), {}),
    ]
    for kind, says, target, options in cases:
        with pytest.raises(kind) as error:
            run.open_artifact(target, **options)  # type: ignore[arg-type]
        assert says in str(error.value)


def test_none_leaves_an_option_at_its_default(tiny: Path) -> None:
    with run.open_artifact(tiny, context=None, threads=1, kv_type=None) as model:
        assert model.context == 512


def test_what_a_runtime_cannot_give_is_said(tiny: Path) -> None:
    from lowbit.run.base import Runtime, Suits

    class Silent(Runtime):
        name = "silent"
        path = Path("x")

        @classmethod
        def suits(cls, target: object) -> Suits:
            return Suits.NO

        @classmethod
        def installed(cls) -> None:
            return None

        def close(self) -> None:
            return

    with Silent() as model:
        assert model.model_bytes is model.n_weights is model.version is model.chat_template is None
        calls: list[Callable[[], object]] = [
            lambda: model.bos, lambda: model.tokenize("a"), lambda: model.detokenize([1]), lambda: model.logits([1]),
            lambda: model.feed(np.array([1])), model.reset, lambda: model.adds_bos,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(Unsupported, match="x: silent "):
                call()
