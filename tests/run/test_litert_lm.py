"""LiteRT-LM as a runtime, on a tiny model of 29,000 weights that make_litertlm.py converted."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from make_litertlm import CACHE, save_small

from lowbit import run
from lowbit.errors import BadFile, BadOption, BadText, LowbitError, NotFound, RuntimeFailed, Unsupported
from lowbit.measure import MeasureOptions, measure
from lowbit.run.litert_lm import LiteRtLm

FILE = Path(__file__).parent / "tiny.litertlm"
TOKENS = np.random.default_rng(4).integers(3, 263, 80).tolist()

pytestmark = pytest.mark.skipif(
    LiteRtLm.installed() is None, reason="LiteRT-LM is not installed: pip install 'lowbit[litert]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face model that the file was made of."""
    folder = tmp_path_factory.mktemp("litert") / "llama"
    save_small(folder)
    return folder


def test_its_logits_are_transformers(folder: Path) -> None:
    with run.open_artifact(FILE, threads=1) as model, run.open_artifact(folder, threads=1, context=128) as reference:
        assert (model.name, model.context, model.n_vocab) == ("litert-lm", CACHE, 320)
        expected = np.concatenate([rows for _, rows in reference.logits(TOKENS)])
        runs = list(model.logits(TOKENS, start=5))
        assert [(offset, len(rows)) for offset, rows in runs] == [(5, 64), (69, 11)]
        np.testing.assert_allclose(np.concatenate([rows for _, rows in runs]), expected[5:], atol=1e-4)
        made = list(model.generate(TOKENS[:10], 8, ignore_end=True))
        assert made == list(reference.generate(TOKENS[:10], 8, ignore_end=True))
        text = "the thing and the rain, 42: 你好\n"
        assert model.tokenize(text) == reference.tokenize(text) and model.detokenize(model.tokenize(text)) == text
        assert model.tokenize("<|im_end|>", parse_special=True) == [2] and model.ends(2) and not model.ends(3)
        assert (model.eos, model.bos, model.adds_bos) == (2, -1, False) and model.tokenize("") == []
        assert model.detokenize([2]) == "" and model.detokenize([2], special=True) == "<|im_end|>"
        assert model.prompt_of([{"role": "user", "content": "the"}]) == model.tokenize("the")
        with pytest.raises(Unsupported, match="control token 2"):
            model.tokenize("a <|im_end|>")
    assert not list(FILE.parent.glob("*cache")), "it wrote beside the file"


def test_it_is_measured_without_speeds_that_are_not_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rain had stopped, and the road was empty. Nobody saw the thing. " * 20)
    options = MeasureOptions(chunk=64, chunks=2, threads=1, prompt_tokens=16, generate_tokens=4, resamples=200)
    result = measure(FILE, against=folder, text=tmp_path / "text.txt", options=options)
    [entry] = result["artifacts"]
    assert entry["runtime"]["name"] == "litert-lm" and result["reference"]["runtime"]["name"] == "llama.cpp"
    assert 0 <= entry["fidelity"]["kld_mean"]["value"] < 1e-5 and entry["fidelity"]["top1"]["value"] > 0.98
    assert "speed" not in entry and "memory" not in entry and "otherwise than litert-lm" in entry["not_measured"]
    assert result["reference"]["speed"] and entry["size_bytes"] == FILE.stat().st_size


def test_bad_options_and_uses() -> None:
    for options in ({"context": -1}, {"context": CACHE + 1}, {"threads": 0}):
        with pytest.raises(BadOption):
            LiteRtLm(FILE, **options)
    model = LiteRtLm(FILE, context=16, threads=1)
    for tokens in ([], [320], [-1], [5] * 17):
        with pytest.raises(BadOption):
            list(model.logits(tokens))
    with pytest.raises(BadText, match="lone surrogate"):
        model.tokenize("\ud800")
    model.close()
    for use in (lambda: list(model.logits([5])), lambda: model.tokenize("a"), model.reset):
        with pytest.raises(RuntimeFailed, match="this model was closed"):
            use()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """Magic, the header's end, the header's bytes, and where sections are; what is in a graph is LiteRT's to read."""
    raw = bytearray(FILE.read_bytes())
    end = struct.unpack_from("<Q", raw, 24)[0]
    path = tmp_path / "bad.litertlm"

    def refused(data: bytes) -> LowbitError | None:
        path.write_bytes(data)
        try:
            LiteRtLm(path, threads=1).close()
        except LowbitError as error:
            assert "\n" not in str(error) and "bad.litertlm" in str(error)
            return error
        return None

    with pytest.raises(NotFound):
        LiteRtLm(tmp_path / "absent.litertlm")
    for cut in (0, 7, 20, 31, end - 1, 70_000):
        assert isinstance(refused(bytes(raw[:cut])), BadFile)
    assert isinstance(refused(b"GGUF" + bytes(raw[4:])), BadFile)
    for value in (0, 31, len(raw) + 1, 2**63):
        changed = bytearray(raw)
        struct.pack_into("<Q", changed, 24, value)
        assert isinstance(refused(bytes(changed)), BadFile)
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(60):
        changed = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(32, end)] = rng.integers(256)
        if _same_model(changed, raw, end):
            errors += refused(bytes(changed)) is not None
    assert errors > 5


def _same_model(changed: bytearray, raw: bytearray, end: int) -> bool:
    """Whether LiteRT would be given the same graph or none: on other bytes its own reader may die."""
    from litert_lm_builder import litertlm_header_schema_py_generated as schema

    def model(data: bytearray) -> tuple[int, int] | None:
        try:
            listed = schema.LiteRTLMMetaData.GetRootAs(bytes(data[32:end]), 0).SectionMetadata()
            objects = [listed.Objects(i) for i in range(min(listed.ObjectsLength(), 1000))]
            return next(((o.BeginOffset(), o.EndOffset()) for o in objects if o.DataType() == 3), None)
        except Exception:
            return None

    found = model(changed)
    return found is None or found == model(raw) or not 0 <= found[0] <= found[1] <= len(raw)
