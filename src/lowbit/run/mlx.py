"""MLX in this process: full-vocabulary logits from a folder that mlx-lm loads.

MLX runs where it likes: on a Mac's GPU, on Linux on the CPU, there on one thread and with a plain BLAS. In 16 bits its
CPU kernels add up in 16 bits too; ``dtype="float32"`` computes on the same weights without that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from lowbit.checkpoint import safetensors_file
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadConfig, BadFile, BadOption, BadText, NotFound, RuntimeFailed
from lowbit.run import _tokens

DTYPES = ("float32", "float16", "bfloat16")


class Mlx:
    """An MLX model, loaded and ready to run. A context manager; close() frees the model.

    path:    the folder
    context: tokens a sequence may have; 0 means what the model was trained for
    ubatch:  tokens computed at a time
    threads: of the CPU backend, which has one a model: None or 1
    dtype:   one of DTYPES: what scales, biases, norms and activations are turned into before anything is computed;
             None leaves them as the folder has them

    Raises NotFound (no such folder, MLX not installed), BadFile, BadConfig, BadOption, RuntimeFailed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int = 512,
        ubatch: int = 512,
        threads: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self.path = Path(path)
        _check_options(context, ubatch, threads, dtype)
        config = _check_folder(self.path)
        self._mx = _library()
        self.threads = 1
        self._model: Any = self._load(dtype)
        self._tokenizer: Any = None  # read when it is asked for
        self.context: int = context or _size(config, "max_position_embeddings", self.path)
        self.n_vocab: int = _size(config, "vocab_size", self.path)
        self.ubatch = min(ubatch, self.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._model = self._tokenizer = None
        self._mx.clear_cache()

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text; ``add_special`` puts BOS (and EOS) where the model's tokenizer does."""
        self._open_model()
        if self._tokenizer is None:
            from mlx_lm.utils import load_tokenizer

            try:
                self._tokenizer = load_tokenizer(self.path)
            except Exception as error:  # transformers raises its own, OSError, ValueError, KeyError, ...
                raise BadFile("MLX cannot load the tokenizer", where=self.path, found=_first_line(error)) from error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadText("the text has a lone surrogate", where=f"character {error.start}") from None
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=add_special)]

    def logits(self, tokens: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Full-vocabulary logits of a fresh sequence, streamed: (offset, float32 (k, n_vocab)) for consecutive runs.

        Row i of a run belongs to position offset + i and predicts the token at offset + i + 1. Only positions from
        ``start`` on are given. Memory is bounded by (ubatch, n_vocab).
        """
        from mlx_lm.models.cache import make_prompt_cache

        mx, model = self._mx, self._open_model()
        ids = _tokens.fitting(tokens, self.n_vocab, self.context, self.path)
        cache = make_prompt_cache(model)
        for begin in range(0, len(ids), self.ubatch):
            end = min(begin + self.ubatch, len(ids))
            first = max(begin, start)
            try:
                rows = model(mx.array(ids[begin:end])[None], cache=cache)[0, first - begin :].astype(mx.float32)
                mx.eval(rows, [layer.state for layer in cache])
            except Exception as error:  # MLX raises ValueError, RuntimeError and its own
                raise RuntimeFailed("MLX could not compute", where=self.path, found=_first_line(error)) from error
            if end > first:
                yield first, np.array(rows)

    def _load(self, dtype: str | None) -> Any:
        from mlx_lm.utils import load_model

        try:
            # A config may name a Python file to run (model_file): without trust_remote_code mlx-lm refuses it.
            model, _ = load_model(self.path, trust_remote_code=False)
            if dtype is not None:
                model.set_dtype(getattr(self._mx, dtype))
                self._mx.eval(model.parameters())
        except Exception as error:  # whatever a model class raises on a config or on weights that do not fit it
            raise BadFile(
                "MLX cannot load this folder", where=self.path, found=_first_line(error),
                hint="Is the folder whole, and its model_type known to mlx-lm?",
            ) from error  # fmt: skip
        return model

    def _open_model(self) -> Any:
        if self._model is None:
            raise RuntimeFailed("this model was closed", where=self.path)
        return self._model


def _library() -> Any:
    try:
        import mlx.core as mx
        import mlx_lm.utils  # noqa: F401 - it raises where the process may not open as many files as it wants
    except ImportError as error:
        raise NotFound("MLX is not installed", found=error, hint="Run: pip install 'lowbit[mlx]'") from error
    except (ValueError, OSError) as error:
        raise RuntimeFailed(
            "mlx-lm does not start", found=error, hint="Raise the limit on open files: ulimit -n"
        ) from error
    if mx.default_device().type == mx.DeviceType.cpu:
        # There it would compile kernels into /tmp/mlx with g++, and run what anybody has put there under that name.
        mx.disable_compile()
    return mx


def _check_options(context: int, ubatch: int, threads: int | None, dtype: str | None) -> None:
    for name, value, least in (("context", context, 0), ("ubatch", ubatch, 1)):
        if value < least:
            raise BadOption(f"impossible {name}", found=value, expected=f"at least {least}")
    if threads not in (None, 1):
        raise BadOption("MLX computes on one CPU thread", found=f"threads {threads}", expected="1")
    if dtype is not None and dtype not in DTYPES:
        raise BadOption("unknown dtype", found=dtype, expected=", ".join(DTYPES))


def _check_folder(path: Path) -> dict[str, Any]:
    """config.json, after a look at the headers: MLX believes what a file says of itself."""
    if not path.is_dir():
        raise NotFound("no such folder", where=path, expected="an MLX model", hint="lowbit pack --to mlx makes one")
    if not (path / "config.json").is_file():
        raise BadFile("not a model folder", where=path, expected="config.json")
    config = read_json(path / "config.json", BadConfig)
    safetensors_file.open_folder(path)
    return config


def _size(config: dict[str, Any], key: str, path: Path) -> int:
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    if not isinstance(value, int) or value < 1:
        raise BadConfig(f"bad value for {key}", where=path / "config.json", found=repr(value)[:60])
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
