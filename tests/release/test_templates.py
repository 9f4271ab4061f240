"""Chat templates in jinja and in llama.cpp's own engine; wrong ones are caught and named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_fixtures import TEMPLATE, change_json, failures, set_key

from lowbit.check import check
from lowbit.release import templates
from lowbit.release.checks.chat_template import CASES
from lowbit.release.conversations import CONVERSATIONS

GGUF = "model-q4_0.gguf"
KEY = "tokenizer.chat_template"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def wrong_template(root: Path) -> None:
    set_key(root / GGUF, KEY, CHATML.replace("<|im_start|>", "<|user|>"))


def tools_in_another_way(root: Path) -> None:
    set_key(root / GGUF, KEY, TEMPLATE.replace("Tools:", "Functions:"))


def no_beginning_of_an_answer(root: Path) -> None:
    set_key(root / GGUF, KEY, TEMPLATE.replace("<|im_start|>assistant\\n' }}\n{%- endif", "' }}\n{%- endif"))


def no_template(root: Path) -> None:
    set_key(root / GGUF, KEY, None)


def mlx_of_another_day(root: Path) -> None:
    change_json(root / "mlx" / "tokenizer_config.json", chat_template=TEMPLATE.replace("system\\n'", "system '"))


CASES_OF_BAD: dict[Callable[[Path], None], str] = {
    wrong_template: "model-q4_0.gguf has another chat template: one question",
    tools_in_another_way: "model-q4_0.gguf has another chat template: tools: ",
    no_beginning_of_an_answer: "model-q4_0.gguf has another chat template: one question",
    no_template: "model-q4_0.gguf has no chat template",
    mlx_of_another_day: "mlx has another chat template: a system message",
}


@pytest.mark.parametrize("spoil", CASES_OF_BAD, ids=lambda spoil: spoil.__name__)
def test_a_wrong_template_is_caught_and_named(release: Path, spoil: Callable[[Path], None]) -> None:
    spoil(release)
    (release / f"{GGUF}.certificate.json").unlink()
    found = failures(release, quick=True)
    assert list(found) == ["chat-template"], found
    assert CASES_OF_BAD[spoil] in found["chat-template"]


def test_another_text_that_renders_the_same_passes(release: Path) -> None:
    set_key(release / GGUF, KEY, "{# a comment #}" + TEMPLATE)
    (found,) = check(release, only=["chat-template"], quick=True)["checks"]
    assert found["status"] == "pass"
    assert "renders the same" in found["detail"]


def test_llama_cpps_engine_renders_what_jinja_does(good_release: Path) -> None:
    (found,) = check(good_release, only=["chat-template"])["checks"]
    assert found["status"] == "pass", found
    assert "model-q4_0.gguf: 14 renderings in llama.cpp (plain, system, thinking, tools)" in found["detail"]
    assert found["runtimes"]["transformers"]


def test_an_engine_that_renders_otherwise_is_named(release: Path) -> None:
    """The same text everywhere, with a filter after which jinja2 escapes quotes and llama.cpp's engine does not."""
    odd = CHATML + """{{ 'a' | safe + '"' }}"""
    (release / "base" / "chat_template.jinja").write_text(odd)
    change_json(release / "mlx" / "tokenizer_config.json", chat_template=odd)
    set_key(release / GGUF, KEY, odd)
    (found,) = check(release, only=["chat-template"])["checks"]
    assert found["status"] == "fail", found
    assert "model-q4_0.gguf: llama.cpp renders it in another way" in found["detail"]


def test_the_child_renders_what_apply_chat_template_does(good_release: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(good_release / "base")
    jobs = [case.job() for case in CASES if case.conversation.kind != "images"]
    outcome = templates.render(TEMPLATE, jobs, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    assert outcome.renderer.startswith("transformers")
    for job, rendered in zip(jobs, outcome.results, strict=True):
        expected = tokenizer.apply_chat_template(
            job["messages"], tools=job["tools"], add_generation_prompt=job["add_generation_prompt"], tokenize=False,
            **job["variables"],
        )  # fmt: skip
        assert rendered.text == expected


def test_every_kind_of_conversation_is_there() -> None:
    assert {c.kind for c in CONVERSATIONS} == {"plain", "system", "tools", "thinking", "images"}
    json.dumps([case.job() for case in CASES])
