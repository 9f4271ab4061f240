"""Does the chat template render the same everywhere: the folder's, the artifacts', and llama.cpp's own engine?"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.release import templates
from lowbit.release.checks.base import Check, Findings, NotApplicable, printable, shortened
from lowbit.release.conversations import CONVERSATIONS, Conversation
from lowbit.release.expected import PREFIX, tokens_of
from lowbit.release.members import Member, read_loosely
from lowbit.release.release_set import TEXT_MODELS, ReleaseSet
from lowbit.release.templates import Rendered
from lowbit.release.tokenizing import version

# llama.cpp tells every template to think and which day it is, transformers tells none: both are told the same here.
_VARIABLES = {"enable_thinking": False, "date_string": "1 Jan 2026"}
_ADVICE = (
    "Take the chat template of the model's release: convert the artifact again, or give it with --chat-template-file"
)
_ENGINE_ADVICE = (
    "llama.cpp's engine renders this template in another way: simplify what it trips over, or report it there"
)
_CONTEXT = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One rendering: a conversation, and whether an answer is begun."""

    conversation: Conversation
    begins_answer: bool

    @property
    def variables(self) -> dict[str, Any]:
        return _VARIABLES | self.conversation.variables

    def __str__(self) -> str:
        plain = len(self.conversation.prompts) == 1 or self.begins_answer
        return self.conversation.name + ("" if plain else " without the beginning of an answer")

    def job(self, *, objects: bool = True, tools: bool = True) -> dict[str, Any]:
        """What templates.render takes; ``objects``: a call's arguments as an object rather than as text."""
        return {
            "messages": self.conversation.with_objects() if objects else self.conversation.messages,
            "tools": self.conversation.tools if tools else None,
            "add_generation_prompt": self.begins_answer,
            "variables": self.variables,
        }


CASES = tuple(Case(conversation=c, begins_answer=begins) for c in CONVERSATIONS for begins in c.prompts)


class ChatTemplate(Check):
    name = "chat-template"
    question = "the chat template renders the same in jinja and in the runtime"
    rank = 90
    after = ("safety", "architecture", "vocabulary", "special-tokens")
    roles = (*TEXT_MODELS, "tokenizer", "chat_template", "projector")

    def run(self, release: ReleaseSet, found: Findings) -> None:
        folder = _folder(release)
        reference = templates.of_folder(folder) if folder is not None else None
        compared = 0
        for member in release.text_models:
            if member.container != "gguf" and (member.path == folder or not (member.path / "config.json").is_file()):
                continue
            source = _source(release, member)
            if source is None and (reference is None or member.role == "base"):
                continue
            if source is None:
                if member.container == "gguf" or _has_tokenizer(member.path):
                    found.problem(f"{member} has no chat template, and {folder and folder.name} has one", _ADVICE)
                continue
            compared += 1
            if reference is not None and source != reference:
                with found.problems_of(member):
                    self._in_jinja(reference, source, member, found)
        if found.problems:
            return
        if not found.quick:
            compared += self._in_llama_cpp(release, reference, found)
        if not compared:
            raise NotApplicable("no chat template here")

    def _in_jinja(self, reference: str, source: str, member: Member, found: Findings) -> None:
        """Two sources that differ may yet render the same."""
        ours, theirs = (_rendered(template, "<bos>", "<eos>") for template in (reference, source))
        wrong = [
            f"{case}: {_difference(ours[case], theirs[case])}" for case in CASES if _differ(ours[case], theirs[case])
        ]
        if wrong:
            found.problem(f"{member} has another chat template: {shortened(wrong, 2)}", _ADVICE)
        else:
            found.note(f"{member}: another text of the template, which renders the same")

    def _in_llama_cpp(self, release: ReleaseSet, reference: str | None, found: Findings) -> int:
        """Every GGUF's template in llama.cpp's server; one of several GGUFs with the same template and tokens."""
        from lowbit.run.llama_server import LlamaServer

        seen: set[str] = set()
        projector = release.one("projector")
        for member in release.ggufs("artifact", "checkpoint", "base"):
            values = release.values(member)
            source = templates.of_gguf(values)
            if source is None or source in seen:
                continue
            seen.add(source)
            bos, eos = (_spelled(values, end) for end in ("bos", "eos"))
            sight = projector.path if projector is not None and not found.problems else None
            with (
                found.problems_of(member, _ENGINE_ADVICE),
                LlamaServer(member.path, context=_CONTEXT, threads=1, mmproj=sight) as server,
            ):
                found.runtimes["llama.cpp"] = f"xllamacpp {version('xllamacpp')}"
                found.runtimes["transformers"] = str(version("transformers"))
                self._compare(reference or source, bos, eos, member, server.rendered, found, sees=sight is not None)
        return len(seen)

    def _compare(
        self,
        source: str,
        bos: str,
        eos: str,
        member: Member,
        render: Callable[..., str],
        found: Findings,
        *,
        sees: bool,
    ) -> None:
        """The template in jinja and in ``render``, of every conversation that it knows how to render."""
        cases = [c for c in CASES if not c.conversation.is_continued and (c.conversation.kind != "images" or sees)]
        as_objects, as_text, without = (_rendered(source, bos, eos, **how) for how in _HOW)
        wrong, compared = [], []
        for case in cases:
            accepted = [r.text for r in (as_objects[case], as_text[case]) if r.text is not None]
            if not accepted:
                continue  # the template refuses it, as Gemma 2's does a system message
            if case.conversation.tools and as_objects[case].text == without[case].text:
                continue  # it knows no tools, and llama.cpp has its own way of telling of them
            if case.conversation.kind == "images":
                accepted = [_without_media(text) for text in accepted]
            try:
                text = _in_server(render, case)
            except LowbitError as error:
                wrong.append(f"{case}: llama.cpp refuses it ({error})")
                continue
            compared.append(case)
            if not any(_same(text, ours, bos) for ours in accepted):
                wrong.append(
                    f"{case}: {_difference(Rendered(kind='text', text=accepted[0]), Rendered(kind='text', text=text))}"
                )
        if wrong:
            found.problem(f"{member}: llama.cpp renders it in another way: {shortened(wrong, 2)}", _ENGINE_ADVICE)
            return
        kinds = sorted({case.conversation.kind for case in compared})
        found.note(f"{member}: {len(compared)} renderings in llama.cpp ({', '.join(kinds)})")
        thinks = _plain(render)
        if (
            thinks is not None
            and as_objects[CASES[0]].text != thinks
            and not _same(thinks, as_objects[CASES[0]].text, bos)
        ):
            found.note("llama-server thinks unless it is told not to (enable_thinking)")


_HOW: tuple[dict[str, Any], ...] = ({}, {"objects": False}, {"tools": False})


def _rendered(source: str, bos: str, eos: str, **how: Any) -> dict[Case, Rendered]:
    """Every case's rendering in jinja. Raises BadFile."""
    outcome = templates.render(source, [case.job(**how) for case in CASES], bos_token=bos, eos_token=eos)
    return dict(zip(CASES, outcome.results, strict=True))


def _in_server(render: Callable[..., str], case: Case) -> str:
    extra = {"tools": case.conversation.tools} if case.conversation.tools else {}
    return render(
        _openai(case.conversation.messages), add_generation_prompt=case.begins_answer,
        chat_template_kwargs=case.variables, **extra,
    )  # fmt: skip


def _plain(render: Callable[..., str]) -> str | None:
    """One question without a word on thinking."""
    try:
        variables = {"date_string": _VARIABLES["date_string"]}
        return render(CASES[0].conversation.messages, add_generation_prompt=True, chat_template_kwargs=variables)
    except LowbitError:
        return None


def _openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them: an image is an address, here of a small picture in itself."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                {"type": "image_url", "image_url": {"url": _picture()}} if p["type"] == "image" else p for p in content
            ]
            message = message | {"content": parts}
        found.append(message)
    return found


def _picture() -> str:
    """A white PNG of 64 x 64 pixels as a data URI."""
    size = 64
    rows = (b"\0" + b"\xff" * (3 * size)) * size

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_MEDIA = (
    "<__media__>",
    "<start_of_image>",
    "<|image|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image>",
    "[IMG]",
)


def _without_media(text: str) -> str:
    """llama.cpp puts the marks of an image where the picture goes, after the template: they are not compared."""
    for mark in _MEDIA:
        text = text.replace(mark, "")
    return "".join(text.split())


def _same(text: str, ours: str | None, bos: str) -> bool:
    """Whether two renderings are the same prompt: a first BOS is the tokenizer's to put there, or the template's."""
    if ours is None:
        return False
    without = [t.removeprefix(bos) if bos else t for t in (text, ours)]
    return without[0] == without[1] or ("<__media" in text and _media_same(text, ours))


def _media_same(text: str, ours: str) -> bool:
    import re

    return _without_media(re.sub(r"<__media[^>]*>", "", text)) == _without_media(ours)


def _differ(one: Rendered, other: Rendered) -> bool:
    return one.kind != other.kind or one.text != other.text


def _difference(one: Rendered, other: Rendered) -> str:
    """The first place where two renderings part, in words."""
    if one.text is None or other.text is None:
        return f"{_said(other)}, should be {_said(one)}"
    pairs = zip(one.text, other.text, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.text), len(other.text)))
    start = max(0, at - 12)
    return f"{printable(other.text[start : at + 28])} where {printable(one.text[start : at + 28])} should be"


def _said(rendered: Rendered) -> str:
    return printable(rendered.text, 40) if rendered.text is not None else f"{rendered.kind} ({rendered.why[:80]})"


def _folder(release: ReleaseSet) -> Path | None:
    member = release.one("chat_template")
    return None if member is None else member.path.parent


def _source(release: ReleaseSet, member: Member) -> str | None:
    return templates.of_gguf(release.values(member)) if member.container == "gguf" else templates.of_folder(member.path)


def _has_tokenizer(folder: Path) -> bool:
    return bool(read_loosely(folder / "tokenizer_config.json"))


def _spelled(values: Any, end: str) -> str:
    tokens, i = tokens_of(values), values.get(f"{PREFIX}{end}_token_id")
    return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else ""


CHECK = ChatTemplate
