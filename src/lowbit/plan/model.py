"""What a plan is made of: a model's layers, tensors and caches, from a config, a hub id or a file's header. No weight
is read.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowbit import grid as grids
from lowbit import recipe as recipes
from lowbit.checkpoint import families, safetensors_file, schemes
from lowbit.checkpoint.families.base import Family, LayerCache, TensorSpec
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.checkpoint.model import read_json
from lowbit.checkpoint.resolve import is_packaged, resolve_config
from lowbit.errors import BadConfig, BadOption, NotFound, Unsupported
from lowbit.plan import catalogue
from lowbit.plan.catalogue import Listed

_MOST_LAYERS = 10_000
_FLOATS = {"bfloat16": "BF16", "float16": "F16"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor: its name in GGUF, its row-major shape, its type as GGUF spells it ('Q4_0') and its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


class _Source(NamedTuple):
    """A tensor as a recipe looks at it. dtype: what the checkpoint stores, by its config."""

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str


class PlanModel:
    """One model to plan for. Made by ``open_model``; a context manager.

    name:          for people
    path:          the file or folder it was read from
    gguf:          the GGUF that will be loaded, where there is one
    architecture:  GGUF's word ('gemma3')
    family:        lowbit's, or None where a GGUF has an architecture that lowbit does not know
    config:        the text model's checked config.json; {} without a family
    values:        a GGUF's key-values; {} of a config
    cache:         what each layer caches; () without a family
    stored:        tensors as the files have them, by GGUF's name in a GGUF and by Hugging Face's in a folder; () where
                   only a config is there
    remark:        what a reader of the plan should know of where it comes from
    """

    def __init__(
        self,
        *,
        name: str,
        path: Path,
        architecture: str,
        family: Family | None,
        config: Mapping[str, Any],
        gguf: Path | None = None,
        values: Mapping[str, Any] | None = None,
        stored: tuple[PlannedTensor, ...] = (),
    ) -> None:
        self.name, self.path, self.architecture, self.family = name, path, architecture, family
        self.config, self.gguf, self.values, self.stored = config, gguf, values or {}, stored
        self.cache: tuple[LayerCache, ...] = family.cache(config) if family else ()
        self.remark = ""
        self._kept: dict[Any, Any] = {}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> PlanModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of what runtimes kept for this model."""
        self._kept.clear()
        self._exits.close()

    def keep(self, key: Any, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        """What ``make`` made for ``key`` the first time, entered, and left when the model is closed: for what a
        runtime prepares once and asks for many settings."""
        if key not in self._kept:
            self._kept[key] = self._exits.enter_context(make())
        found: T = self._kept[key]
        return found

    @functools.cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that the config asks for; () without a family."""
        return self.family.tensors(self.config) if self.family else ()

    @property
    def trained_context(self) -> int:
        """Tokens that the model was trained for. Raises BadConfig where the file does not say."""
        text = self.config.get("text_config", self.config)
        value = text.get("max_position_embeddings", self.values.get(f"{self.architecture}.context_length"))
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 31:
            raise BadConfig("the context that the model was trained for is not given", where=self.path)
        return value

    @property
    def vocab_size(self) -> int:
        """Tokens that the model scores: rows of its embedding."""
        named = [*((spec.gguf_name, spec.shape) for spec in self.specs), *((t.name, t.shape) for t in self.stored)]
        for name, shape in named:
            if name == "token_embd.weight":
                return shape[0]
        raise BadConfig("the model has no token_embd.weight", where=self.path)

    def packed(self, recipe: str) -> tuple[PlannedTensor, ...]:
        """Every tensor of the GGUF that ``recipe`` makes of this model.

        Raises BadOption for an unknown recipe, Unsupported where it does not fit or the architecture is not known.
        """
        if self.family is None:
            hint = "Plan for the file as it is, without a recipe"
            raise Unsupported("what a recipe makes of this architecture is not known", where=self.path, hint=hint)
        dtype = _FLOATS.get(str(self.config.get("dtype") or self.config.get("torch_dtype")), "F32")
        packed = recipes.get(recipe).assign_specs(
            _Source(spec.name, spec.role, spec.shape, dtype) for spec in self.specs
        )
        found = [_packed(spec, packed[spec.name]) for spec in self.specs]
        found += [
            PlannedTensor(name=name, shape=values.shape, dtype="F32", n_bytes=values.nbytes)
            for name, values in self.family.computed(self.config).items()
        ]
        return tuple(found)


def open_model(model: str | Path) -> PlanModel:
    """Opens a GGUF's header, a folder's or a bare config.json, a hub id (its config.json alone is downloaded), a
    packaged model's name or the name of a public model ('gemma-4-e2b').

    Raises NotFound, BadFile, BadConfig, BadOption or Unsupported.
    """
    found = resolved(model)
    if isinstance(found, Listed):
        return open_listed(found)
    path = found
    try:
        if path.suffix == ".json":
            return _of_config(path, path.parent.name if path.name == "config.json" else path.stem)
        if path.is_dir():
            return _of_folder(path)
        return _of_gguf(path)
    except OSError as error:
        raise NotFound(f"cannot read: {error.strerror or error}", where=error.filename or path) from error


def open_listed(listed: Listed) -> PlanModel:
    """A model of the catalogue, from the config that lowbit has of it."""
    model = _of_read(dict(listed.config), listed.path, listed.name)
    model.remark = f"Planned from lowbit's own table of public models, as {listed.hub_id}; the text model alone"
    return model


def resolved(model: str | Path) -> Path | Listed:
    """A path, or the public model that ``model`` names; that too where the hub cannot be asked for one of them.

    Raises NotFound, which proposes what may be meant, and BadOption for the name of a family of several models.
    """
    known = catalogue.find(model) if isinstance(model, str) and not Path(model).expanduser().exists() else ()
    if len(known) > 1:
        expected = "one of " + ", ".join(listed.name for listed in known)
        hint = "With --ram 8GiB: which of them fit, and with how much context"
        raise BadOption(f"{model} means several models", expected=expected, hint=hint)
    if known and model != known[0].hub_id and not is_packaged(model):
        return known[0]
    try:
        return resolve_config(model)
    except NotFound as error:
        if known:
            return known[0]
        near = catalogue.near(str(model))
        hint = f"Did you mean {' or '.join(near)}?"
        if not near:
            hint = f"{error.hint}. Public models have names here too: {', '.join(catalogue.families())}"
        raise NotFound(error.what, where=error.where, found=error.found, expected=error.expected, hint=hint) from error


def _of_gguf(path: Path) -> PlanModel:
    file = GgufFile(path)
    try:
        values, shapes = file.values, {name: entry.shape for name, entry in file.entries.items()}
        architecture = values.get("general.architecture")
        layers = values.get(f"{architecture}.block_count")
        if not isinstance(architecture, str) or not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:
            what = "the file does not say what model it is"
            raise BadConfig(what, where=path, found=f"{str(architecture)[:40]}, {str(layers)[:40]} layers")
        family, config = _family_of(values, shapes, path)
        stored = tuple(
            PlannedTensor(name=name, shape=entry.shape, dtype=entry.dtype, n_bytes=entry.n_bytes)
            for name, entry in file.entries.items()
        )
        name = values.get("general.name")
        return PlanModel(
            name=name if isinstance(name, str) and name else path.stem, path=path, architecture=architecture,
            family=family, config=config, gguf=path, values=values, stored=stored,
        )  # fmt: skip
    finally:
        file.close()


def _family_of(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[Family | None, Mapping[str, Any]]:
    """The family and config of a GGUF; none of an architecture, or a setting of one, that lowbit does not know."""
    try:
        family = families.by_arch(values.get("general.architecture"), path, to_plan=True)
        return family, family.text_config(family.config_from_gguf(values, shapes, path), path)
    except Unsupported:
        return None, {}


def _of_config(path: Path, name: str, stored: tuple[PlannedTensor, ...] = ()) -> PlanModel:
    return _of_read(read_json(path, BadConfig), path, name, stored)


def _of_read(config: dict[str, Any], path: Path, name: str, stored: tuple[PlannedTensor, ...] = ()) -> PlanModel:
    for key in schemes.KEYS:
        config.pop(key, None)
    family = families.by_config(config, path, to_plan=True)
    checked = family.text_config(config, path)
    return PlanModel(
        name=name, path=path, architecture=family.arch, family=family, config=checked, stored=stored
    )  # fmt: skip


def _of_folder(path: Path) -> PlanModel:
    """A folder of which the config is read, and the headers of its safetensors if there are any."""
    stored: tuple[PlannedTensor, ...] = ()
    with contextlib.suppress(NotFound):
        files = safetensors_file.open_folder(path)
        entries = {name: file.entries[name] for name, file in files.items()}
        stored = tuple(
            PlannedTensor(name=name, shape=entry.shape, dtype=entry.dtype, n_bytes=entry.n_bytes)
            for name, entry in entries.items()
        )
        for file in files.values():
            file.close()
    return _of_config(path / "config.json", path.resolve().name, stored)


def _packed(spec: TensorSpec, grid_name: str) -> PlannedTensor:
    grid = grids.get(grid_name)
    n = spec.gguf_shape[-1] if spec.gguf_shape else 1
    size = spec.gguf_n_rows * grid.row_bytes(n)
    return PlannedTensor(name=spec.gguf_name, shape=spec.gguf_shape, dtype=grid_name.upper(), n_bytes=size)
