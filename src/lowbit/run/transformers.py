"""transformers in this process: what Hugging Face folders, compressed-tensors folders and GGUF files mean in torch.

Of a GGUF every tensor is dequantized: torch computes with the values that the file stores, without the rounding of
activations that llama.cpp does. No code that comes with a model is run, and no pickle is read.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from lowbit.checkpoint import open_checkpoint, safetensors_file
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadConfig, BadFile, BadOption, LowbitError, NotFound, RuntimeFailed, Unsupported
from lowbit.run import _looks
from lowbit.run._hf_tokenizer import HfTokenized, load_tokenizer
from lowbit.run._llama_vocab import LlamaVocab
from lowbit.run.base import Suits, check_sizes, first_line
from lowbit.threads import available_cores, keep_freed_memory, wait_passively
from lowbit.units import MIB

DTYPES = ("float32", "float16", "bfloat16")
_LOGITS_BYTES = 128 * MIB


class Transformers(HfTokenized):
    """A causal language model of transformers. A context manager; close() frees the model.

    path:    a folder with config.json and safetensors (plain or compressed-tensors), or a GGUF of an architecture that
             transformers reads
    context: tokens a sequence may have; 0 means what the model was trained for
    ubatch:  tokens computed at a time; fewer where their logits would take more than 128 MiB
    threads: of torch, in the whole process; None means the physical cores this process may use
    dtype:   one of DTYPES: what is computed in; None means as stored (a GGUF's values in float32)
    device:  torch's name for it; None means 'cuda' where there is one, else 'cpu'

    Raises NotFound (no such artifact, torch or transformers not installed), BadFile, BadConfig, BadOption,
    RuntimeFailed.
    """

    name: ClassVar[str] = "transformers"

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        kind = _looks.folder_kind(target)
        if kind == "hugging-face":
            return Suits.BY_DEFAULT
        return Suits.BY_NAME if kind == "mlx-plain" or _looks.is_file_of(target, ".gguf", b"GGUF") else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        try:
            return f"transformers {metadata.version('transformers')}, torch {metadata.version('torch')}"
        except metadata.PackageNotFoundError:
            return None

    @classmethod
    def load_library(cls) -> None:
        _library()

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int = 512,
        ubatch: int = 512,
        threads: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.threads = available_cores() if threads is None else threads
        check_sizes(context=context, ubatch=ubatch, threads=self.threads)
        if dtype is not None and dtype not in DTYPES:
            raise BadOption("unknown dtype", found=dtype, expected=", ".join(DTYPES))
        _check_artifact(self.path)
        self._torch = _library()
        self._torch.set_num_threads(self.threads)
        self._device = device or ("cuda" if self._torch.cuda.is_available() else "cpu")
        self._model: Any = self._load(dtype)
        config = self._model.config.get_text_config()
        self.n_vocab: int = config.vocab_size
        self.context: int = context or config.max_position_embeddings
        self.ubatch = min(ubatch, self.context, max(1, _LOGITS_BYTES // (4 * self.n_vocab)))
        self._trims = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._cache: Any = None

    def close(self) -> None:
        self._model = self._cache = self._tokenizer = None

    @property
    def model_bytes(self) -> int:
        if self.path.is_dir():
            files = safetensors_file.open_folder(self.path)
            return sum(file.entries[name].n_bytes for name, file in files.items())
        return sum(entry.n_bytes for entry in GgufFile(self.path).entries.values())

    @property
    def n_weights(self) -> int | None:
        try:
            with open_checkpoint(self.path) as checkpoint:  # a packed matrix counts with its own shape
                return sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names)
        except LowbitError:  # a family that lowbit does not know
            self._check_open()
            packed = getattr(self._model.config, "quantization_config", None)
            return None if packed else sum(p.numel() for p in self._model.parameters())

    def logits(self, tokens: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """As Runtime.logits; memory is bounded by (ubatch, n_vocab)."""
        ids = self._fitting(tokens)
        self.reset()
        for begin in range(0, len(ids), self.ubatch):
            end = min(begin + self.ubatch, len(ids))
            first = max(begin, start)
            rows = self._rows(ids[begin:end], max(0, end - first))
            if end > first:
                yield first, rows

    def reset(self) -> None:
        self._check_open()
        self._cache = None

    def feed(self, ids: np.ndarray) -> np.ndarray:
        for begin in range(0, len(ids), self.ubatch):
            rows = self._rows(ids[begin : begin + self.ubatch], 1)
        return rows[-1]

    def _rows(self, ids: np.ndarray, outputs: int) -> np.ndarray:
        """Appends tokens to the sequence; logits of the last ``outputs`` of them, float32 (outputs, n_vocab)."""
        self._check_open()
        torch = self._torch
        given = torch.from_numpy(np.asarray(ids, np.int64)).to(self._device)[None]
        options = {"logits_to_keep": max(1, outputs)} if self._trims else {}
        try:
            with torch.inference_mode():
                made = self._model(given, past_key_values=self._cache, use_cache=True, **options)
                self._cache = made.past_key_values
                rows: np.ndarray = made.logits[0, made.logits.shape[1] - outputs :].float().cpu().numpy()
        except Exception as error:  # torch raises RuntimeError, IndexError and its own
            raise RuntimeFailed("transformers could not compute", where=self.path, found=first_line(error)) from error
        return rows

    def ends(self, token: int) -> bool:
        if super().ends(token):
            return True
        found = self._model.generation_config.eos_token_id if self._model is not None else None
        return token in (found if isinstance(found, list) else [found])

    def _load(self, dtype: str | None) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        folder, options = self.path, {"dtype": getattr(self._torch, dtype) if dtype else "auto"}
        if not self.path.is_dir():
            folder = self.path.parent
            options = {"dtype": self._torch.float32, "gguf_file": self.path.name} | (options if dtype else {})
        logging.disable_progress_bar()
        try:
            model = None if self.path.is_dir() else self._read_gguf()
            if model is None:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, **options
                ).eval()
            elif dtype:
                model = model.to(options["dtype"])
            return model.to(self._device)
        except LowbitError:
            raise
        except Exception as error:  # whatever a model class raises on a config or on weights that do not fit it
            raise BadFile(
                "transformers cannot load this", where=self.path, found=first_line(error),
                hint="Is it whole, and its architecture known to transformers?",
            ) from error  # fmt: skip

    def _read_gguf(self) -> Any:
        """The model of a GGUF, its file read by lowbit, float32; None of a family that lowbit does not know.

        transformers reads them too, but takes what GGUF does not store for its own defaults (Gemma 3's
        query_pre_attn_scalar), and needs twelve seconds for SmolLM2-135M where this needs one.
        """
        from lowbit.run import _hf_model

        try:
            checkpoint = open_checkpoint(self.path)
        except LowbitError:
            return None
        with checkpoint, contextlib.suppress(Unsupported):
            return _hf_model.load(checkpoint)
        return None

    def _load_tokenizer(self) -> Any:
        if self.path.is_dir():
            return load_tokenizer(self.path)
        try:
            return _GgufTokenizer(self.path)
        except LowbitError:  # a vocabulary that llama.cpp does not know
            return load_tokenizer(self.path.parent, gguf_file=self.path.name)

    def _check_open(self) -> None:
        if self._model is None:
            self._closed()

    def _fitting(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        self._check_open()
        return super()._fitting(tokens)


class _GgufTokenizer:
    """A GGUF's tokens as llama.cpp cuts them, asked as transformers' tokenizers are, whose own reading of a GGUF takes
    seconds."""

    def __init__(self, path: Path) -> None:
        self._vocab = LlamaVocab(path)
        self.bos_token_id, self.eos_token_id = self._vocab.bos, self._vocab.eos
        self.chat_template = self._vocab.chat_template

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool, **_: Any) -> SimpleNamespace:
        ids = self._vocab.tokenize(text, add_special=add_special_tokens, parse_special=not split_special_tokens)
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, **_: Any) -> str:
        return self._vocab.detokenize(ids, special=not skip_special_tokens)

    def get_chat_template(self) -> str | None:
        return self.chat_template


def _library() -> Any:
    wait_passively()
    keep_freed_memory()  # a tenth of a pass would be page faults
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        hint = "Run: pip install 'lowbit[train]'"
        raise NotFound("torch or transformers is not installed", found=error, hint=hint) from error
    return torch


def _check_artifact(path: Path) -> None:
    """A look at the headers: what lies about itself is not given to a library that believes it."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadFile("not a model folder", where=path, expected="config.json")
        read_json(path / "config.json", BadConfig)
        safetensors_file.open_folder(path)
    elif path.exists():
        GgufFile(path)
    else:
        raise NotFound("no such folder or file", where=path, expected="a Hugging Face folder or a GGUF")


RUNTIME = Transformers
