"""The compressed-tensors container: a folder of symmetric integers (pack-quantized) that transformers loads; those of 4
bits in groups (w4a16) vLLM, too.

Codes from -8 to 7 times a scale a group: those of a lattice, of a checkpoint that was trained on Q4_0 and of a GGUF's
Q4_0 blocks stay as they are. Source: compressed_tensors/compressors/pack_quantized and config/base.py. A layer's
experts are written one by one, as vLLM reads them (``checkpoint.compressed_tensors``).

The mobile schema's classes have a scale a row (strategy ``channel``) and 2, 4 or 8 bits, each class a group of the
config. Scales are float32, so that what the library makes of them is code times scale to the bit. It packs no
embeddings: those are stored as the values that their codes stand for. Static int8 activations, keys and values go
along where the checkpoint has their scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import console
from lowbit import grid as grids
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.compressed_tensors import matrices_of, stored_parts, words_of
from lowbit.checkpoint.families.base import TensorSpec
from lowbit.checkpoint.packed import experts_of
from lowbit.checkpoint.static_activations import SCHEME, is_of_cache, names_of
from lowbit.errors import Unsupported
from lowbit.grid._channelwise import Channelwise
from lowbit.grid._int4 import Int4
from lowbit.grid.base import Blocks
from lowbit.pack import lattice, model_folder
from lowbit.pack.guide import Guide, refuse
from lowbit.pack.model_folder import Part
from lowbit.pack.rows import plain_precision_of, plain_rows

RECIPE = "int4_g32"
STATIC_ACTIVATIONS = True
_FLOATS = ("f32", "f16", "bf16")


def holds(grid: str) -> bool:
    return grid in _FLOATS or isinstance(grids.get(grid), Int4 | Channelwise)


def write(
    checkpoint: Checkpoint,
    types: Mapping[str, str],
    out: Path,
    *,
    file_type: str,
    naive: bool,
    threads: int | None = None,
    guide: Guide | None = None,
    check: Callable[[Path], None] | None = None,
) -> int:
    """See containers.Container. Tensors on 'f32' lie in 16 bits where nothing of them is lost."""
    refuse(guide, "compressed-tensors")
    coded = {name: grid for name, kind in types.items() if isinstance(grid := grids.get(kind), Int4 | Channelwise)}
    quantized = {name: grid for name, grid in coded.items() if "embedding" not in checkpoint.specs[name].role}
    for name, grid in quantized.items():
        shape, unit = checkpoint.specs[name].shape, _unit(grid)
        if len(shape) != (2 if experts_of(name) is None else 3) or shape[-1] % unit:
            raise Unsupported(
                f"not a matrix whose rows are a multiple of {unit}, which {grid.name} needs",
                where=name, found=list(shape), hint="Choose a float recipe such as bf16",
            )  # fmt: skip
    preferred = model_folder.preferred_dtype(checkpoint, tuple(quantized))
    activations = _Activations(checkpoint, quantized)
    if any(map(experts_of, quantized)):
        console.log("experts are written one by one, as vLLM reads them; transformers must be told (docs/formats.md)")

    def parts_of(spec: TensorSpec) -> Iterator[Part]:
        if spec.name in coded and spec.name not in quantized:
            yield _as_values(checkpoint, spec, coded[spec.name], naive=naive, threads=threads)
            return
        if spec.name not in quantized:
            yield model_folder.float_part(checkpoint, spec, types[spec.name], preferred)
            return
        grid = quantized[spec.name]
        yield from _parts(
            spec, grid, _coded(checkpoint, spec, grid, preferred, naive=naive, threads=threads), preferred
        )
        yield from activations.parts(spec.name)

    return model_folder.write(
        checkpoint,
        out,
        config=_config(checkpoint, quantized, preferred, activations),
        parts_of=parts_of,
        names_of=lambda spec: _names(spec, activations) if spec.name in quantized else (spec.name,),
        written_by="pt",
        asked={"types": dict(types), "naive": naive, "activations": {n: float(s) for n, s in activations.all.items()}},
        check=check,
    )


class _Activations:
    """Scales of static int8 activations, each beside a matrix. Left out, and left as floats, are an activation that was
    never seen, what belongs to a matrix that is not quantized, and all caches where one of them would be, as they have
    one scheme; also where heads are of two sizes, as Gemma 4's, for the library asks the config for one."""

    def __init__(self, checkpoint: Checkpoint, quantized: Iterable[str]) -> None:
        self.all = checkpoint.activation_scales()
        named = [(matrix, ours, theirs) for matrix in quantized for ours, theirs in names_of(matrix)]
        kept = {ours for _, ours, _ in named if self.all.get(ours, 0) > 0}
        caches = set(filter(is_of_cache, self.all))
        heads = {each.k_dim for each in checkpoint.family.cache(checkpoint.config)}
        self.has_cache = bool(caches) and caches <= kept and len(heads) == 1
        kept -= set() if self.has_cache else caches
        if kept != self.all.keys():
            console.log(f"{len(self.all) - len(kept)} of {len(self.all)} activations stay floats (docs/mobile.md)")
        self._beside: dict[str, dict[str, str]] = {}
        for matrix, ours, theirs in named:
            if ours in kept:
                self._beside.setdefault(matrix, {})[theirs] = ours

    def kinds(self, matrix: str) -> tuple[bool, bool]:
        """Whether the inputs and whether the outputs of 'X.weight' are rounded."""
        module, beside = matrix.removesuffix(".weight"), self.names(matrix)
        return f"{module}.input_scale" in beside, f"{module}.output_scale" in beside

    def names(self, matrix: str) -> tuple[str, ...]:
        return tuple(self._beside.get(matrix, ()))

    def parts(self, matrix: str) -> Iterator[Part]:
        for theirs, ours in self._beside.get(matrix, {}).items():
            yield Part(name=theirs, dtype="F32", shape=(1,), arrays=[np.array([self.all[ours]], "<f4")])


def _unit(grid: Int4 | Channelwise) -> int:
    """What rows are a multiple of: a group, or the codes of a word."""
    return 32 // grid.bits if isinstance(grid, Channelwise) else grid.block_size


def _config(
    checkpoint: Checkpoint, quantized: Mapping[str, Int4 | Channelwise], preferred: str, activations: _Activations
) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "_name_or_path")}
    exact = any(isinstance(grid, Channelwise) for grid in quantized.values())
    dtype = "float32" if exact else model_folder.CONFIG_DTYPES[preferred]
    config |= {"tie_word_embeddings": checkpoint.tied, "dtype": dtype}
    if quantized:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": _groups(checkpoint, quantized, activations),
            "ignore": _ignored(checkpoint, quantized),
            "kv_cache_scheme": SCHEME if activations.has_cache else None,
        }
    return config


def _groups(
    checkpoint: Checkpoint, quantized: Mapping[str, Int4 | Channelwise], activations: _Activations
) -> dict[str, Any]:
    """One of each kind of weights and activations; where there are several, each names its modules."""
    kinds: dict[tuple[str, bool, bool], list[str]] = {}
    for name, grid in quantized.items():
        matrices = matrices_of(name, range(checkpoint.specs[name].shape[0]))
        kind = (grid.name, *activations.kinds(name))
        kinds.setdefault(kind, []).extend(matrix.removesuffix(".weight") for matrix in matrices)
    found = {}
    for i, ((weights_on, inputs, outputs), modules) in enumerate(kinds.items()):
        one = grids.get(weights_on)
        bits = one.bits if isinstance(one, Channelwise) else None
        weights = {
            "num_bits": bits or 4, "type": "int", "symmetric": True, "strategy": "channel" if bits else "group",
            "dynamic": False, "actorder": None, "group_size": None if bits else one.block_size,
        }  # fmt: skip
        targets = ["Linear"] if len(kinds) == 1 else modules
        found[f"group_{i}"] = {
            "targets": targets, "weights": weights, "format": "pack-quantized",
            "input_activations": SCHEME if inputs else None, "output_activations": SCHEME if outputs else None,
        }  # fmt: skip
    return found


def _ignored(checkpoint: Checkpoint, quantized: Mapping[str, Int4 | Channelwise]) -> list[str]:
    """Linear modules that are not quantized: the head, which is there as a module also where it is the embedding, and
    whatever else is a matrix but no embedding."""
    others = (spec for spec in checkpoint.specs.values() if len(spec.shape) == 2 and spec.name not in quantized)
    modules = [spec.name.removesuffix(".weight") for spec in others if "embedding" not in spec.role]
    return sorted({*modules} if "lm_head.weight" in quantized else {"lm_head", *modules})


def _names(spec: TensorSpec, activations: _Activations) -> tuple[str, ...]:
    parts = (part for matrix in matrices_of(spec.name, range(spec.shape[0])) for part in stored_parts(matrix))
    return (*parts, *activations.names(spec.name))


def _of_rows(
    checkpoint: Checkpoint, spec: TensorSpec, grid: Int4 | Channelwise, start: int, stop: int, *, naive: bool
) -> Blocks:
    """Rows on a grid of the mobile schema: the source's own codes and scales where it has them, else the library's
    rounding of its values."""
    coded = None if naive else checkpoint.coded_rows(spec.name, start, stop)
    own = coded is not None and (
        coded[0] == grid.name
        or (isinstance(source := grids.get(coded[0]), Channelwise) and isinstance(grid, Channelwise)
            and source.bits <= grid.bits)
    )  # fmt: skip
    blocks = coded[1] if coded is not None and own else grid.quantize(plain_rows(checkpoint, spec, start, stop))
    assert blocks.scales is not None
    grids.check_finite(blocks.scales, f"{checkpoint.path}: {spec.name}")
    return blocks


def _as_values(
    checkpoint: Checkpoint, spec: TensorSpec, grid: Int4 | Channelwise, *, naive: bool, threads: int | None
) -> Part:
    """An embedding: what its codes stand for, float32, or float16 where that holds it all."""

    def values(start: int, stop: int) -> np.ndarray:
        return grid.dequantize(_of_rows(checkpoint, spec, grid, start, stop, naive=naive))

    found = model_folder.each_slice(spec, values, threads)
    dtype = model_folder.scale_dtype(found, [], "F16")
    arrays = (model_folder.as_bytes(part, dtype) for part in found)
    return Part(name=spec.name, dtype=dtype, shape=spec.shape, arrays=arrays)


def _coded(
    checkpoint: Checkpoint, spec: TensorSpec, grid: Int4 | Channelwise, preferred: str, *, naive: bool,
    threads: int | None,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """The matrix in slices of rows: the codes' bytes, and float32 scales (rows, n_groups)."""
    if isinstance(grid, Channelwise):

        def encode_rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            blocks = _of_rows(checkpoint, spec, grid, start, stop, naive=naive)
            assert blocks.scales is not None
            return words_of(grid, grid.pack_codes(blocks.codes[:, 0])), blocks.scales.astype(np.float32)

        return model_folder.each_slice(spec, encode_rows, threads)
    own = not naive and _own_codes(checkpoint, spec, grid, 0, 1) is not None
    dtype = "F32" if own or naive else plain_precision_of(checkpoint, spec)

    def encode(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = _own_codes(checkpoint, spec, grid, start, stop) if own else None
        if blocks is None:
            rows = plain_rows(checkpoint, spec, start, stop)
            blocks = grid.quantize(rows, preferred) if naive else _recovered(rows, grid, dtype, preferred)
        assert blocks.scales is not None
        grids.check_finite(blocks.scales, f"{checkpoint.path}: {spec.name}")
        return grid.pack_codes(blocks.codes), blocks.scales.astype(np.float32)

    return model_folder.each_slice(spec, encode, threads)


def _parts(
    spec: TensorSpec, grid: Int4 | Channelwise, found: list[tuple[np.ndarray, np.ndarray]], preferred: str
) -> Iterator[Part]:
    scales = [part for _, part in found]
    of_rows = isinstance(grid, Channelwise)
    stored = "F32" if of_rows else model_folder.scale_dtype(scales, [], preferred)
    matrices, n = matrices_of(spec.name, range(spec.shape[0])), spec.shape[-1]
    n_rows = spec.n_rows // len(matrices)
    words = [part for part, _ in found]
    per_word = _unit(grid) if of_rows else 8
    bytes_ = [model_folder.as_bytes(part, stored) for part in scales]
    for i, matrix in enumerate(matrices):
        packed, scale, shape = stored_parts(matrix)
        start, stop = i * n_rows, (i + 1) * n_rows
        yield Part(name=packed, dtype="I32", shape=(n_rows, n // per_word), arrays=_rows(words, start, stop))
        width = 1 if of_rows else n // grid.block_size
        yield Part(name=scale, dtype=stored, shape=(n_rows, width), arrays=_rows(bytes_, start, stop))
        yield Part(name=shape, dtype="I64", shape=(2,), arrays=[np.array([n_rows, n], "<i8")])


def _rows(slices: list[np.ndarray], start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows ``start`` to ``stop`` of what lies in slices of rows one after another."""
    at = 0
    for part in slices:
        if at < stop and at + len(part) > start:
            yield part[max(0, start - at) : stop - at]
        at += len(part)


def _recovered(rows: np.ndarray, grid: Int4, dtype: str, scales: str) -> Blocks:
    """The lattice's codes and scales where ``rows`` are on one, else the nearest codes on scales that the dtype
    ``scales`` holds; scales float32."""
    blocks, status = lattice.recover(rows, dtype, grid)
    off = status == lattice.OFF_LATTICE
    assert blocks.scales is not None
    wide = blocks.scales.astype(np.float32)
    wide[off] = model_folder.round_to(wide[off], scales)
    codes = np.where(off[..., None], grid.encode(rows, wide).codes, blocks.codes)
    return Blocks(codes=codes, scales=wide)


def _own_codes(checkpoint: Checkpoint, spec: TensorSpec, grid: Int4, start: int, stop: int) -> Blocks | None:
    """The source's own codes and scales where ``grid`` holds them as they are, else None."""
    coded = checkpoint.coded_rows(spec.name, start, stop)
    if coded is None:
        return None
    source, blocks = grids.get(coded[0]), coded[1]
    times, rest = divmod(source.block_size, grid.block_size)
    within = grid.min_code <= source.min_code and source.max_code <= grid.max_code
    if rest or not source.has_scales or not within:
        return None
    codes = blocks.codes.reshape(stop - start, spec.shape[-1] // grid.block_size, grid.block_size)
    return Blocks(codes=codes, scales=np.repeat(np.asarray(blocks.scales), times, axis=-1))
