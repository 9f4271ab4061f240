"""Chat templates of a release: where they are, what is wrong with them, and what they render, in a child process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint.gguf_file import read_fields
from lowbit.errors import BadFile, LowbitError
from lowbit.release.members import read_loosely

GGUF_KEY = "tokenizer.chat_template"
_JSONS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
_SECONDS = 30.0  # of the clock, imports included; the child limits its own CPU time to less
_LONGEST = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What one conversation became. text: None where there is none; why: the template's or the sandbox's reason.
    kind: 'text', 'refused' (by the template's own raise_exception), 'error', 'escape' or 'too_much'."""

    kind: str
    text: str | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a child made of a template: who rendered, sentences about what is unsafe in it, a result for each job."""

    renderer: str
    unsafe: tuple[str, ...]
    results: tuple[Rendered, ...]


def of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Name and source of every chat template in one file. Raises OSError, BadFile."""
    if path.suffix == ".jinja":
        if path.stat().st_size > _LONGEST:
            raise BadFile("larger than any chat template", where=path, expected=f"at most {_LONGEST:,} bytes")
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
    elif path.suffix == ".gguf":
        for field in read_fields(path):
            if field.key.startswith(GGUF_KEY) and isinstance(field.value, str):
                yield field.key, field.value
    elif path.name in _JSONS:
        yield from _named(read_loosely(path).get("chat_template"), path.name)


def of_folder(folder: Path) -> str | None:
    """The template that transformers takes from a folder: chat_template.jinja, else the settings' default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return next((source for _, source in of_file(file)), None)
    found = dict(_named(read_loosely(folder / "tokenizer_config.json").get("chat_template"), "default"))
    return found.get("default")


def of_gguf(values: Any) -> str | None:
    found = values.get(GGUF_KEY)
    return found if isinstance(found, str) and found else None


def _named(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):  # several, each with a name; transformers takes the one called default
        for entry in value:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                yield str(entry.get("name")), entry["template"]
    elif isinstance(value, dict):
        yield from ((str(key), source) for key, source in value.items() if isinstance(source, str))


def render(template: str, jobs: Sequence[dict[str, Any]], *, bos_token: str, eos_token: str) -> Outcome:
    """Renders a template with each of ``jobs`` ({messages, tools, add_generation_prompt, variables}) in a child process
    of limited time and memory. Raises BadFile where the child runs into the limits."""
    asked = {"template": template, "bos_token": bos_token, "eos_token": eos_token, "jobs": list(jobs)}
    return _render(json.dumps(asked, ensure_ascii=True))


@functools.lru_cache(maxsize=64)
def _render(asked: str) -> Outcome:
    command = [sys.executable, "-P", "-m", "lowbit.release._render_child"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BadFile("the chat template does not end", found=f"still at work after {_SECONDS:.0f} s") from None
    if done.returncode < 0:
        raise BadFile("the chat template does not end", found=f"stopped by signal {-done.returncode}, out of CPU time")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        raise BadFile("the chat template cannot be rendered", found=said[-1][:200] if said else None) from None
    return Outcome(
        renderer=found["renderer"],
        unsafe=tuple(found["unsafe"]),
        results=tuple(_rendered(result) for result in found["results"]),
    )


def _rendered(result: dict[str, str]) -> Rendered:
    kind, said = next(iter(result.items()))
    return Rendered(kind="text", text=said) if kind == "text" else Rendered(kind=kind, why=said)


def problems(source: str, jobs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Why a template is not to be run anywhere: sentences, none for a harmless one."""
    try:
        outcome = render(source, jobs, bos_token="<bos>", eos_token="<eos>")
    except LowbitError as error:
        yield str(error)
        return
    yield from outcome.unsafe
    for kind, words in (("escape", "it tries to leave its sandbox"), ("too_much", "it asks for too much")):
        if said := next((result.why for result in outcome.results if result.kind == kind), None):
            yield f"{words}: {said}"
