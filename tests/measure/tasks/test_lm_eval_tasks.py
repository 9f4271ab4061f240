"""lm-eval's tasks through lm-eval: our model against its own `hf` one and our own scorer; files with code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit import pack
from lowbit.errors import BadText, NotFound, Unsupported
from lowbit.measure import MeasureOptions, measure
from lowbit.measure.tasks import TaskOptions, open_tasks
from lowbit.measure.tasks._engine import InProcess
from lowbit.measure.tasks._journal import Journal
from lowbit.run.llama_cpp import LlamaCpp

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lowbit[lm-eval]'"
)
OPTIONS = MeasureOptions(threads=1, speed=False, memory=False)
CHOICE = """
task: mini
dataset_path: json
dataset_kwargs: {data_files: {test: mini.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """
task: mini_generate
dataset_path: json
dataset_kwargs: {data_files: {test: mini.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["z"], max_gen_toks: 6, do_sample: false}
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: mini_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: mini.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[..., Any]) -> tuple[Path, Path]:
    """A tiny random llama as a Hugging Face folder, and its F32 GGUF."""
    folder = tmp_path_factory.mktemp("lm-eval")
    save_tiny_llama(folder / "hf", max_position_embeddings=512)
    pack.pack(folder / "hf", "f32", folder / "f32.gguf")
    return folder / "hf", folder / "f32.gguf"


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """task(yaml): a task file, with 24 questions beside it."""

    def write(text: str, name: str = "task.yaml") -> Path:
        lines = [
            {
                "question": f"What comes after {i} and the {i * 7 % 11}?",
                "choices": ["the end", f"{i + 1}", "then a ring in the hat"],
                "answer": i % 3,
            }
            for i in range(24)
        ]
        (tmp_path / "mini.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def scores(result: dict[str, Any], metric: str) -> list[float]:
    return [o["scores"][metric] for o in result["tasks"][0]["results"][0]["outcomes"]]


def theirs(folder: Path, task: Path) -> list[dict[str, Any]]:
    """The same task by lm-eval's own `hf` model, in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lowbit.measure.tasks import _lm_eval_files

    config = _lm_eval_files.read(task, allow_code=False)
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)
    light = TaskManager(include_defaults=False)
    found = simple_evaluate(model=hf, tasks=[config], bootstrap_iters=0, task_manager=light)
    assert found is not None
    samples: list[dict[str, Any]] = found["samples"][config["task"]]
    return samples


def test_accuracies_are_those_of_the_hf_model_and_of_our_own_scorer(
    model: tuple[Path, Path], task: Callable[..., Path], tmp_path: Path
) -> None:
    folder, gguf = model
    path = task(CHOICE)
    ours = measure(gguf, tasks=TaskOptions(tasks=[str(path)]), options=OPTIONS)
    own = measure(gguf, tasks=TaskOptions(tasks=[str(tmp_path / "mini.jsonl")]), options=OPTIONS)
    samples = theirs(folder, path)
    for metric in ("acc", "acc_norm"):
        expected = [sample[metric] for sample in samples]
        assert len(expected) == 24 and 0 < sum(expected) < 24
        assert scores(ours, metric) == scores(own, metric) == expected


def test_few_shots_and_a_limit(model: tuple[Path, Path], task: Callable[..., Path]) -> None:
    path = task(CHOICE + "fewshot_split: test\n")
    found = measure(model[1], tasks=TaskOptions(tasks=[str(path)], shots=2, limit=4), options=OPTIONS)["tasks"][0]
    assert (found["items"], found["total"], found["shots"]) == (4, 24, 2)
    assert [o["id"] for o in found["results"][0]["outcomes"]] == ["0", "6", "12", "18"]


def test_generated_answers_and_rolling_likelihoods_too(model: tuple[Path, Path], task: Callable[..., Path]) -> None:
    folder, gguf = model
    found = open_tasks(TaskOptions(tasks=[str(task(ROLLING))], limit=3))[0]
    with LlamaCpp(gguf, context=256, threads=1) as llama, Journal("x") as journal:
        list(found.outcomes(InProcess(llama), journal))
        ours = [journal.done[i.id]["scores"]["byte_perplexity"] for i in found.items]
        journal.remove()
    samples = [sample["byte_perplexity"] for sample in theirs(folder, task(ROLLING))[::8]]
    assert ours == pytest.approx([-loglikelihood / n for loglikelihood, n in samples], rel=1e-4)
    result = measure(gguf, tasks=TaskOptions(tasks=[str(task(GENERATE))], limit=3), options=OPTIONS)
    assert all("z" not in o["answer"] for o in result["tasks"][0]["results"][0]["outcomes"])


def test_answers_to_requests_are_journalled(model: tuple[Path, Path], task: Callable[..., Path]) -> None:
    found = open_tasks(TaskOptions(tasks=[str(task(CHOICE))], limit=3))[0]
    with LlamaCpp(model[1], context=256, threads=1) as llama, Journal("y") as journal:
        list(found.outcomes(InProcess(llama), journal))
        kept = dict(journal.done)
        for item in found.items:
            del journal.done[item.id]
        engine = InProcess(llama)
        llama.close()  # what is asked again comes from the journal alone
        engine.share = lambda contexts: None  # type: ignore[method-assign]
        list(found.outcomes(engine, journal))
        assert journal.done == kept
        journal.remove()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("process_docs: !function evil.run\n", "line 13: the task runs code; found !function evil.run"),
        ("class: !!python/name:os.system\n", "the task runs code"),
        ("include: other.yaml\n", "other.yaml: line 1: the task runs code"),
        ("metric_list: [{metric: ./evil.py}]\n", "code that lm-eval would fetch and run"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "code that lm-eval would fetch and run"),
    ],
)
def test_a_file_that_would_run_code_is_refused(task: Callable[..., Path], more: str, says: str) -> None:
    path = task(CHOICE.replace("metric_list", "metadata" if "metric_list" in more else "metric_list") + more)
    (path.parent / "evil.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')\ndef run(docs): return docs\n")
    task("process_docs: !function evil.run\n", "other.yaml")
    with pytest.raises(Unsupported) as caught:
        open_tasks(TaskOptions(tasks=[str(path)]))
    assert says in str(caught.value) and not (path.parent / "ran").exists()


def test_code_runs_where_the_user_says_so(task: Callable[..., Path]) -> None:
    path = task(CHOICE + "process_docs: !function evil.run\n")
    (path.parent / "evil.py").write_text("def run(docs): return docs.select(range(2))\n")
    assert open_tasks(TaskOptions(tasks=[str(path)], allow_code=True))[0].total == 2


def test_templates_stay_in_the_sandbox(task: Callable[..., Path]) -> None:
    path = task(CHOICE.replace("{{question}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(NotFound, match="unsafe"):
        open_tasks(TaskOptions(tasks=[str(path)]))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("task: [", BadText, "not YAML"),
        ("- 1\n", BadText, "lm-eval cannot read"),
        ("group: x\ntask: [a, b]\n", BadText, "no task of its own"),
        ("include: task.yaml\n", BadText, "includes itself"),
        (CHOICE.replace("mini.jsonl", "gone.jsonl"), NotFound, "cannot set up this task"),
        (CHOICE.replace("dataset_path: json", "dataset_path: no-one/nothing"), NotFound, "cannot set up this task"),
    ],
)
def test_what_cannot_be_a_task_is_one_line(task: Callable[..., Path], text: str, error: Any, says: str) -> None:
    with pytest.raises(error) as caught:
        open_tasks(TaskOptions(tasks=[str(task(text))]))
    assert says in str(caught.value) and "\n" not in str(caught.value)
