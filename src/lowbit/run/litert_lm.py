"""LiteRT-LM: logits of a .litertlm by the graph that it runs, its ``decode`` signature, token by token.

LiteRT-LM's own engine gives text only, and its scoring of texts was off by up to a nat. So the engine is asked for
what is its own, the tokenizer; and the graph is run in the LiteRT interpreter with the same CPU kernels. That is slower
than the engine, which reads prompts by another signature: speeds taken here would not be LiteRT-LM's, and ``measure``
leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lowbit.checkpoint.litert_library import llm_metadata
from lowbit.checkpoint.litertlm_file import MAGIC, METADATA, check_magic, read_header
from lowbit.errors import BadFile, BadOption, BadText, NotFound, RuntimeFailed, Unsupported
from lowbit.run import _looks, _tokens
from lowbit.run.base import Runtime, Suits, check_sizes, first_line
from lowbit.threads import available_cores

_ROWS = 64  # of logits at a time
_PACKAGES = ("litert-lm-api", "litert-lm-builder", "ai-edge-litert")


class LiteRtLm(Runtime):
    """A .litertlm file of one text model, on the CPU. A context manager; close() frees the model.

    path:    the file
    context: tokens a sequence may have, at most what the file's cache holds; 0 means that
    ubatch:  takes no effect: one token is computed at a time
    threads: None means the physical cores this process may use

    Raises NotFound (no such file, LiteRT-LM not installed), BadFile, BadOption, Unsupported (a model with an embedder
    of its own, or with inputs that are not known), RuntimeFailed.
    """

    name: ClassVar[str] = "litert-lm"
    generates_as_shipped: ClassVar[bool] = False
    path: Path

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        return Suits.BY_DEFAULT if _looks.is_file_of(target, ".litertlm", MAGIC) else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        try:
            return ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
        except metadata.PackageNotFoundError:
            return None

    @classmethod
    def load_library(cls) -> None:
        _library()

    def __init__(
        self, path: str | os.PathLike[str], *, context: int = 0, ubatch: int = 512, threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self.threads = available_cores() if threads is None else threads
        check_sizes(context=context, ubatch=ubatch, threads=self.threads)
        check_magic(self.path)
        self._lm, interpreter = _library()
        header = read_header(self.path)
        model = header.model(self.path)
        self._llm_metadata = next((self._read(s.begin, s.end) for s in header.sections if s.kind == METADATA), b"")
        try:
            self._interpreter: Any = interpreter(
                model_content=self._read(model.begin, model.end), num_threads=self.threads
            )
            self._decode: Any = self._interpreter.get_signature_runner("decode")
        except (ValueError, RuntimeError, KeyError) as error:
            raise BadFile("LiteRT cannot load the model", where=self.path, found=first_line(error)) from error
        self._engine: Any = None  # made when text is asked for
        self._read_signature(context)
        self.ubatch = 1
        self._caches: dict[str, np.ndarray] = {}
        self._past = 0

    def _read_signature(self, context: int) -> None:
        inputs, outputs = self._decode.get_input_details(), self._decode.get_output_details()
        caches = {name: detail for name, detail in inputs.items() if name.startswith("kv_cache_")}
        odd = sorted(set(inputs) - set(caches) - {"tokens", "input_pos", "mask"})
        if odd or "logits" not in outputs or not {"tokens", "input_pos", "mask"} <= set(inputs):
            found = ", ".join(odd) or ", ".join(sorted(inputs))
            raise Unsupported("the decode signature has other inputs than are known", where=self.path, found=found)
        self._cache_details = caches
        self._mask = inputs["mask"]
        self.n_vocab: int = int(outputs["logits"]["shape"][-1])
        room = int(self._mask["shape"][-1])
        if context > room:
            raise BadOption(
                "the file's cache is smaller than the context", where=self.path, found=f"{context} tokens",
                expected=f"at most {room}", hint="Ask for less (--chunk), or convert it with a longer cache",
            )  # fmt: skip
        self.context: int = context or room

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._interpreter = self._decode = None
        self._caches = {}

    # Text

    @property
    def bos(self) -> int:
        found = self._open_engine().bos_token_id
        return -1 if found is None else int(found)

    @property
    def eos(self) -> int:
        return next(iter(self._ends()), -1)

    @property
    def adds_bos(self) -> bool:
        return self.bos >= 0

    def ends(self, token: int) -> bool:
        return token in self._ends()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """As Runtime.tokenize, but the engine reads special tokens in every text: where that would make a difference
        and ``parse_special`` is False, Unsupported is raised."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadText("the text has a lone surrogate", where=f"character {error.start}") from None
        engine = self._open_engine()
        ids = [int(token) for token in engine.tokenize(text)] if text else []
        if not parse_special and (special := set(ids) & {self.bos, *self._ends()}):
            what = f"spells the control token {special.pop()} in every text that names it"
            self._cannot(what)
        return [self.bos, *ids] if add_special and self.adds_bos else ids

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The engine spells control tokens out; without ``special`` those of beginning and end are left out."""
        _tokens.check_ids(ids, self.n_vocab)
        hidden = set() if special else {self.bos, *self._ends()}
        kept = [int(token) for token in ids if int(token) not in hidden]
        return str(self._open_engine().detokenize(kept)) if kept else ""

    @property
    def chat_template(self) -> str | None:
        found = llm_metadata()
        try:
            found.ParseFromString(self._llm_metadata)
        except Exception as error:  # protobuf's own, by implementation
            raise BadFile("damaged metadata", where=self.path, found=first_line(error)) from error
        return found.jinja_prompt_template or None

    def _ends(self) -> list[int]:
        return [int(ids[0]) for ids in self._open_engine().eos_token_ids if len(ids) == 1]

    def _open_engine(self) -> Any:
        self._check_open()
        if self._engine is None:
            self._lm.set_min_log_severity(self._lm.LogSeverity.ERROR)
            try:
                backend = self._lm.Backend.CPU(thread_count=self.threads)
                self._engine = self._lm.Engine(str(self.path), backend=backend, cache_dir=":nocache")
            except Exception as error:  # RuntimeError and its own
                raise RuntimeFailed("LiteRT-LM cannot open it", where=self.path, found=first_line(error)) from error
        return self._engine

    # Running

    def logits(self, tokens: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """As Runtime.logits, a token at a time, in runs of at most 64 rows."""
        self._check_open()
        ids = self._fitting(tokens)
        self.reset()
        rows: list[np.ndarray] = []
        for i, token in enumerate(ids):
            row = self._step(int(token))
            if i >= start:
                rows.append(row)
            if rows and (len(rows) == _ROWS or i == len(ids) - 1):
                yield i - len(rows) + 1, np.stack(rows)
                rows = []

    def reset(self) -> None:
        self._check_open()
        self._caches = {n: np.zeros(d["shape"], d["dtype"]) for n, d in self._cache_details.items()}
        self._past = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        for token in ids:
            row = self._step(int(token))
        return row

    def _step(self, token: int) -> np.ndarray:
        """Appends one token; the logits after it, float32 (n_vocab,)."""
        self._check_open()
        shape, dtype = self._mask["shape"], self._mask["dtype"]
        seen = np.arange(shape[-1]) <= self._past
        mask = seen if dtype == np.bool_ else np.where(seen, 0.0, -np.inf).astype(dtype)
        try:
            made = self._decode(
                tokens=np.array([[token]], np.int32),
                input_pos=np.array([self._past], np.int32),
                mask=np.broadcast_to(mask, shape).copy(),
                **self._caches,
            )
        except (ValueError, RuntimeError) as error:
            raise RuntimeFailed("LiteRT could not compute", where=self.path, found=first_line(error)) from error
        self._caches = {name: made[name] for name in self._caches}
        self._past += 1
        return np.array(made["logits"], np.float32).reshape(-1)

    # The file

    def _read(self, begin: int, end: int) -> bytes:
        with open(self.path, "rb") as handle:
            handle.seek(begin)
            return handle.read(end - begin)

    def _check_open(self) -> None:
        if self._interpreter is None:
            self._closed()


def _library() -> tuple[Any, Any]:
    """(litert_lm, the interpreter's class)"""
    try:
        import litert_lm
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        hint = "Run: pip install 'lowbit[litert]'"
        raise NotFound("LiteRT-LM is not installed", found=error, hint=hint) from error
    return litert_lm, Interpreter


RUNTIME = LiteRtLm
