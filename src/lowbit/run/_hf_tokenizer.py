"""The text side of every runtime whose artifact is a folder with a Hugging Face tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.checkpoint.model import read_json
from lowbit.errors import BadConfig, BadFile, BadText, LowbitError, NotFound
from lowbit.run import _tokens
from lowbit.run.base import Runtime, first_line


class HfTokenized(Runtime):
    """Reads the tokenizer when it is first asked for. No code that comes with a folder is run."""

    path: Path
    _tokenizer: Any = None

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadText("the text has a lone surrogate", where=f"character {error.start}") from None
        encoded = self._opened_tokenizer()(
            text, add_special_tokens=add_special, split_special_tokens=not parse_special, verbose=False
        )
        return [int(token) for token in encoded.input_ids]

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        _tokens.check_ids(ids, self.n_vocab)
        text = self._opened_tokenizer().decode(
            [int(token) for token in ids], skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(text)

    @property
    def bos(self) -> int:
        return _id(self._opened_tokenizer().bos_token_id)

    @property
    def eos(self) -> int:
        return _id(self._opened_tokenizer().eos_token_id)

    @property
    def adds_bos(self) -> bool:
        return self.bos >= 0 and self.tokenize("a")[:1] == [self.bos]

    def ends(self, token: int) -> bool:
        return token in self._ends

    @property
    def chat_template(self) -> str | None:
        tokenizer = self._opened_tokenizer()
        if not tokenizer.chat_template:
            return None
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several by name, and none is the default
            raise BadFile("which chat template?", where=self.path, found=first_line(error)) from None

    def _opened_tokenizer(self) -> Any:
        self._check_open()
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
            self._ends = {self.eos, *ends_of(self.path)}
        return self._tokenizer

    def _check_open(self) -> None:
        """Raises RuntimeFailed where the model was closed."""

    def _load_tokenizer(self) -> Any:
        return load_tokenizer(self.path)


def load_tokenizer(path: Path, **options: Any) -> Any:
    """transformers' tokenizer of a folder. Raises BadFile."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise NotFound("transformers is not installed", found=error, hint="Run: pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # transformers raises its own, OSError, ValueError, KeyError, ...
        raise BadFile("the tokenizer cannot be loaded", where=path, found=first_line(error)) from error


def ends_of(path: Path) -> set[int]:
    """The ids that end generation, as generation_config.json and config.json have them."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not (path / name).is_file():
            continue
        with contextlib.suppress(LowbitError):
            value = read_json(path / name, BadConfig).get("eos_token_id")
            found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


def _id(value: Any) -> int:
    return value if isinstance(value, int) else -1
