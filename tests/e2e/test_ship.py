"""``lowbit ship`` through the real command line: what it leaves, what the files hold, and the other verbs on it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.gguf_file import GgufFile

Command = Callable[..., subprocess.CompletedProcess[str]]

CERTIFICATE = "model-q4_0.gguf.certificate.json"
NAMED = {
    "reference.gguf",
    "naive-q4_0.gguf",
    "model-q4_0.gguf",
    CERTIFICATE,
    "lowbit.json",
    "lowbit.lock",
    "report.html",
}
KEPT = {"calibrated-q4_0.gguf", "checkpoint", "work"}
FIGURES = ("perplexity", "kld_mean", "kld_p99", "top1", "rms_delta_p")


@pytest.fixture(scope="module")
def shipped(
    lowbit_command: Command, few_steps: tuple[str, ...], smol_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run folder and what the command printed; model and folder given as relative paths."""
    here = tmp_path_factory.mktemp("ship")
    shutil.copytree(smol_folder, here / "model")
    done = lowbit_command("ship", "model", "--out", "run", *few_steps, "--json", "run.json", cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "run", done


@pytest.fixture
def run(shipped: tuple[Path, Any]) -> Path:
    return shipped[0]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time of change and content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_named_files_and_the_report_last(shipped: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, done = shipped
    assert {path.name for path in run.iterdir()} == NAMED | KEPT
    assert not list(run.rglob("*.partial"))
    assert done.stdout == f"{(run / 'report.html').resolve()}\n"
    assert "Distilling" in done.stderr and "99th percentile KLD" in done.stderr
    assert "blocks are what training ended on, bit for bit" in done.stderr
    assert json.loads((run.parent / "run.json").read_text()) == json.loads((run / "lowbit.json").read_text())


def test_the_record(run: Path) -> None:
    record = json.loads((run / "lowbit.json").read_text(encoding="utf-8"))
    assert record["format"] == "lowbit-run/1" and record["recipe"] == "q4_0"
    assert record["command"].startswith("lowbit ship model --out run")
    assert record["model"]["source"] == "model" and record["model"]["architecture"] == "llama"
    assert [stage["name"] for stage in record["stages"]] == [
        "reference", "naive", "train", "calibrated", "pack", "measure",
    ]  # fmt: skip
    assert all(stage["seconds"] > 0 for stage in record["stages"])
    assert set(record["files"]) == {path.name for path in run.glob("*.gguf")}
    for name, entry in record["files"].items():
        assert entry["size_bytes"] == (run / name).stat().st_size
        assert len(entry["sha256"]) == 64
    assert [phase["name"] for phase in record["training"]["phases"]] == ["nearest", "calibrated", "distilled"]
    training = record["training"]
    assert training["curve"][-1]["step"] == 3 and training["curve"][-1]["kld"] > 0
    assert training["learning_rate"] == 1e-4 and training["precision"] in ("float32", "bfloat16")
    # What the run says it took is what its stages took, distillation included.
    seconds = {stage["name"]: stage["seconds"] for stage in record["stages"]}
    assert training["stages"]["distil"] > 0
    assert seconds["train"] >= sum(training["stages"].values()) - 0.01
    assert training["data"]["unique_tokens"] == training["phases"][-1]["tokens"] == 3 * 2 * 512
    assert set(record["model"]["files"]) == {"config.json", "model.safetensors"}
    measured = {Path(a["path"]).name: a["fidelity"] for a in record["measure"]["artifacts"]}
    assert list(measured) == ["naive-q4_0.gguf", "calibrated-q4_0.gguf", "model-q4_0.gguf"]
    for fidelity in measured.values():
        for name in FIGURES:
            figure = fidelity[name]
            assert figure["low"] <= figure["value"] <= figure["high"], name
    # The middle phase's figure is the middle file's.
    assert record["training"]["phases"][1]["kld"] == measured["calibrated-q4_0.gguf"]["kld_mean"]
    assert measured["calibrated-q4_0.gguf"]["kld_mean"]["value"] < measured["naive-q4_0.gguf"]["kld_mean"]["value"]


def test_every_block_of_the_product_is_certified(run: Path, lowbit_command: Command) -> None:
    certificate = json.loads((run / CERTIFICATE).read_text(encoding="utf-8"))
    totals = certificate["totals"]
    assert totals["blocks"] == totals["exact"] > 0 == totals["off_lattice"] == totals["within_scale_rounding"]
    q4_0 = [tensor for tensor in certificate["tensors"] if tensor["type"] == "q4_0"]
    assert len(q4_0) == 2 * 7 and all(tensor["exact"] == tensor["blocks"] > 0 for tensor in q4_0)
    record = json.loads((run / "lowbit.json").read_text(encoding="utf-8"))
    assert certificate["artifact_sha256"] == record["files"]["model-q4_0.gguf"]["sha256"]
    assert record["certificate"]["totals"] == totals and set(record["certificate"]["types"]) == {"q4_0", "q8_0", "f32"}
    assert f"100% of {totals['blocks']:,} blocks of the shipped file" in (run / "report.html").read_text("utf-8")
    done = lowbit_command("pack", "--verify", run / "model-q4_0.gguf", "--source", run / "checkpoint", "--json", "-")
    assert json.loads(done.stdout)["totals"] == totals


def test_the_product_is_no_larger_than_the_naive_file(run: Path) -> None:
    assert (run / "model-q4_0.gguf").stat().st_size <= (run / "naive-q4_0.gguf").stat().st_size
    types = [{n: e.dtype for n, e in GgufFile(run / f"{n}-q4_0.gguf").entries.items()} for n in ("model", "naive")]
    assert types[0] == types[1]


@pytest.mark.parametrize(
    ("folder", "file"), [("checkpoint", "model-q4_0.gguf"), ("work/training/start", "calibrated-q4_0.gguf")]
)
def test_the_file_holds_the_codes_that_training_ended_on(run: Path, folder: str, file: str) -> None:
    """Every block of blocks.safetensors, byte for byte; the file's reader undoes the row order of queries and keys."""
    on_grid = 0
    with open_checkpoint(run / folder) as trained, open_checkpoint(run / file) as packed:
        assert trained.names == packed.names
        for name in trained.names:
            blocks = trained.blocks(name)
            if blocks is not None:
                on_grid += 1
                assert np.array_equal(blocks, packed.blocks(name)), name
            assert np.array_equal(trained.read(name), packed.read(name)), name
    assert on_grid == 2 * 7 + 1  # every matrix of two layers, and the embedding


def test_the_rows_of_queries_are_permuted_in_the_file(run: Path) -> None:
    """Without the checkpoint reader: raw bytes of the tensor, in llama.cpp's order of rotary pairs."""
    import safetensors.numpy

    blocks = safetensors.numpy.load_file(run / "checkpoint" / "blocks.safetensors")
    entry = GgufFile(run / "model-q4_0.gguf").entries["blk.1.attn_q.weight"]
    raw = (run / "model-q4_0.gguf").read_bytes()[entry.start : entry.start + entry.n_bytes]
    ours = blocks["model.layers.1.self_attn.q_proj.weight"]
    heads, rows = 4, ours.shape[0]
    theirs = ours.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
    assert raw == theirs.tobytes() and raw != ours.tobytes()


def test_training_moved_the_codes(run: Path) -> None:
    with open_checkpoint(run / "model-q4_0.gguf") as product, open_checkpoint(run / "naive-q4_0.gguf") as naive:
        name = "model.layers.0.mlp.down_proj.weight"
        assert not np.array_equal(product.blocks(name), naive.blocks(name))


def test_again_finishes_and_changes_no_file(
    shipped: tuple[Path, Any], lowbit_command: Command, few_steps: tuple[str, ...]
) -> None:
    run, _ = shipped
    before = state(run)
    done = lowbit_command("ship", "model", "--out", "run", *few_steps, cwd=run.parent)
    assert done.returncode == 0 and done.stdout == f"{(run / 'report.html').resolve()}\n"
    assert "Distilling" not in done.stderr and "Measuring" not in done.stderr
    assert state(run) == before


def test_json_alone_on_standard_output_and_quiet(
    shipped: tuple[Path, Any], lowbit_command: Command, few_steps: tuple[str, ...]
) -> None:
    run, _ = shipped
    done = lowbit_command("ship", "model", "--out", "run", *few_steps, "--json", "-", "--quiet", cwd=run.parent)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout) == json.loads((run / "lowbit.json").read_text(encoding="utf-8"))


def test_a_folder_that_was_moved_goes_on(
    shipped: tuple[Path, Any], lowbit_command: Command, few_steps: tuple[str, ...], tmp_path: Path
) -> None:
    run, _ = shipped
    shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "moved" / "model-q4_0.gguf").unlink()
    done = lowbit_command("ship", run.parent / "model", "--out", tmp_path / "moved", *few_steps)
    assert done.returncode == 0, done.stderr
    assert "Distilling" not in done.stderr and "naive:" not in done.stderr
    assert (tmp_path / "moved" / "model-q4_0.gguf").read_bytes() == (run / "model-q4_0.gguf").read_bytes()
    page = (tmp_path / "moved" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "moved") in page and str(run.resolve()) not in page


@pytest.mark.parametrize("words", [["model", "--seed", "1"], ["other"], ["model", "--start", "nearest"]], ids=str)
def test_another_run_in_the_same_folder_is_refused(
    shipped: tuple[Path, Any], lowbit_command: Command, few_steps: tuple[str, ...], words: list[str]
) -> None:
    run, _ = shipped
    if not (run.parent / "other").exists():
        shutil.copytree(run.parent / "model", run.parent / "other")
    before = state(run)
    done = lowbit_command("ship", *words, "--out", "run", *few_steps, cwd=run.parent)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("lowbit: run: ") and "another model or with other options" in line
    assert state(run) == before


# The other verbs on what ship left.


def test_measure(run: Path, lowbit_command: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 60, encoding="utf-8")
    files = [run / "naive-q4_0.gguf", run / "model-q4_0.gguf"]
    words = ("--against", run / "reference.gguf", "--text", tmp_path / "text.txt", "--chunk", 128, "--no-speed")
    done = lowbit_command("measure", *files, *words, "--threads", 1, "--json", "-", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    artifacts = json.loads(done.stdout)["artifacts"]
    assert [a["path"] for a in artifacts] == [str(path) for path in files]
    for artifact in artifacts:
        assert artifact["size_bytes"] == Path(artifact["path"]).stat().st_size
        assert set(FIGURES) < set(artifact["fidelity"])


def test_pack_writes_the_same_file_again(run: Path, lowbit_command: Command, tmp_path: Path) -> None:
    done = lowbit_command("pack", run / "checkpoint", "--recipe", "q4_0", "-o", tmp_path / "again.gguf")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'again.gguf'}\n"
    assert (tmp_path / "again.gguf").read_bytes() == (run / "model-q4_0.gguf").read_bytes()


def test_inspect(run: Path, lowbit_command: Command) -> None:
    found = json.loads(lowbit_command("inspect", run / "model-q4_0.gguf", "--json", "-").stdout)
    assert found["architecture"] == "llama" and found["problem"] is None
    record = json.loads((run / "lowbit.json").read_text(encoding="utf-8"))
    assert found["bits_per_weight"] == record["files"]["model-q4_0.gguf"]["bits_per_weight"]
    assert len(found["tensors"]) == len(record["grids"])


def test_report(run: Path, lowbit_command: Command) -> None:
    page = (run / "report.html").read_bytes()
    done = lowbit_command("report", run)
    assert done.returncode == 0 and done.stdout == f"{(run / 'report.html').resolve()}\n"
    assert (run / "report.html").read_bytes() == page


def test_chat(run: Path, lowbit_command: Command) -> None:
    done = lowbit_command("chat", run / "model-q4_0.gguf", "--prompt", "Hello", "--max-tokens", 4, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_run_passes_lowbit_check(lowbit_command: Command, run: Path) -> None:
    """Its lock names what ships; every check that has something to look at passes, in the runtimes too."""
    done = lowbit_command("check", run, "--json", "-")
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["lock"] == str(run / "lowbit.lock")
    roles = {member["role"]: member["path"] for member in result["members"]}
    assert roles == {"base": "reference.gguf", "checkpoint": "checkpoint", "artifact": "model-q4_0.gguf"} | {
        role: path for role, path in roles.items() if role in ("tokenizer", "chat_template")
    }
    status = {found["name"]: found["status"] for found in result["checks"]}
    assert {name for name, said in status.items() if said == "n/a"} == {"projector", "drafter"}, result
