"""The certificate: what is proved of a packed file, against the checkpoint that it came from, whoever packed it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import lowbit
from lowbit import console
from lowbit import grid as grids
from lowbit.checkpoint import Tensor, open_checkpoint, write_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile
from lowbit.cli import main
from lowbit.errors import BadFile, CannotWrite, NotFound, Unsupported
from lowbit.pack import PackResult, certificate

Make = Callable[..., Path]
MATRIX = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """No trace of --quiet in other tests."""
    yield
    console.set_quiet(False)


def packed(folder: Path, out: Path, recipe: str = "q4_0", **options: Any) -> tuple[PackResult, dict[str, Any]]:
    """Packs with a certificate and gives it as it lies beside the file."""
    result = lowbit.pack(folder, recipe, out, certificate=True, **options)
    saved = json.loads(Path(f"{out}.certificate.json").read_text("utf-8"))
    assert result.certificate is not None and saved == result.certificate.to_json()
    return result, saved


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", ["extremum/-8", "absmax/7", "absmax/7.5", "free scales"])
def test_a_checkpoint_packs_without_loss(
    qat: Make, tmp_path: Path, rounded: Callable[..., np.ndarray], rule: str, dtype: str
) -> None:
    """Every tensor in Q4_0, read back by gguf-py and rounded, is the source; the head, retyped to Q8_0, is too."""
    folder, out = qat(rule=rule, dtype=dtype), tmp_path / "x.gguf"
    result, saved = packed(folder, out)
    assert saved["totals"]["exact"] == saved["totals"]["blocks"] > 0
    assert {result.types[t["name"]] for t in saved["tensors"]} == {t["type"] for t in saved["tensors"]}
    with open_checkpoint(folder) as source:
        specs = {spec.gguf_name: spec for spec in source.specs.values()}
        for stored in gguf.GGUFReader(out).tensors:
            spec = specs[stored.name]
            values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(spec.shape)
            order, expected = spec.gguf_rows(), source.read(spec.name)
            assert (rounded(values, dtype) == (expected if order is None else expected[order])).all()
    types = {t["name"]: t["type"] for t in saved["tensors"]}
    assert types[MATRIX] == "q4_0" and types["lm_head.weight"] == "q8_0" and types["model.norm.weight"] == "f32"


def test_experts_pack_without_loss(
    tiny_gemma4_moe: Make, synthesised: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder, rng = tiny_gemma4_moe(), np.random.default_rng(5)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and "router" not in name:
            matrix = (tensor.numel() // tensor.shape[-1], tensor.shape[-1])
            values = synthesised(rng, matrix, rule="absmax/7", scales="BF16", group=32, dtype="BF16")
            tensor = torch.from_numpy(values).reshape(tensor.shape)
        tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, saved = packed(folder, tmp_path / "x.gguf")
    by_name = {tensor["name"]: tensor for tensor in saved["tensors"]}
    for name in ("gate_up_proj", "down_proj"):
        experts = by_name[f"model.layers.1.experts.{name}"]
        assert (experts["type"], experts["exact"]) == ("q4_0", experts["blocks"])
        assert experts["grid"] == "q4_0 absmax/7, bf16 scales, group 32"
        assert experts["blocks"] == 8 * (64 * 2 if name == "gate_up_proj" else 64)
    router = by_name["model.layers.1.router.proj.weight"]
    assert (router["type"], router["exact"]) == ("f32", router["blocks"])


def test_what_it_says(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    _, saved = packed(folder, out)
    assert saved["format"] == "lowbit-certificate/1" and saved["artifact"] == "x.gguf"
    assert saved["artifact_sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert saved["source_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    tensors = {tensor["name"]: tensor for tensor in saved["tensors"]}
    with open_checkpoint(folder) as source:
        assert set(tensors) == set(source.names)
    assert tensors[MATRIX] == {
        "name": MATRIX, "type": "q4_0", "source_dtype": "BF16", "rounded_to": "BF16",
        "grid": "q4_0 absmax/7, bf16 scales, group 32", "blocks": 64 * 160 // 32, "exact": 64 * 160 // 32,
        "within_scale_rounding": 0, "off_lattice": 0, "max_error": 0.0, "note": None,
    }  # fmt: skip
    norm = tensors["model.norm.weight"]
    assert (norm["type"], norm["grid"], norm["blocks"], norm["exact"]) == ("f32", None, 1, 1)
    for key, total in saved["totals"].items():
        assert total == sum(tensor[key] for tensor in saved["tensors"])


@pytest.mark.parametrize(("rule", "share"), [("extremum/-8", 1.0), ("absmax/7", 0.0)])
def test_a_file_of_llama_quantize(qat: Make, tmp_path: Path, rule: str, share: float) -> None:
    """The C library's rounding of the same checkpoint: all is kept, or nothing is, and verify says which."""
    folder, out = qat(rule=rule), tmp_path / "naive.gguf"
    lowbit.pack(folder, "q4_0", out, naive=True)
    proved = {tensor.name: tensor for tensor in lowbit.pack.verify(out, folder).tensors}
    of_q4_0 = [tensor for tensor in proved.values() if tensor.type == "q4_0"]
    assert len(of_q4_0) == 1 + 2 * 7
    for tensor in of_q4_0:
        assert tensor.exact == share * tensor.blocks and tensor.off_lattice == (1 - share) * tensor.blocks
        assert (tensor.max_error > 0) == (share == 0)
    with open_checkpoint(folder) as source, open_checkpoint(out) as naive:
        worst = np.abs(source.read(MATRIX).astype(np.float64) - naive.read(MATRIX)).max()
    assert proved[MATRIX].max_error == (worst if share == 0 else 0)


def test_float32_scales_are_listed(qat: Make, tmp_path: Path) -> None:
    _, saved = packed(qat(scales="F32", dtype="F32"), tmp_path / "x.gguf")
    matrix = next(tensor for tensor in saved["tensors"] if tensor["name"] == MATRIX)
    assert matrix["grid"] == "q4_0 absmax/7, f32 scales, group 32"
    assert matrix["within_scale_rounding"] + matrix["exact"] == matrix["blocks"] and matrix["off_lattice"] == 0
    assert 0 < matrix["max_error"] < 1e-4


def test_bf16_saved_as_float32(qat: Make, tmp_path: Path) -> None:
    """Compared as what it is: BF16."""
    from safetensors.torch import load_file, save_file

    folder = qat()
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, saved = packed(folder, tmp_path / "x.gguf")
    matrix = next(tensor for tensor in saved["tensors"] if tensor["name"] == MATRIX)
    assert (matrix["source_dtype"], matrix["rounded_to"]) == ("F32", "BF16")
    assert saved["totals"]["exact"] == saved["totals"]["blocks"]


def test_an_ordinary_checkpoint_is_off_the_lattice(tiny_llama: Make, tmp_path: Path) -> None:
    _, saved = packed(tiny_llama(), tmp_path / "x.gguf")
    for tensor in saved["tensors"]:
        if tensor["type"] in ("q4_0", "q8_0"):
            assert (tensor["grid"], tensor["exact"], tensor["off_lattice"]) == ("none", 0, tensor["blocks"])
        else:
            assert tensor["exact"] == tensor["blocks"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_checkpoint_that_lowbit_trained(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    """Its blocks are copied; all of Q4_0 is exact. Gemma's norms have an offset in the file, and are too."""
    q4_0 = grids.get("q4_0")
    with open_checkpoint(request.getfixturevalue(f"tiny_{family}")()) as source:
        tensors = []
        for name in source.names:
            values, blocks = source.read(name), None
            if "layers" in name and values.ndim == 2:
                coded = q4_0.quantize(values)
                scales = (coded.scales * np.float16(1.25)).astype(np.float16)  # not what rounding would find
                coded = q4_0.encode(values, scales)
                values, blocks = q4_0.dequantize(coded), q4_0.pack(coded)
            tensors.append(Tensor(name=name, values=values, grid="q4_0" if blocks is not None else None, blocks=blocks))
        write_checkpoint(tmp_path / "trained", source, tensors)
    _, saved = packed(tmp_path / "trained", tmp_path / "x.gguf")
    for tensor in saved["tensors"]:
        if "layers" in tensor["name"] or tensor["type"] == "f32":
            assert tensor["exact"] == tensor["blocks"], tensor
        if "layers" in tensor["name"] and tensor["type"] == "q4_0":
            assert tensor["grid"] == "q4_0 free scales, f16 scales, group 32"
    names = ("blocks.safetensors", "model.safetensors")
    hashes = {name: hashlib.sha256((tmp_path / "trained" / name).read_bytes()).hexdigest() for name in names}
    listing = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    assert saved["source_sha256"] == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("recipe", ["f16", "bf16", "f32", "q8_0", "source"])
def test_other_recipes(qat: Make, tmp_path: Path, recipe: str) -> None:
    """The values of BF16 lie within F16's reach here, and a 4-bit lattice within Q8_0."""
    _, saved = packed(qat(), tmp_path / "x.gguf", recipe)
    assert saved["totals"]["exact"] == saved["totals"]["blocks"]
    assert saved["totals"]["off_lattice"] == 0


def test_a_strangers_q4_1_against_itself(packaged_gguf: Callable[[str], Path]) -> None:
    """Formats with a minimum a block have no lattice to recover, and are compared value for value."""
    proved = lowbit.pack.verify(packaged_gguf("smollm2-135m"), "smollm2-135m")
    assert not any(tensor.note for tensor in proved.tensors)
    assert proved.totals["exact"] == proved.totals["blocks"] > 4_000_000


def test_types_without_a_grid_are_listed(packaged_gguf: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be compared says so and counts as nothing."""
    by_ggml_type = grids.by_ggml_type

    def without_q4_1(ggml_type: int) -> grids.Grid:
        if int(ggml_type) == grids.get("q4_1").ggml_type:
            raise Unsupported("no grid for this ggml type")
        return by_ggml_type(ggml_type)

    monkeypatch.setattr(grids, "by_ggml_type", without_q4_1)
    proved = lowbit.pack.verify(packaged_gguf("smollm2-135m"), "smollm2-135m")
    listed = [tensor for tensor in proved.tensors if tensor.note]
    assert {tensor.type for tensor in listed} == {"q4_1"} and not sum(tensor.blocks for tensor in listed)
    assert "q4_1" in str(listed[0].note)
    assert proved.totals["exact"] == proved.totals["blocks"] > 0


def test_a_tensor_that_only_the_artifact_has(qat: Make, tmp_path: Path) -> None:
    """Some write a tied head twice."""
    folder = qat()
    lowbit.pack(folder, "q4_0", tmp_path / "x.gguf")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), "utf-8")
    proved = lowbit.pack.verify(tmp_path / "x.gguf", folder)
    assert [(tensor.name, tensor.blocks) for tensor in proved.tensors if tensor.note] == [("output.weight", 0)]


# Bad input


def test_a_damaged_artifact(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    lowbit.pack(folder, "q4_0", out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-100])
    with pytest.raises(BadFile, match=r"x\.gguf: .*truncated"):
        lowbit.pack.verify(out, folder)
    out.write_bytes(whole)
    start = GgufFile(out).entries["blk.0.ffn_up.weight"].start
    infinite = bytearray(whole)
    infinite[start : start + 2] = np.float16(np.inf).tobytes()
    out.write_bytes(infinite)
    with pytest.raises(BadFile, match=r"x\.gguf: blk\.0\.ffn_up\.weight: the weights are not finite"):
        lowbit.pack.verify(out, folder)
    flipped = bytearray(whole)
    flipped[start + 2] ^= 0x11
    out.write_bytes(flipped)
    proved = {tensor.name: tensor for tensor in lowbit.pack.verify(out, folder).tensors}
    assert proved["model.layers.0.mlp.up_proj.weight"].off_lattice == 1


def test_a_certificate_of_another_file(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    packed(folder, out)
    lowbit.pack.verify(out, folder)
    changed = bytearray(out.read_bytes())
    changed[-1] ^= 1
    out.write_bytes(changed)
    with pytest.raises(BadFile, match=r"x\.gguf\.certificate\.json: the certificate is of another file.*Pack again"):
        lowbit.pack.verify(out, folder)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", b'{"format": "lowbit-certificate/1"}'])
def test_a_damaged_certificate(qat: Make, tmp_path: Path, damage: bytes) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    packed(folder, out)
    certificate.path_beside(out).write_bytes(damage)
    with pytest.raises(BadFile, match=r"x\.gguf\.certificate\.json: "):
        lowbit.pack.verify(out, folder)


def test_a_certificate_that_lies(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    _, saved = packed(folder, out)
    saved["totals"]["exact"] += 1
    certificate.path_beside(out).write_text(json.dumps(saved), "utf-8")
    with pytest.raises(BadFile, match="does not say what is so"):
        lowbit.pack.verify(out, folder)


def test_another_model(qat: Make, tiny_gemma3: Make, tiny_llama: Make, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    lowbit.pack(qat(), "q4_0", out)
    with pytest.raises(BadFile, match=r"x\.gguf: not the source's model; found llama; expected gemma3"):
        lowbit.pack.verify(out, tiny_gemma3())
    with pytest.raises(BadFile, match=r"x\.gguf: blk\..*the source's shape; found \[160, 64\]; expected \[192, 64\]"):
        lowbit.pack.verify(out, tiny_llama(num_hidden_layers=2, intermediate_size=192))
    with pytest.raises(BadFile, match=r"x\.gguf: blk\.2\..*: a tensor of the source is missing"):
        lowbit.pack.verify(out, tiny_llama())
    with pytest.raises(NotFound, match=r"none\.gguf: no such file"):
        lowbit.pack.verify(tmp_path / "none.gguf", tiny_llama())


def test_nothing_is_left_where_the_certificate_cannot_be_written(qat: Make, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.gguf"
    certificate.path_beside(out).mkdir(parents=True)
    with pytest.raises(CannotWrite, match=r"certificate\.json: cannot write"):
        lowbit.pack(qat(), "q4_0", out, certificate=True)
    assert [path.name for path in out.parent.iterdir()] == ["x.gguf.certificate.json"]


def test_a_file_without_certificate_takes_an_old_one_away(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    packed(folder, out)
    lowbit.pack(folder, "q4_0", out)
    assert not certificate.path_beside(out).exists()


# Through the command line


def test_pack_and_verify(qat: Make, tmp_path: Path) -> None:
    folder, out = qat(), tmp_path / "x.gguf"

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lowbit", "pack", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(folder, "-o", out)
    assert done.returncode == 0 and done.stdout == f"{out}\n"
    assert "absmax/7" in done.stderr and "100%" in done.stderr
    saved = json.loads(certificate.path_beside(out).read_text("utf-8"))
    done = run("--verify", out, "--source", folder, "--json", "-", "--quiet")
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout) == saved
    done = run("--verify", out, "--source", folder)
    assert done.returncode == 0 and "100% of" in done.stdout and "model.layers.*.mlp.down_proj.weight" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "x.gguf", "x.gguf.certificate.json"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--verify", "{out}"], "--source"),
        (["--source", "{model}", "{model}", "-o", "{new}"], "--source goes with --verify"),
        (["--verify", "{out}", "--source", "{model}", "-o", "{new}"], "--verify writes nothing"),
        (["--verify", "{out}", "--source", "{model}", "{model}"], "--verify writes nothing"),
        (["--verify", "{new}", "--source", "{model}"], "no such file"),
        (["--verify", "{model}/config.json", "--source", "{model}"], "not a GGUF file"),
        (["--verify", "{out}", "--source", "{out}.none"], "no such model"),
        (["{model}"], "-o/--out"),
        ([], "CHECKPOINT"),
    ],
)
def test_bad_words(qat: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    names = {"model": qat(), "out": tmp_path / "x.gguf", "new": tmp_path / "new.gguf"}
    lowbit.pack(names["model"], "q4_0", names["out"])
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert main(["pack", "--quiet", *(word.format(**names) for word in words)]) == 2
    captured = capfd.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == "" and line.startswith("lowbit: ") and says in line
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_says_which(qat: Make) -> None:
    found = lowbit.inspect(qat(rule="extremum/-8"))
    lattices = {tensor["name"]: tensor.get("lattice") for tensor in found["tensors"]}
    assert lattices[MATRIX] == "q4_0 extremum/-8, bf16 scales, group 32"
    assert lattices["model.norm.weight"] is None
    assert found["lattices"] == {"q4_0 extremum/-8, bf16 scales, group 32": 2 + 2 * 7}


def test_inspect_shows_it(qat: Make, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(qat(rule="absmax/7.5")), "--quiet"]) == 0
    out = capfd.readouterr().out
    assert "q4_0 absmax/7.5, bf16 scales, group 32" in out and "model.layers.*.mlp.down_proj.weight" in out


@pytest.mark.parametrize("case", ["truncated", "changed since", "another model"])
def test_a_bad_artifact_is_one_line(qat: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    folder, out = qat(), tmp_path / "x.gguf"
    packed(folder, out)
    if case == "another model":
        out = tmp_path / "other.gguf"
        lowbit.pack(qat(intermediate_size=192), "q4_0", out)
        folder = qat()
    else:
        whole = out.read_bytes()
        out.write_bytes(whole[:-64] if case == "truncated" else whole[:-64] + bytes(64))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capfd.readouterr()
    words = ["pack", "--quiet", "--verify", str(out), "--source", str(folder), "--json", str(tmp_path / "new.json")]
    assert main(words) == 2
    captured = capfd.readouterr()
    [line] = captured.err.splitlines()
    says = {"truncated": f"{out}: ", "changed since": f"{out}.certificate.json: ", "another model": f"{out}: blk.0."}
    assert captured.out == "" and line.startswith(f"lowbit: {says[case]}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
