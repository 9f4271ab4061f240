"""A drafter to begin with: some layers of its target, with the target's embedding, norm, head and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.families.base import text, uint
from lowbit.checkpoint.gguf_file import Field
from lowbit.checkpoint.model import TensorInfo, info_of
from lowbit.checkpoint.tensor_file import TensorFile
from lowbit.errors import BadOption, Unsupported

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_OF_LAYERS = ("layer_types",)  # of a config: lists with an entry for each layer


def layers_asked(drafter: str) -> int | None:
    """N of 'layers:N'; None for anything else. Raises BadOption where N is no number above 0."""
    kind, mark, count = drafter.partition(":")
    if kind != "layers" or not mark:
        return None
    if not count.isdecimal() or int(count) < 1:
        raise BadOption("not a number of layers", found=drafter, expected="layers:N, for example layers:4")
    return int(count)


class Cut(Checkpoint):
    """``source`` with ``n`` of its layers: the first, the last and what lies evenly between.

    Where layers are of several kinds (sliding and global attention), the kinds come in the order that the source begins
    with, for runtimes know a layer's kind by its place. Raises BadOption for more layers than there are, Unsupported
    where layers need each other.
    """

    def __init__(self, source: Checkpoint, n: int) -> None:
        of = source.config.get("num_hidden_layers")
        if not isinstance(of, int) or not n < of:
            raise BadOption("the drafter has fewer layers than the model", found=n, expected=f"less than {of}")
        if source.config.get("num_kv_shared_layers") or source.config.get("hidden_size_per_layer_input"):
            raise Unsupported("layers of this model need the others", where=source.name, hint="Give --drafter a model")
        kinds = source.config.get("layer_types")
        self.layers = _evenly(n, of, kinds if isinstance(kinds, list) else None)
        config = source.config | {"num_hidden_layers": n}
        for key in _OF_LAYERS:
            if isinstance(config.get(key), list):
                config[key] = config[key][:n]
        super().__init__(source.path, source.kind, config, source.family)
        self.source = source
        self.manifest = {"source": {"name": f"{source.name} drafter", "license": source.license}}

    def _stored(self, name: str) -> str:
        return _LAYER.sub(lambda match: str(self.layers[int(match[0])]), self._spec(name).name)

    def info(self, name: str) -> TensorInfo:
        return info_of(self._spec(name), self.source.info(self._stored(name)).dtype, None)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.source.read_rows(self._stored(name), start, stop)

    def block_rows(self, name: str, start: int, stop: int) -> np.ndarray | None:
        return None

    def close(self) -> None:
        """Nothing: the files are the source's."""

    @property
    def files(self) -> tuple[TensorFile, ...]:
        return self.source.files

    @property
    def name(self) -> str:
        return f"{self.source.name} drafter"

    @property
    def license(self) -> str | None:
        return self.source.license

    def gguf_metadata(self) -> list[Field] | None:
        """The source's, but for what it says of its layers and its size."""
        fields = self.source.gguf_metadata()
        if fields is None:
            return None
        arch, n, of = self.family.arch, len(self.layers), self.source.config["num_hidden_layers"]
        changed = {
            f"{arch}.block_count": uint(f"{arch}.block_count", n),
            "general.name": text("general.name", self.name),
        }
        kept = [changed.get(f.key, f) for f in fields if f.key not in ("general.size_label", "general.basename")]
        return [self._of_layers(f, of) if f.key.startswith(f"{arch}.") else f for f in kept]

    def _of_layers(self, field: Field, of: int) -> Field:
        """A list with an entry for each layer has those of the layers that are left."""
        if field.subtype is None or len(field.value) != of:
            return field
        return field._replace(value=[field.value[i] for i in self.layers])

    @property
    def tokenizer_source(self) -> Any:
        return self.source.tokenizer_source


def _evenly(n: int, of: int, kinds: Sequence[str] | None) -> list[int]:
    """``n`` of ``of`` layers in their order, each of the kind that its new place asks for."""
    chosen: list[int] = []
    for place in range(n):
        wanted = round(place * (of - 1) / max(1, n - 1))
        # Enough of each kind are to be left for the places that follow.
        able = [
            layer
            for layer in range(chosen[-1] + 1 if chosen else 0, of)
            if kinds is None or (kinds[layer] == kinds[place] and _fit(kinds[place + 1 : n], kinds[layer + 1 :]))
            if kinds is not None or of - layer >= n - place
        ]
        chosen.append(min(able, key=lambda layer: abs(layer - wanted)))
    return chosen


def _fit(places: Sequence[str], left: Sequence[str]) -> bool:
    """Whether layers of the kinds of ``places``, in order, are among those ``left``."""
    rest = iter(left)
    return all(any(kind == place for kind in rest) for place in places)
