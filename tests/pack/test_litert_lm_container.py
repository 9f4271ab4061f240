"""The .litertlm that is packed: its codes, its graph in LiteRT's own kernels against transformers, and LiteRT-LM's
engine over it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit import grid as grids
from lowbit import recipe, run
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.checkpoint.litertlm_file import LitertLmFile
from lowbit.cli import main
from lowbit.errors import BadFile, BadOption, LowbitError, Unsupported
from lowbit.inspect import inspect
from lowbit.measure import MeasureOptions, measure
from lowbit.pack import pack, verify
from lowbit.pack.tflite_decoder import PREFILL
from lowbit.plan import PlanOptions, plan
from lowbit.run.litert_lm import LiteRtLm
from tiny_configs import TINY_GEMMA3, TINY_LLAMA, TINY_QWEN3

CONTEXT = 96
TOKENS = np.random.default_rng(4).integers(3, 263, 60).tolist()  # beyond Gemma's window of 16

pytestmark = pytest.mark.skipif(
    LiteRtLm.installed() is None, reason="LiteRT-LM is not installed: pip install 'lowbit[litert]'"
)
Save = Callable[..., Any]
Trained = tuple[Path, dict[str, grids.Blocks]]


def config_of(family: str, **changes: Any) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    kinds = {"gemma3": (Gemma3TextConfig, TINY_GEMMA3), "qwen3": (Qwen3Config, TINY_QWEN3)}
    kind, sizes = kinds.get(family, (LlamaConfig, TINY_LLAMA))
    return kind(**sizes | changes)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, save_model: Save) -> Path:
    folder = tmp_path_factory.mktemp("litert") / "gemma"
    save_model(folder, config_of("gemma3"))
    return folder


@pytest.fixture(scope="module")
def trained(gemma: Path) -> Trained:
    """A checkpoint as training leaves it in the mobile schema, on scales that no rule would choose."""
    blocks: dict[str, grids.Blocks] = {}
    with open_checkpoint(gemma) as source:
        types, tensors = recipe.get("mobile").assign(source), []
        for name in source.names:
            values, raw, grid = source.read(name), None, grids.get(types[name])
            if grid.whole_rows:
                found = grid.quantize(values)
                wide = np.float32(0.77) * found.scales
                scales = (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # BF16, as training has them
                found = blocks[name] = grid.encode(values, scales)
                values, raw = grid.dequantize(found), grid.pack(found)
            tensors.append(Tensor(name=name, values=values, grid=grid.name if raw is not None else None, blocks=raw))
        return write_checkpoint(gemma.parent / "trained", source, tensors), blocks


@pytest.fixture(scope="module")
def packed(trained: Trained) -> Path:
    out = trained[0].parent / "packed.litertlm"
    result = pack(trained[0], "mobile", out, to="litert-lm", context=CONTEXT, certificate=True, threads=1)
    assert result.size_bytes == out.stat().st_size and result.certificate is not None
    return out


def logits_of(path: Path, tokens: list[int] = TOKENS) -> np.ndarray:
    with run.open_artifact(path, threads=1) as model:
        return np.concatenate([rows for _, rows in model.logits(tokens)])


def reference(model: Any, *, runtime_activations: bool = False) -> np.ndarray:
    """transformers' logits; with LiteRT's rounding of what flows into a matrix, to 8 bits with a zero point a token."""
    import torch

    def rounded(x: Any) -> Any:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        inverse = torch.where(high > low, 255 / (high - low), torch.ones_like(high))
        below, above = low * inverse, high * inverse
        zero = torch.where(-128 + below + 127 + above > 0, -128 - below, 127 - above).clamp(-128, 127).round()
        return ((x * inverse).round() + zero).clamp(-128, 127).sub(zero) / inverse

    if runtime_activations:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma3", {}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    ],
)  # fmt: skip
def test_the_graph_in_float32_is_transformers_model(
    family: str, changes: dict[str, Any], tmp_path: Path, save_model: Save
) -> None:
    model = save_model(tmp_path / "model", config_of(family, **changes))
    out = tmp_path / "model.litertlm"
    pack(tmp_path / "model", "f32", out, to="litert-lm", context=CONTEXT, threads=1)
    np.testing.assert_allclose(logits_of(out), reference(model), atol=2e-5)


def test_codes_and_scales_are_the_checkpoints_bit_for_bit(trained: Trained, packed: Path) -> None:
    folder, blocks = trained
    assert len(blocks) == 50
    with open_checkpoint(packed) as opened, open_checkpoint(folder) as source:
        assert opened.kind == "litert-lm" and opened.family.name == "gemma3" and opened.names == source.names
        for name, expected in blocks.items():
            found = opened.coded_rows(name, 0, opened.specs[name].n_rows)
            assert found is not None and found[0] == opened.info(name).grid
            np.testing.assert_array_equal(found[1].codes, expected.codes)
            np.testing.assert_array_equal(found[1].scales, expected.scales)
            np.testing.assert_array_equal(opened.read_rows(name, 3, 9), source.read_rows(name, 3, 9))
            np.testing.assert_array_equal(opened.block_rows(name, 3, 9), source.block_rows(name, 3, 9))
        for name in set(source.names) - set(blocks):  # norms lie there plus 1, and come back within a last bit
            np.testing.assert_array_equal(opened.stored_rows(name, 0, 1)[0], source.read(name) + np.float32(1))
            np.testing.assert_allclose(opened.read(name), source.read(name), atol=2e-7)
    totals = verify(packed, folder).totals
    assert totals["exact"] == totals["blocks"] > 5000
    told = inspect(packed)
    assert told["kind"] == "litert-lm" and told["problem"] is None and told["layers"] == 7
    assert {kind: n["count"] for kind, n in told["types"].items()} == {
        "channelwise2": 13,
        "channelwise4": 37,
        "F32": 43,
    }


def test_its_logits_are_transformers_on_the_same_weights(trained: Trained, packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained[0], attn_implementation="eager").float().eval()
    found, plain = logits_of(packed), reference(model)
    expected = reference(model, runtime_activations=True)
    # A sum that lands between two codes may be rounded to either, and what follows differs from there on.
    assert np.median(np.abs(found - expected)) < 1e-3 * np.abs(expected).max()
    assert np.mean(np.abs(found - expected)) < 0.1 * np.mean(np.abs(plain - expected))
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_litert_lm_answers_from_it(trained: Trained, packed: Path) -> None:
    """LiteRT-LM's own engine reads the prompt in runs of 16 and gives the text that the decode graph gives alone."""
    import litert_lm

    with run.open_artifact(packed, threads=1) as model:
        assert (model.name, model.context, model.n_vocab, model.eos) == ("litert-lm", CONTEXT, 320, 2)
        assert model.chat_template == "{{ messages[0]['content'] }}"
        prompt = "the rain and the thing, again and again in the rain: "
        ids = model.tokenize(prompt)
        assert len(ids) > 2 * 16
        expected = model.detokenize(list(model.generate(ids, 12, ignore_end=True)))
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    backend = litert_lm.Backend.CPU(thread_count=1)
    greedy = litert_lm.SamplerConfig(top_k=1)
    with (
        litert_lm.Engine(str(packed), backend=backend, cache_dir=":nocache") as engine,
        engine.create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=12) as session,
    ):
        session.run_prefill([prompt])
        assert session.run_decode().texts[0] == expected


def test_what_litert_lm_is_told(packed: Path) -> None:
    """A prompt's last run is padded to 16 tokens, which must lie within the cache."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    section = next(s for s in LitertLmFile(packed).header.sections if s.kind == 5)
    found = llm_metadata_pb2.LlmMetadata.FromString(packed.read_bytes()[section.begin : section.end])
    assert found.max_num_tokens == CONTEXT - PREFILL[1] + 1 and found.llm_model_type.HasField("gemma3")
    assert [list(t.token_ids.ids) for t in found.stop_tokens] == [[2]] and not found.HasField("start_token")


def test_it_is_measured_and_its_caches_are_as_planned(trained: Trained, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rain had stopped, and the road was empty. Nobody saw the thing. " * 20)
    options = MeasureOptions(chunk=48, chunks=2, threads=1, resamples=200, speed=False)
    result = measure(packed, against=trained[0], text=tmp_path / "text.txt", options=options)
    [entry] = result["artifacts"]
    assert entry["runtime"]["name"] == "litert-lm" and 0 < entry["fidelity"]["kld_mean"]["value"] < 0.05
    with run.open_artifact(packed, threads=1) as model:
        assert isinstance(model, LiteRtLm)
        caches = sum(int(np.prod(d["shape"])) * 4 for d in model._cache_details.values())
    planned = plan(trained[0], PlanOptions(runtime="litert-lm", context=CONTEXT, recipe="mobile"))
    assert planned.bytes_of("kv") == caches
    stored = sum(entry.n_bytes for entry in LitertLmFile(packed).entries.values())
    assert planned.bytes_of("weights") == stored


def test_the_bytes_do_not_depend_on_threads_or_on_being_killed(trained: Trained, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.litertlm"

    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    from lowbit.pack import litert_lm_container

    with open_checkpoint(trained[0]) as source:
        types = recipe.get("mobile").assign(source)
        write: Callable[..., int] = litert_lm_container.write
        settings = {"file_type": "mobile", "naive": False, "context": CONTEXT}
        with pytest.raises(KeyboardInterrupt):
            write(source, types, out, check=stop, **settings)
        journal = out.with_name(out.name + ".partial.journal")
        kept = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(kept[:20]))  # as if it had been killed after 19 tensors
        partial = out.with_name(out.name + ".partial")
        with open(partial, "r+b") as handle:  # and the last tensors were never written
            handle.seek(-60_000, 2)
            handle.write(bytes(60_000))
        write(source, types, out, threads=2, **settings)
    assert out.read_bytes() == packed.read_bytes() and not journal.exists()


def test_a_changed_code_or_scale_is_found(trained: Trained, packed: Path, tmp_path: Path) -> None:
    raw, changed = packed.read_bytes(), tmp_path / "changed.litertlm"
    file = LitertLmFile(packed)
    name = "model.layers.3.mlp.up_proj.weight"
    for part in (name, f"{name}#scales"):
        data = bytearray(raw)
        data[file.entries[part].start + 2] ^= 1
        changed.write_bytes(data)
        totals = verify(changed, trained[0]).totals
        assert totals["blocks"] - totals["exact"] == 1


def test_damaged_files_are_one_line(packed: Path, tmp_path: Path) -> None:
    """Bytes of the header, of the flatbuffer and of the sizes in it; whatever is read, nothing but one error comes."""
    raw, path = packed.read_bytes(), tmp_path / "bad.litertlm"
    file = LitertLmFile(packed)
    section = next(s for s in file.header.sections if s.kind == 3)
    header_end = struct.unpack_from("<Q", raw, 24)[0]
    model_end = min(entry.start for name, entry in file.entries.items() if not name.endswith("#scales"))
    rng = np.random.default_rng(1)
    refused = 0
    for i in range(150):
        data = bytearray(raw)
        begin, end = ((32, header_end), (section.begin, section.begin + 64), (section.begin, model_end))[i % 3]
        for _ in range(int(rng.integers(1, 40))):
            data[int(rng.integers(begin, end))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            open_checkpoint(path).close()
        except LowbitError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 40
    for cut in (0, 20, header_end - 1, section.begin + 100, model_end - 5, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(LowbitError):
            open_checkpoint(path)


def test_what_does_not_go_together(
    gemma: Path, tmp_path: Path, save_model: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.litertlm"
    for context in (15, 513):
        with pytest.raises(BadOption, match="16 to 512 tokens"):
            pack(gemma, "mobile_w8", out, to="litert-lm", context=context)
    with pytest.raises(BadOption, match="does not have the recipe's format; found q4_0"):
        pack(gemma, "q4_0", out, to="litert-lm")
    with pytest.raises(BadOption, match="only LiteRT-LM's files have a context"):
        pack(gemma, "q4_0", tmp_path / "x.gguf", context=64)
    assert main(["pack", str(gemma), "--to", "litert-lm", "-c", "9", "-o", str(out)]) == 2
    assert "bad value for context; found 9" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    tiny = Path(__file__).parent.parent / "run" / "tiny.litertlm"
    with pytest.raises(Unsupported, match=r"does not say what model it is; found no lowbit\.config"):
        open_checkpoint(tiny)
    other = tmp_path / "llama"
    save_model(other, config_of("llama"))
    pack(other, "mobile_w8", tmp_path / "llama.litertlm", to="litert-lm", context=32, threads=1)
    with pytest.raises(BadFile, match="not the source's model; found llama; expected gemma3"):
        verify(tmp_path / "llama.litertlm", gemma)


def test_stop_tokens_and_beginnings_come_from_the_folder(gemma: Path, tmp_path: Path) -> None:
    import shutil

    from lowbit.pack import litertlm_sections as sections

    folder = tmp_path / "g"
    shutil.copytree(gemma, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    with open_checkpoint(folder) as source:
        from litert_lm_builder.runtime.proto import llm_metadata_pb2

        found = llm_metadata_pb2.LlmMetadata.FromString(sections.metadata(source, folder, 512, 128).data)
    assert [list(t.token_ids.ids) for t in found.stop_tokens] == [[2], [7]]
    assert list(found.start_token.token_ids.ids) == [1] and found.max_num_tokens == 385
