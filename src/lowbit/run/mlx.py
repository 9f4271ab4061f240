"""MLX in this process: full-vocabulary logits from a folder that mlx-lm loads.

MLX runs where it likes: on a Mac's GPU, on Linux on the CPU, there on one thread and with a plain BLAS. In 16 bits its
CPU kernels add up in 16 bits too; ``dtype="float32"`` computes on the same weights without that.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lowbit.checkpoint import safetensors_file
from lowbit.checkpoint.model import read_json
from lowbit.errors import BadConfig, BadFile, BadOption, NotFound, RuntimeFailed, Unsupported
from lowbit.run import _looks
from lowbit.run._hf_tokenizer import HfTokenized
from lowbit.run.base import Suits, check_sizes, first_line

DTYPES = ("float32", "float16", "bfloat16")
_KV_BITS, _KV_GROUPS = ("2", "3", "4", "5", "6", "8"), ("32", "64", "128")


class Mlx(HfTokenized):
    """An MLX model, loaded and ready to run. A context manager; close() frees the model.

    path:    the folder
    context: tokens a sequence may have; 0 means what the model was trained for
    ubatch:  tokens computed at a time
    threads: of the CPU backend, which has one a model: None or 1
    dtype:   one of DTYPES: what scales, biases, norms and activations are turned into before anything is computed;
             None leaves them as the folder has them

    Raises NotFound (no such folder, MLX not installed), BadFile, BadConfig, BadOption, RuntimeFailed.
    """

    name: ClassVar[str] = "mlx"
    uses_threads: ClassVar[bool] = False  # nor counts them on a GPU

    @classmethod
    def suits(cls, target: str | os.PathLike[str]) -> Suits:
        kind = _looks.folder_kind(target)
        # mlx-lm also loads what is not quantized as it comes from the hub.
        return Suits.BY_DEFAULT if kind in ("mlx", "mlx-plain") else Suits.BY_NAME if kind else Suits.NO

    @classmethod
    def installed(cls) -> str | None:
        try:
            return f"mlx {metadata.version('mlx')}, mlx-lm {metadata.version('mlx-lm')}"
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
    ) -> None:
        self.path = Path(path)
        _check_options(context, ubatch, threads, dtype)
        config = _check_folder(self.path)
        self._mx = _library()
        self.threads = 1
        self._model: Any = self._load(dtype)
        self._cache: Any = None  # of the sequence that feed() goes on with
        self._parent: Mlx | None = None
        self._kv: tuple[int, int] | None = None  # bits and group size of the cache
        self.context: int = context or _size(config, "max_position_embeddings", self.path)
        self.n_vocab: int = _size(config, "vocab_size", self.path)
        self.ubatch = min(ubatch, self.context)

    def beside(self, *, kv_type: str) -> Self:
        """As Runtime.beside. kv_type: f16, which is the model's own dtype, or q<bits>_g<group size> (mlx-lm's --kv-bits
        and --kv-group-size), for which a model with sliding windows has no room in mlx-lm."""
        bits, _, group = kv_type.removeprefix("q").partition("_g")
        if kv_type != "f16" and (kv_type[0] != "q" or bits not in _KV_BITS or group not in _KV_GROUPS):
            expected = f"f16, or q<bits>_g<group size>, bits {', '.join(_KV_BITS)}, groups {', '.join(_KV_GROUPS)}"
            raise BadOption("MLX has no such KV cache", found=kv_type, expected=expected)
        twin = copy.copy(self)
        twin._cache, twin._parent = None, self
        twin._kv = None if kv_type == "f16" else (int(bits), int(group))
        twin.reset()
        return twin

    @property
    def cache_bytes(self) -> int | None:
        return sum(layer.nbytes for layer in self._cache) if self._cache else None

    def close(self) -> None:
        self._model = self._cache = self._tokenizer = None
        self._mx.clear_cache()

    @property
    def model_bytes(self) -> int:
        return sum(array.nbytes for _, array in self._arrays())

    @property
    def n_weights(self) -> int:
        """Of a quantized matrix its weights; scales and biases of groups are none."""
        bits = {name: module.bits for name, module in self._open_model().named_modules() if hasattr(module, "bits")}
        count = 0
        for name, array in self._arrays():
            owner, _, kind = name.rpartition(".")
            if owner not in bits:
                count += array.size
            elif kind == "weight":
                count += array.nbytes * 8 // bits[owner]
        return count

    def _arrays(self) -> list[tuple[str, Any]]:
        from mlx.utils import tree_flatten

        flat: Any = tree_flatten(self._open_model().parameters())
        return list(flat)

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
        from mlx_lm.models.cache import make_prompt_cache

        self._cache = make_prompt_cache(self._open_model())
        if self._kv is not None:
            bits, group = self._kv
            try:
                self._cache = [layer.to_quantized(group_size=group, bits=bits) for layer in self._cache]
            except NotImplementedError as error:
                what = "MLX does not quantize the KV cache of a sliding window"
                raise Unsupported(what, where=self.path, found=error, expected="f16") from error

    def feed(self, ids: np.ndarray) -> np.ndarray:
        for begin in range(0, len(ids), self.ubatch):
            rows = self._rows(ids[begin : begin + self.ubatch], 1)
        return rows[-1]

    def _rows(self, ids: np.ndarray, outputs: int) -> np.ndarray:
        """Appends tokens to the sequence; logits of the last ``outputs`` of them, float32 (outputs, n_vocab)."""
        mx, model = self._mx, self._open_model()
        try:
            rows = model(mx.array(ids)[None], cache=self._cache)[0, len(ids) - outputs :].astype(mx.float32)
            mx.eval(rows, [layer.state for layer in self._cache])
        except Exception as error:  # MLX raises ValueError, RuntimeError and its own
            raise RuntimeFailed("MLX could not compute", where=self.path, found=first_line(error)) from error
        return np.array(rows)

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
                "MLX cannot load this folder", where=self.path, found=first_line(error),
                hint="Is the folder whole, and its model_type known to mlx-lm?",
            ) from error  # fmt: skip
        return model

    def _open_model(self) -> Any:
        self._check_open()
        return self._model

    def _check_open(self) -> None:
        if self._model is None or (self._parent is not None and self._parent._model is None):
            self._closed()

    def _fitting(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        self._check_open()
        return super()._fitting(tokens)


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
    check_sizes(context=context, ubatch=ubatch)
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


RUNTIME = Mlx
