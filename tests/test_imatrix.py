"""lowbit imatrix: the numbers are those of the model's own inputs, and a file packed under them is what it should."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest

import lowbit
from lowbit import ggml, texts
from lowbit import grid as grids
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.cli import main
from lowbit.errors import BadFile, BadOption
from lowbit.pack import imatrix as imatrices
from lowbit.pack.imatrix import Entry, Imatrix
from lowbit.run._products import Product

module = importlib.import_module("lowbit.imatrix")
CHUNK = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("imatrix") / "llama"
    save_tiny_llama(folder, num_hidden_layers=2, hidden_size=64, intermediate_size=256)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The thing went in, and then 42 others: nothing else.\n" * 12, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def collected(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "im.gguf"
    lowbit.imatrix(model, out, text, chunks=5, context_size=CHUNK, process_output=True, threads=1)
    return out


def hooked(model: Path, text: Path, chunks: int) -> dict[str, np.ndarray]:
    """Sums of the squared inputs of each linear layer by Hugging Face name, from transformers, float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(model)(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    sums: dict[str, np.ndarray] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().square().reshape(-1, inputs[0].shape[-1]).sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, part in network.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        network(torch.tensor(ids[: chunks * CHUNK]).reshape(chunks, CHUNK))
    return sums


def test_the_sums_are_those_of_transformers(model: Path, text: Path, collected: Path) -> None:
    found, wanted = imatrices.read(collected), hooked(model, text, 5)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (5, CHUNK, ("text.txt",))
    with open_checkpoint(model) as checkpoint:
        names = {name: checkpoint.specs[name].gguf_name for name in wanted}
        found.check_model(checkpoint)
    assert found.entries.keys() == set(names.values())
    for name, sums in wanted.items():
        entry = found.entries[names[name]]
        assert entry.counts.tolist() == [5 * CHUNK]
        # llama.cpp keeps keys and values in float16.
        np.testing.assert_allclose(entry.sums[0], sums, rtol=0.01)
        assert abs(entry.sums.sum() / sums.sum() - 1) < 1e-3


def test_nothing_but_the_matrix_is_left(collected: Path) -> None:
    assert [path.name for path in collected.parent.iterdir()] == [collected.name]


def test_each_chunk_begins_with_bos_where_the_model_has_it(model: Path, text: Path, tmp_path: Path) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    folder = tmp_path / "bos"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}), encoding="utf-8")
    lowbit.pack(folder, "source", tmp_path / "bos.gguf")
    with module.LlamaCpp(tmp_path / "bos.gguf", context=CHUNK, threads=1) as runtime:
        assert runtime.adds_bos
        chunks, _ = module._chunks(runtime, text, CHUNK, None)
        whole, bos = runtime.tokenize(text.read_text("utf-8")), runtime.bos
    assert chunks.shape == (len(whole) // CHUNK, CHUNK)
    assert (chunks[:, 0] == bos).all()
    np.testing.assert_array_equal(
        chunks[:, 1:].reshape(-1), np.array(whole[: chunks.size]).reshape(-1, CHUNK)[:, 1:].reshape(-1)
    )


def test_without_a_text_the_bundled_ones_take_turns(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(texts, "bundled", lambda: ["a" * 300, "b" * 200])
    found = lowbit.imatrix(model, tmp_path / "im.gguf", chunks=3, context_size=CHUNK, threads=1)
    assert found.chunk_count == 3
    assert found.datasets == tuple(name for name, _, _ in texts.BUNDLED)
    lowbit.pack(model, "source", tmp_path / "m.gguf")
    with module.LlamaCpp(tmp_path / "m.gguf", context=CHUNK, threads=1) as runtime:
        chunks, _ = module._chunks(runtime, None, CHUNK, None)
        assert [runtime.detokenize(chunk)[0] for chunk in chunks] == list("abababa")


def test_the_command_line(model: Path, text: Path, collected: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "im.dat"
    words = ["--quiet", "imatrix", model, "-f", text, "-o", out, "--chunks", 2, "-c", CHUNK, "--threads", 1]
    words += ["--output-format", "dat", "--in-file", collected]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = imatrices.read(out)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (7, 0, ("text.txt",))


def test_earlier_matrices_are_combined_without_running_the_model(model: Path, collected: Path, tmp_path: Path) -> None:
    one = imatrices.read(collected)
    both = lowbit.imatrix(model, tmp_path / "im.gguf", in_files=[collected, collected], context_size=CHUNK)
    assert both.chunk_count == 10
    for name, entry in one.entries.items():
        np.testing.assert_array_equal(both.entries[name].sums, 2 * entry.sums)
    other = {"blk.0.attn_q.weight": Entry(np.ones((1, 65), np.float32), np.array([1]))}
    imatrices.write(
        Imatrix(name="", entries=other, datasets=(), chunk_count=0, chunk_size=CHUNK), tmp_path / "other.gguf"
    )
    with pytest.raises(BadFile, match=r"other.gguf: blk.0.attn_q.weight"):
        lowbit.imatrix(model, tmp_path / "none.gguf", in_files=[tmp_path / "other.gguf"])
    assert not (tmp_path / "none.gguf").exists()


def test_experts_get_the_inputs_of_the_tokens_that_are_sent_to_them() -> None:
    rng = np.random.default_rng(0)
    name = "blk.0.ffn_down_exps.weight"
    for slots in (1, 2):
        x = rng.standard_normal((9, slots, 4)).astype(np.float32)
        experts = np.stack([rng.permutation(3)[:2] for _ in range(9)]).astype(np.int32)
        collector = module.Collector({name: (4, 8, 4)})
        assert collector.see(Product(name, x, experts, np.empty((9, 2, 8), np.float32), 0))
        found = collector.result((), 9).entries[name]
        sums, counts = np.zeros((4, 4)), np.zeros(4, int)
        for token in range(9):
            for slot in range(2):
                sums[experts[token, slot]] += x[token, slot % slots].astype(float) ** 2
                counts[experts[token, slot]] += 1
        assert found.counts.tolist() == counts.tolist()
        assert counts[3] == 0
        np.testing.assert_allclose(found.sums, sums, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m", "iq4_nl"])
def test_naive_packing_under_it_is_ggmls(model: Path, collected: Path, tmp_path: Path, recipe: str) -> None:
    """Against another build of ggml: each tensor's bytes under its own row of importance."""
    result = lowbit.pack(model, recipe, tmp_path / "a.gguf", naive=True, imatrix=collected, threads=1)
    lowbit.pack(model, "f32", tmp_path / "f32.gguf")
    lowbit.pack(model, recipe, tmp_path / "plain.gguf", naive=True)
    found, plain, values = (GgufFile(tmp_path / f"{name}.gguf") for name in ("a", "plain", "f32"))
    im, changed = imatrices.read(collected), set()
    with open_checkpoint(model) as checkpoint:
        for name, grid in result.types.items():
            stored = checkpoint.specs[name].gguf_name
            importance = im.importance(stored)
            if importance is None or grid == "f32":
                continue
            x = values.raw(stored).view(np.float32).reshape(checkpoint.specs[name].shape)
            wanted = libgguf.quantize_rows(x, grids.get(grid).ggml_type, imatrix=importance[0])
            assert (found.raw(stored) == wanted.reshape(-1)).all(), stored
            changed |= {grid} if (found.raw(stored) != plain.raw(stored)).any() else set()
    assert changed & set(result.types.values()) - {"q8_0"}
    assert {f.key: f.value for f in found.fields if f.key.startswith("quantize.")} == {
        "quantize.imatrix.file": "im.gguf",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": len(im.entries),
        "quantize.imatrix.chunks_count": 5,
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibration", "x"], "no such file; expected a calibration"),
        (["--bits", "4.6"], "a mix needs a calibration"),
        (["--to", "mlx"], "only GGUF is rounded by an imatrix or a calibration"),
        (["--to", "compressed-tensors"], "only GGUF is rounded by an imatrix or a calibration"),
    ],
)
def test_what_does_not_go_with_it(
    model: Path, collected: Path, tmp_path: Path, capsys: Any, options: list[str], says: str
) -> None:
    out = tmp_path / "out"
    assert main(["pack", str(model), "--imatrix", str(collected), *options, "-o", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_naive_rounding_knows_no_calibration(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="naive rounding knows no calibration"):
        lowbit.pack(model, "q4_0", tmp_path / "out.gguf", naive=True, calibration="x")


def test_experts_of_a_gemma_4_are_rounded_under_their_own_inputs(
    tiny_gemma4_moe: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Collected through llama.cpp, packed, and every expert's bytes as another build of ggml makes them alone."""
    folder = tiny_gemma4_moe()
    found = lowbit.imatrix(folder, tmp_path / "im.gguf", text, chunks=2, context_size=CHUNK, threads=1)
    lowbit.pack(folder, "f32", tmp_path / "f32.gguf")
    lowbit.pack(folder, "q4_0", tmp_path / "a.gguf", naive=True, imatrix=tmp_path / "im.gguf")
    with open_checkpoint(folder) as checkpoint:
        shapes = {s.gguf_name: s.shape for s in checkpoint.specs.values() if len(s.shape) == 3}
    packed, values = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "f32.gguf")
    assert len(shapes) == 4
    for name, shape in shapes.items():
        assert found.entries[name].counts.sum() == 2 * CHUNK * 2  # each token is sent to two
        assert packed.entries[name].dtype == "Q4_0"
        importance = found.importance(name)
        assert importance is not None
        assert len(importance) == shape[0] == len(found.entries[name].counts)
        raw = packed.raw(name).reshape(shape[0], -1)
        for expert, x in enumerate(values.raw(name).view(np.float32).reshape(shape)):
            wanted = libgguf.quantize_rows(x, grids.get("q4_0").ggml_type, imatrix=importance[expert])
            assert (raw[expert] == wanted.reshape(-1)).all()


def test_packing_under_it_leaves_less_weighted_error(model: Path, collected: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.gguf" for name in ("naive", "ours", "again")}
    types = lowbit.pack(model, "q4_0", paths["naive"], naive=True, imatrix=collected).types
    lowbit.pack(model, "q4_0", paths["ours"], imatrix=collected, threads=1)
    lowbit.pack(model, "q4_0", paths["again"], imatrix=imatrices.read(collected), threads=3)
    assert paths["ours"].read_bytes() == paths["again"].read_bytes()
    im = imatrices.read(collected)
    with (
        open_checkpoint(model) as source,
        open_checkpoint(paths["ours"]) as ours,
        open_checkpoint(paths["naive"]) as theirs,
    ):
        for name, grid in types.items():
            importance = im.importance(source.specs[name].gguf_name)
            if importance is None or grid != "q4_0":
                continue
            errors = [((p.read(name) - source.read(name)) ** 2 * importance).sum() for p in (ours, theirs)]
            assert errors[0] < errors[1], name


def test_another_importance_does_not_go_on_with_a_partial_file(
    model: Path, collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.pack import gguf_container

    asked: list[str] = []

    def refuse(final: Path, size: int, start: object, parts: object, wanted: dict[str, object]) -> None:
        asked.append(json.dumps(wanted))
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_container, "resumable", refuse)
    once = imatrices.read(collected)
    twice = imatrices.combine([once, once], name="im.gguf", chunk_size=CHUNK)
    for im in (None, once, imatrices.read(collected), twice):
        with pytest.raises(KeyboardInterrupt):
            lowbit.pack(model, "q4_0", tmp_path / "a.gguf", imatrix=im)
    assert asked[1] == asked[2]
    assert len(set(asked)) == 3


def test_codes_and_lattices_are_kept(model: Path, collected: Path, tmp_path: Path) -> None:
    """Of a GGUF with codes every byte, and of values on a lattice every weight."""
    from lowbit.checkpoint import Tensor, write_checkpoint

    plain = lowbit.pack(model, "q4_0", tmp_path / "plain.gguf")
    lowbit.pack(plain.path, "q4_0", tmp_path / "a.gguf", imatrix=collected)
    first, second = GgufFile(plain.path), GgufFile(tmp_path / "a.gguf")
    assert all((first.raw(name) == second.raw(name)).all() for name in first.entries)
    with open_checkpoint(plain.path) as packed:
        tensors = (Tensor(name=name, values=packed.read(name)) for name in packed.names)
        folder = write_checkpoint(tmp_path / "values", packed, tensors)
        lowbit.pack(folder, "q4_0", tmp_path / "b.gguf", imatrix=collected)
        with open_checkpoint(tmp_path / "b.gguf") as recovered:
            for name in packed.names:
                np.testing.assert_array_equal(recovered.read(name), packed.read(name))


def test_each_stacked_matrix_is_rounded_under_its_own_importance() -> None:
    from lowbit.checkpoint.families.base import TensorSpec
    from lowbit.pack.rows import matrix_slices

    spec = TensorSpec(name="x", gguf_name="x", role="experts_down", shape=(3, 5, 32))
    assert list(matrix_slices(spec, 3, 3, 13)) == [(0, 3, 5), (1, 5, 10), (2, 10, 13)]
    assert list(matrix_slices(spec, 1, 3, 13)) == [(0, 3, 13)]
    assert list(matrix_slices(spec, 3, 5, 6)) == [(1, 5, 6)]


def test_ggml_refuses_importance_of_another_length() -> None:
    with pytest.raises(BadFile, match="an importance is not the row's"):
        ggml.quantize(np.ones((2, 32), np.float32), 2, np.ones(64, np.float32))
