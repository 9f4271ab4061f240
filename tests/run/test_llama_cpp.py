from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy_llama import numpy_llama
from tiny_gguf import write_tiny

from lowbit.errors import BadFile, BadOption, BadText, NotFound, RuntimeFailed
from lowbit.run import _llama_h
from lowbit.run._sampling import sample
from lowbit.run.llama_cpp import KV_TYPES, LlamaCpp

TEXT = "Then the rain went in and the thing said nothing.\n" * 8


def all_logits(model: LlamaCpp, ids: list[int], start: int = 0) -> np.ndarray:
    return np.concatenate([rows for _, rows in model.logits(ids, start)])


def exact(path: Path, **options: object) -> LlamaCpp:
    return LlamaCpp(path, threads=1, kv_type="f32", flash_attention=False, **options)  # type: ignore[arg-type]


def test_logits_are_those_of_a_llama(tiny: Path) -> None:
    """Against the architecture written out in numpy from the file's own tensors."""
    with exact(tiny, context=256) as model:
        ids = model.tokenize(TEXT)[:100]
        found = all_logits(model, ids)
    np.testing.assert_allclose(found, numpy_llama(tiny, np.array(ids)), atol=2e-4)


@pytest.mark.parametrize(("ubatch", "rows"), [(512, None), (64, None), (37, None), (128, 5), (1, 1)])
def test_streaming_in_other_steps_gives_the_same_logits(tiny: Path, ubatch: int, rows: int | None) -> None:
    with exact(tiny, context=256) as model:
        ids = model.tokenize(TEXT)[:200]
        whole = all_logits(model, ids)
    with exact(tiny, context=256, ubatch=ubatch, logits_rows=rows) as model:
        offsets, parts = zip(*((o, len(p)) for o, p in model.logits(ids, 50)), strict=True)
        assert max(parts) <= min(ubatch, rows or ubatch)
        assert list(offsets) == [50 + done for done in itertools.accumulate(parts, initial=0)][:-1]
        np.testing.assert_allclose(all_logits(model, ids, 50), whole[50:], atol=1e-4)


def test_every_run_is_a_fresh_sequence_and_repeats_exactly(tiny: Path) -> None:
    with LlamaCpp(tiny, context=128, threads=1) as model:
        ids = model.tokenize(TEXT)[:90]
        first = all_logits(model, ids)
        list(model.generate(ids[:20], 10))
        assert np.array_equal(all_logits(model, ids), first)
        held = [rows for _, rows in model.logits(ids)]
        all_logits(model, ids[::-1])
        assert np.array_equal(np.concatenate(held), first)  # the caller's own, not llama.cpp's buffer


@pytest.mark.parametrize("kv_type", [name for name in KV_TYPES if name != "f32"])
def test_kv_types_run_and_stay_close(tiny: Path, kv_type: str) -> None:
    with exact(tiny, context=128) as model:
        ids = model.tokenize(TEXT)[:90]
        reference = all_logits(model, ids)
    with LlamaCpp(tiny, context=128, threads=1, kv_type=kv_type) as model:
        error = np.abs(all_logits(model, ids) - reference).max()
    assert error < (0.2 if kv_type.endswith("16") else 4.0)
    assert error > 0


def test_greedy_generation_is_the_argmax_of_the_logits(tiny: Path) -> None:
    with exact(tiny, context=128) as model:
        prompt = model.tokenize("the thing")
        made = list(model.generate(prompt, 12, ignore_end=True))
        logits = all_logits(model, prompt + made[:-1], len(prompt) - 1)
        assert made == logits.argmax(axis=1).tolist()
        assert list(model.generate(prompt, 12, ignore_end=True, stop={made[3]})) == made[: made.index(made[3])]


def test_generation_stops_where_the_context_is_full(tiny: Path) -> None:
    with LlamaCpp(tiny, context=32, threads=1, logits_all=False) as model:
        prompt = model.tokenize("the thing")
        assert len(list(model.generate(prompt, ignore_end=True))) == 32 - len(prompt) + 1


def test_sampling_is_seeded_and_keeps_to_top_k_and_top_p(tiny: Path) -> None:
    with LlamaCpp(tiny, context=64, threads=1) as model:
        runs = [list(model.generate([5, 6], 20, temperature=1.5, seed=s, ignore_end=True)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    rng = np.random.default_rng(0)
    seen = [sample(logits, rng, temperature=1, top_k=0, top_p=1) for _ in range(2000)]
    assert np.abs(np.bincount(seen, minlength=4) / 2000 - [0.5, 0.25, 0.15, 0.1]).max() < 0.05
    assert {sample(logits, rng, temperature=1, top_k=2, top_p=1) for _ in range(200)} == {0, 1}
    assert {sample(logits, rng, temperature=1, top_k=0, top_p=0.7) for _ in range(200)} == {0, 1}
    assert {sample(logits, rng, temperature=1, top_k=0, top_p=0.4) for _ in range(50)} == {0}
    assert sample(logits, rng, temperature=0, top_k=3, top_p=0.1) == 0


@pytest.mark.parametrize("text", ["", "a\tb  c   d", "你好 🙂 café", "<|im_start|>user", "a\0b", " lead", "\r\n\n"])
def test_text_survives_tokenization(tiny: Path, text: str) -> None:
    with LlamaCpp(tiny, context=64, threads=1) as model:
        ids = model.tokenize(text)
        assert b"".join(model.piece(i) for i in ids).decode() == text
        assert model.detokenize(ids) == text
        assert not {0, 1, 2} & set(ids)  # text that looks like a control token is text
    assert len(ids) <= len(text.encode())


def test_special_tokens_are_parsed_only_on_request(tiny: Path) -> None:
    with LlamaCpp(tiny, context=64, threads=1) as model:
        assert model.tokenize("<|im_end|>", parse_special=True) == [2]
        assert model.ends(2)
        assert not model.ends(10)


def test_bos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    with LlamaCpp(write_tiny(tmp_path / "bos.gguf", add_bos=True), context=64, threads=1) as model:
        assert model.adds_bos
        assert model.tokenize("in")[0] == model.bos == 1
        assert 1 not in model.tokenize("in", add_special=False)


def test_chat_renders_the_template_of_the_file(tiny: Path) -> None:
    with LlamaCpp(tiny, context=128, threads=1) as model:
        prompt = model.prompt_of([{"role": "user", "content": "the rain"}])
        assert model.detokenize(prompt, special=True) == "<|im_start|>user\nthe rain<|im_end|>\n<|im_start|>assistant\n"
        answer = "".join(model.chat([{"role": "user", "content": "the rain"}], 8))
        assert answer == b"".join(model.piece(t) for t in model.generate(prompt, 8)).decode("utf-8", "replace")


def test_a_template_that_spells_bos_gets_only_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    with LlamaCpp(write_tiny(tmp_path / "t.gguf", add_bos=True, template=template), context=64, threads=1) as model:
        assert model.prompt_of([{"role": "user", "content": "in"}]).count(1) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{% for x in %}",
        "{{ undefined_name.field }}",
    ],
)
def test_a_hostile_or_broken_template_is_a_bad_file(tmp_path: Path, template: str) -> None:
    with (
        LlamaCpp(write_tiny(tmp_path / "t.gguf", template=template), context=64, threads=1) as model,
        pytest.raises(BadFile, match="chat template"),
    ):
        model.prompt_of([{"role": "user", "content": "in"}])


def test_what_a_template_refuses_is_the_users_mistake(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "t.gguf", template="{{ raise_exception('roles must alternate') }}")
    with LlamaCpp(path, context=64, threads=1) as model, pytest.raises(BadOption, match="refuses") as error:
        model.prompt_of([{"role": "user", "content": "in"}])
    assert "roles must alternate" in str(error.value)


def test_no_template_says_so(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "t.gguf", template=None)
    with LlamaCpp(path, context=64, threads=1) as model, pytest.raises(BadFile, match="no chat template"):
        next(model.chat([{"role": "user", "content": "in"}]))


def test_bad_files_are_one_line(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    for n in (0, 3, 24, 2000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(BadFile) as error:
            LlamaCpp(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)
        assert "cut.gguf" in str(error.value)
    with pytest.raises(NotFound):
        LlamaCpp(tmp_path / "absent.gguf")
    with pytest.raises(BadFile, match="cannot be read"):
        LlamaCpp(tmp_path)
    (tmp_path / "arch.gguf").write_bytes(whole.replace(b"llama", b"lhama"))
    with pytest.raises(BadFile, match="cannot load"):
        LlamaCpp(tmp_path / "arch.gguf")


def test_metadata_that_llama_cpp_dies_of_is_a_bad_file(tiny: Path, tmp_path: Path) -> None:
    """An absurd number of layers makes llama.cpp abort its process; ours must live on."""
    raw = tiny.read_bytes()
    key = b"llama.block_count"
    at = raw.index(key) + len(key) + 4
    (tmp_path / "lies.gguf").write_bytes(raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :])
    with pytest.raises(BadFile, match="dies of this file") as error:
        LlamaCpp(tmp_path / "lies.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type": "q3_k"},
        {"kv_type": "q8_0", "flash_attention": False},
        {"threads": 0},
        {"context": -1},
        {"ubatch": 0},
    ],
)
def test_impossible_options_are_refused(tiny: Path, options: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        LlamaCpp(tiny, **options)  # type: ignore[arg-type]


def test_impossible_calls_are_refused(tiny: Path) -> None:
    with LlamaCpp(tiny, context=32, threads=1) as model:
        for ids in ([], [0] * 33, [-1], [model.n_vocab]):
            with pytest.raises(BadOption):
                next(model.logits(ids))
        with pytest.raises(BadText):
            model.tokenize("\ud800")
        with pytest.raises(BadOption):
            next(model.generate([1], temperature=-1))
    with pytest.raises(RuntimeFailed, match="closed"):
        model.tokenize("in")
    with LlamaCpp(tiny, context=32, threads=1, logits_all=False) as model, pytest.raises(BadOption):
        next(model.logits([1]))


def test_another_layout_of_the_library_is_refused() -> None:
    params = _llama_h.load().lib.llama_context_default_params()
    params.n_batch = 77
    with pytest.raises(RuntimeFailed, match="laid out differently") as error:
        _llama_h.check("llama_context_params", params, _llama_h._CONTEXT_DEFAULTS)
    assert "n_batch = 77" in str(error.value)


def test_another_release_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_llama_h.metadata, "version", lambda name: "2027.1.1")
    with pytest.raises(RuntimeFailed, match="laid out differently"):
        _llama_h.load.__wrapped__()


def test_the_real_model_speaks(smollm2: Path) -> None:
    with LlamaCpp(smollm2, context=256, logits_all=False) as model:
        assert model.n_vocab == 49152
        assert model.n_weights == 134_515_008
        assert model.metadata["general.architecture"] == "llama"
        assert "Paris" in model.detokenize(list(model.generate(model.tokenize("The capital of France is"), 6)))
        assert "4" in "".join(model.chat([{"role": "user", "content": "What is 2+2?"}], 24))
