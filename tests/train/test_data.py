"""What the student learns from: a source becomes the right tokens, an unusable one a sentence that says where."""

from __future__ import annotations

import copy
import json
import lzma
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lowbit import texts
from lowbit.errors import BadText, LowbitError, NotFound, Unsupported
from lowbit.train import data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TALK = [{"role": "user", "content": "What is a block?"}, {"role": "assistant", "content": "32 weights, one scale."}]
TALK_TEXT = "<|im_start|>user\nWhat is a block?<|im_end|>\n<|im_start|>assistant\n32 weights, one scale.<|im_end|>\n"
TEXTS = ["The first document of three.", "And the second.\nOf two lines, with an é.", "The third."]


@pytest.fixture(scope="module")
def tiny(save_tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model and its tokenizer of bytes, which puts no token first."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    model = save_tiny_llama(folder, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TURNS
    return model, tokenizer


@pytest.fixture
def tokenizer(tiny: tuple[Any, Any]) -> Any:
    return copy.deepcopy(tiny[1])


@pytest.fixture
def starting_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer, but one that puts <|im_start|> first."""
    from tokenizers.processors import TemplateProcessing

    start = ("<|im_start|>", 1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    return tokenizer


def tokens_of(tokenizer: Any, *texts: str) -> list[int]:
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def expected_sequences(tokens: list[int], length: int) -> np.ndarray:
    n = len(tokens) // length
    assert n > 1, "the test's own text is too short"
    return np.array(tokens[: n * length]).reshape(n, length)


def write_jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, **columns: list[Any]) -> str:
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)


def test_a_text_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prose.md"
    path.write_text("\ufeff" + "\n".join(TEXTS), encoding="utf-8")  # with the mark that some editors write first
    got = data.load_sequences(str(path), tokenizer, 8)
    same(got, expected_sequences(tokens_of(tokenizer, "\n".join(TEXTS)), 8))


@pytest.mark.parametrize("key", ["text", "content"])
def test_jsonl_of_texts(key: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n\n".join(json.dumps({"id": 7, key: text}) for text in TEXTS), encoding="utf-8")
    got = data.load_sequences(str(path), tokenizer, 8)
    same(got, expected_sequences(tokens_of(tokenizer, *TEXTS), 8))


def test_jsonl_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "talk.jsonl", {"messages": TALK, "text": "not this"}, {"text": TEXTS[0]})
    got = data.load_sequences(source, tokenizer, 8)
    same(got, expected_sequences(tokens_of(tokenizer, TALK_TEXT, TEXTS[0]), 8))


def test_parquet_of_texts(tokenizer: Any, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "texts.parquet", id=[1, 2, 3], text=TEXTS)
    same(data.load_sequences(source, tokenizer, 8), expected_sequences(tokens_of(tokenizer, *TEXTS), 8))


def test_parquet_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "talk.parquet", text=["not this", "nor this"], messages=[TALK, TALK[:1]])
    first_turn = TALK_TEXT.partition("<|im_end|>\n")[0] + "<|im_end|>\n"
    got = data.load_sequences(source, tokenizer, 8)
    same(got, expected_sequences(tokens_of(tokenizer, TALK_TEXT, first_turn), 8))


def test_a_document_starts_as_the_tokenizer_starts_it(starting_tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "both.jsonl", {"text": TEXTS[0]}, {"messages": TALK}, {"text": TEXTS[1]})
    got = data.load_sequences(source, starting_tokenizer, 8)
    # The chat template has put the token there already: it is not doubled.
    one_by_one = [[1], tokens_of(starting_tokenizer, TEXTS[0], TALK_TEXT), [1], tokens_of(starting_tokenizer, TEXTS[1])]
    expected = expected_sequences([token for part in one_by_one for token in part], 8)
    expected[:, 0] = 1  # and every sequence is read from a start, as measuring reads its chunks
    assert len(expected) > 3
    same(got, expected)


BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    # name: (file name, content, in the message, in where)
    "empty": ("a.txt", b"", "empty", "a.txt"),
    "blank": ("a.txt", b" \n\t\n", "empty", "a.txt"),
    "not utf-8": ("a.txt", b"good start \xff\xfe bad end", "0xff at offset 11", "a.txt"),
    "with a nul": ("a.txt", b"good start\0" * 40, "binary", "a.txt"),
    "too short": ("a.txt", b"short", "at least 16 tokens", "a.txt"),
    "empty jsonl": ("a.jsonl", b"\n\n", "at least 16 tokens", "a.jsonl"),
    "not json": ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', "not JSON", "a.jsonl, line 3"),
    "nested json": ("a.jsonl", b'{"text": "fine"}\n' + b"[" * 100_000, "not JSON", "a.jsonl, line 2"),
    "binary jsonl": ("a.ndjson", b'{"text": "fine"}\n{"text": "\xff"}\n', "binary", "a.ndjson, line 2"),
    "no field": ("a.jsonl", b'{"text": "fine"}\n{"prompt": "x", "n": 1}\n', "found prompt, n", "a.jsonl, line 2"),
    "no object": ("a.jsonl", b'["text"]\n', "found list", "a.jsonl, line 1"),
    "half a pair": ("a.jsonl", b'{"text": "ok"}\n{"text": "a\\ud800b"}\n', "U+D800 at character 1", "a.jsonl, line 2"),
    "no string": ("a.jsonl", b'{"text": 5}\n', "no usable field", "a.jsonl, line 1"),
    "not parquet": ("a.parquet", b"PAR1 but nothing else in it", "not a readable Parquet file", "a.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name: str, tokenizer: Any, tmp_path: Path) -> None:
    file_name, content, message, where = BAD_FILES[name]
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(BadText) as caught:
        data.load_sequences(str(tmp_path / file_name), tokenizer, 16)
    assert message in str(caught.value)
    assert str(caught.value.where) == str(tmp_path / where)


def test_parquet_without_a_usable_column(tokenizer: Any, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", prompt=["a"], answer=["b"])
    with pytest.raises(BadText, match="found prompt, answer; expected text or messages"):
        data.load_sequences(source, tokenizer, 16)


def test_parquet_with_a_damaged_page(tokenizer: Any, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", text=[f"{n} and some more " * 9 for n in range(2000)])
    raw = bytearray(Path(source).read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(range(64))
    Path(source).write_bytes(raw)
    with pytest.raises(BadText, match="not a readable Parquet file"):
        data.load_sequences(source, tokenizer, 16)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_record_without_messages_has_its_text(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    path, messages, texts = tmp_path / f"a.{kind}", [TALK, None], ["not this", TEXTS[1]]
    if kind == "parquet":
        source = write_parquet(path, messages=messages, text=texts)
    else:
        source = write_jsonl(path, *({"messages": m, "text": t} for m, t in zip(messages, texts, strict=True)))
    expected = expected_sequences(tokens_of(tokenizer, TALK_TEXT, TEXTS[1]), 8)
    same(data.load_sequences(source, tokenizer, 8), expected)


def test_parquet_with_a_hole(tokenizer: Any, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", text=["fine", None])
    with pytest.raises(BadText, match=r"a\.parquet, row 1"):
        data.load_sequences(source, tokenizer, 16)


def test_messages_that_the_template_refuses(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = write_jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"messages": TALK})
    with pytest.raises(BadText, match=r"a\.jsonl, line 2.*roles must alternate"):
        data.load_sequences(source, tokenizer, 16)


@pytest.mark.parametrize(
    "name", ["missing", *(f"{folder}missing.{kind}" for folder in ("", "data/") for kind in ("txt", "md", "jsonl"))]
)
def test_a_missing_file(name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (name, f"./{name}", str(tmp_path / name)):
        with pytest.raises(NotFound, match="no such file") as caught:
            data.load_sequences(source, tokenizer, 16)
        assert caught.value.where == source


def test_a_folder(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="a folder is not a data set") as caught:
        data.load_sequences(str(tmp_path), tokenizer, 16)
    assert isinstance(caught.value, LowbitError)
    assert caught.value.exit_code == 2


def test_no_document_is_read_beyond_the_limit(tokenizer: Any) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "x" * 25  # 25 tokens

    got = data.pack_sequences(tokenizer, endless(), 10, limit=6)
    assert got.shape == (6, 10)
    assert read == 3


def test_what_stands_behind_the_limit_does_no_harm(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a good line " * 20}) + "\nnot JSON\n", encoding="utf-8")
    assert data.load_sequences(str(path), tokenizer, 16, limit=3).shape == (3, 16)
    with pytest.raises(BadText):
        data.load_sequences(str(path), tokenizer, 16, limit=300)


def test_any_prefix_of_the_bundled_text_holds_all_of_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each: list[np.ndarray] = []
    packed: list[str] = []

    def pack(tokenizer: Any, documents: list[str], length: int) -> np.ndarray:
        packed.extend(documents)
        each.append(pack_sequences(tokenizer, documents, length))
        return each[-1]

    pack_sequences = data.pack_sequences
    monkeypatch.setattr(data, "pack_sequences", pack)
    got = data.bundled_sequences(tokenizer, 4096)
    raws = [resources.files("lowbit").joinpath("data", name).read_bytes() for name, _, _ in texts.BUNDLED]
    assert packed == [lzma.decompress(raw).decode("utf-8") for raw in raws]
    source_of = {row.tobytes(): i for i, rows in enumerate(each) for row in rows}
    sources = [source_of[row.tobytes()] for row in got]
    assert got.dtype == np.int32
    assert sorted(row.tobytes() for row in got) == sorted(row.tobytes() for rows in each for row in rows)
    shortest = min(len(rows) for rows in each)
    assert shortest > 1
    for n in range(len(each), shortest * len(each) + 1):
        counts = np.bincount(sources[:n], minlength=len(each))
        assert counts.max() - counts.min() <= 1


def test_sampling_is_deterministic_by_seed(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    before = torch.get_rng_state()
    first, again, other = (data.sample(model, tokenizer, 12, seconds=120.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == np.int32
    assert first.ndim == 2 and first.shape[1] == 12 and len(first) > 1
    assert first.min() >= 0 and first.max() < model.config.vocab_size
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first[:, -1])) > 2  # not one sequence over and over


def test_half_of_what_is_sampled_is_conversation(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    got = data.sample(model, tokenizer, 12, seconds=120.0, seed=0)
    opening = tokens_of(tokenizer, "<|im_start|>user\n")
    opens_a_turn = (got[:, : len(opening)] == opening).all(1)
    assert opens_a_turn.sum() == len(got) // 2
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    got = data.sample(model, plain, 12, seconds=120.0, seed=0)
    assert (got[:, 0] == tokenizer.bos_token_id).all()


def test_sequences_shorter_than_the_opening_of_a_turn_are_documents(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    length = len(tokens_of(tokenizer, "<|im_start|>user\n"))
    got = data.sample(model, tokenizer, length, seconds=120.0, seed=0)
    assert got.shape[1] == length
    assert (got[:, 0] == tokenizer.bos_token_id).all()


def test_sampling_that_ran_out_of_time_gives_whole_sequences(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    whole = data.sample(model, tokenizer, 64, seconds=120.0, seed=0)
    cut = data.sample(model, tokenizer, 64, seconds=1e-6, seed=0)
    assert cut.shape[1] == 64
    assert 0 < len(cut) < len(whole)
