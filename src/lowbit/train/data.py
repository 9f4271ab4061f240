"""What the student learns from: text of the user's, or text that the reference writes itself.

Everything ends as token sequences: (n, sequence_length) int32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit import texts
from lowbit.errors import BadText, NotFound, Unsupported
from lowbit.train import sampling

_SAMPLING_BATCH = 64
_TEXT_KEYS = ("text", "content")
_SUFFIXES = (".txt", ".md", ".csv", ".json", ".jsonl", ".ndjson", ".parquet")  # of files, never of datasets ids


def bundled_sequences(tokenizer: Any, length: int) -> np.ndarray:
    """The bundled texts as (n, length) int32, their sequences taken in turn so that any prefix holds all of them."""
    each = [pack_sequences(tokenizer, [text], length) for text in texts.bundled()]
    shortest = min(len(sequences) for sequences in each)
    rest = [sequences[shortest:] for sequences in each]
    return np.concatenate([np.stack([s[:shortest] for s in each], axis=1).reshape(-1, length), *rest])


def load_sequences(source: str, tokenizer: Any, length: int, limit: int | None = None) -> np.ndarray:
    """The user's data as (n, length) int32.

    source: a text file, a JSONL file or Parquet file with a column ``text`` or ``messages``, or a datasets id.
    limit: sequences after which no more is read. Raises NotFound, BadText (empty, binary, wrong columns; with the
    line) or Unsupported.
    """
    sequences = pack_sequences(tokenizer, _documents(source, tokenizer), length, limit)
    if not len(sequences):
        raise BadText("too little text to train on", where=source, expected=f"at least {length} tokens")
    return sequences


def pack_sequences(tokenizer: Any, documents: Iterable[str], length: int, limit: int | None = None) -> np.ndarray:
    """Documents end to end, each after the model's start token if it has one, cut into (n, length) int32.

    A model with a start token was never without it, so every sequence begins with it, as measuring has it too.
    limit: the most sequences wanted; documents beyond it are not read.
    """
    start = start_token(tokenizer)
    tokens: list[int] = []
    for document in documents:
        of_document = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if start is not None and of_document[:1] != [start]:  # a chat template may have put it there
            tokens.append(start)
        tokens.extend(of_document)
        if limit is not None and len(tokens) >= limit * length:
            break
    n = len(tokens) // length
    n = n if limit is None else min(n, limit)
    return _started(np.array(tokens[: n * length], dtype=np.int32).reshape(n, length), start)


def _started(rows: np.ndarray, start: int | None) -> np.ndarray:
    if start is not None:
        rows[:, 0] = start
    return rows


def order(n: int, seed: int) -> np.ndarray:
    """A permutation of n: how sequences of several sources are mixed, and the order of the first epoch."""
    return np.random.default_rng(seed).permutation(n)


def start_token(tokenizer: Any) -> int | None:
    """What a document starts with: the token the tokenizer itself puts first, if it puts one."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    return int(whole[0]) if whole[: len(plain)] != plain else None


def sample(
    model: Any, tokenizer: Any, length: int, seconds: float, seed: int, *, agree: Callable[[bool], bool] = bool
) -> np.ndarray:
    """Sequences that the model writes itself, at temperature 1, in one batch within ``seconds``: (n, length) int32.

    Half of them start as a document, half as a conversation where the model has a chat template. What was not
    finished in time is cut off; rows of unfinished batches are joined into whole sequences. agree: as of ``write``.
    """
    generator = torch.random.fork_rng()
    batch = min(_SAMPLING_BATCH, max(2, _batch_for_memory(model.config, length)))
    with generator:
        torch.manual_seed(seed)
        prompts = _prompts(tokenizer, batch, length)
        device = next(model.parameters()).device
        written = [
            sampling.write(model, prompt.to(device), length, seconds * len(prompt) / batch, agree=agree).cpu()
            for prompt in prompts
        ]
    flat = np.concatenate([rows.numpy().reshape(-1) for rows in written]).astype(np.int32)
    n = len(flat) // length
    return _started(flat[: n * length].reshape(n, length), start_token(tokenizer))


def _prompts(tokenizer: Any, batch: int, length: int) -> list[torch.Tensor]:
    """Prompts of equal length together, shorter than ``length``: (n, prompt_length) int64 each."""
    first = next(
        (t for t in (start_token(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0
    )
    document = torch.full((batch, 1), first, dtype=torch.int64)
    if not getattr(tokenizer, "chat_template", None):
        return [document]
    mark = "\u2063"  # a character no template writes: what stands before it opens the user's turn
    try:
        opening = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False).split(mark)[0]
    except Exception:  # a template may raise what it likes, here at a conversation without a system message
        return [document]
    turn = tokenizer(opening, add_special_tokens=False)["input_ids"]
    if not 0 < len(turn) < length:
        return [document]
    return [document[: batch // 2], torch.tensor([turn] * (batch - batch // 2), dtype=torch.int64)]


def _batch_for_memory(config: Any, length: int) -> int:
    """Sequences whose float32 KV cache fits in 2 GiB."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int((2 << 30) // (2 * 4 * config.num_hidden_layers * heads * head_dim * length))


def _documents(source: str, tokenizer: Any) -> Iterator[str]:
    path = Path(source)
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises where a name is too long)
        yield from _from_datasets(source, tokenizer)
        return
    suffix = path.suffix.lower()
    if path.is_dir():
        raise Unsupported("a folder is not a data set", where=path, expected="a text file, JSONL or Parquet")
    if suffix in (".jsonl", ".ndjson"):
        yield from _from_jsonl(path, tokenizer)
    elif suffix == ".parquet":
        yield from _from_parquet(path, tokenizer)
    else:
        yield read_text(path)


def read_text(path: Path) -> str:
    """A UTF-8 text. Raises BadText where it is empty or binary."""
    raw = path.read_bytes()
    if not raw.strip():
        raise BadText("the text is empty", where=path, hint="Give a file with some prose in it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        expected, found = "UTF-8 text", f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise BadText("the text is binary", where=path, found=found, expected=expected) from error
    if "\0" in text:
        raise BadText("the text is binary", where=path, found=f"a NUL at character {text.index(chr(0))}")
    return text


def _from_jsonl(path: Path, tokenizer: Any) -> Iterator[str]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise BadText("the text is binary", where=where, expected="UTF-8 text") from error
            except (ValueError, RecursionError) as error:
                raise BadText("not JSON", where=where, found=str(error)) from error
            yield _document(record, tokenizer, where)


def _from_parquet(path: Path, tokenizer: Any) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        wanted = [name for name in ("messages", *_TEXT_KEYS) if name in file.schema_arrow.names]
        if not wanted:
            found = ", ".join(file.schema_arrow.names)
            raise BadText("no usable column", where=path, found=found, expected="text or messages")
        rows = (record for batch in file.iter_batches(batch_size=256, columns=wanted) for record in batch.to_pylist())
        for row, record in enumerate(rows):
            yield _document(record, tokenizer, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        raise BadText("not a readable Parquet file", where=path, found=str(error)) from error


def _from_datasets(source: str, tokenizer: Any) -> Iterator[str]:
    if "/" not in source or source.startswith((".", "/", "~")) or Path(source).suffix in _SUFFIXES:
        raise NotFound("no such file", where=source, hint="Give a text file, JSONL, Parquet or a datasets id")
    try:
        import datasets
    except ImportError as error:
        raise Unsupported("datasets is not installed", where=source, hint='pip install "lowbit[datasets]"') from error
    try:
        stream = datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:
        hint = "No such file either; check the id and the network, or give a local file"
        raise NotFound("cannot load this data set", where=source, found=type(error).__name__, hint=hint) from error
    for row, record in enumerate(_pulled(stream, source)):
        yield _document(record, tokenizer, f"{source}, row {row}")


def _pulled(stream: Iterable[Any], source: str) -> Iterator[Any]:
    """The records of a stream over the network."""
    try:
        yield from stream
    except GeneratorExit:
        raise
    except Exception as error:
        hint = "Check the network, or give a local file"
        raise NotFound("the data set broke off", where=source, found=type(error).__name__, hint=hint) from error


def _document(record: Any, tokenizer: Any, where: str) -> str:
    """The text of one record: its messages through the chat template, or its text."""
    text = _text_of(record, tokenizer, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape one, and no tokenizer takes it
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise BadText("half a surrogate pair", where=where, found=found, expected="Unicode text") from error
    return text


def _text_of(record: Any, tokenizer: Any, where: str) -> str:
    if isinstance(record, dict):
        if isinstance(record.get("messages"), list):
            try:
                return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
            except Exception as error:
                raise BadText("the chat template refuses these messages", where=where, found=str(error)) from error
        for key in _TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise BadText("no usable field", where=where, found=found, expected="text or messages")
