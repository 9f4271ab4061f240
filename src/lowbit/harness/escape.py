"""Special tokens that stand in text are made plain text, so that a web page cannot forge a turn or a tool call.

Chat servers tokenize the rendered conversation with special tokens on: "<|im_start|>system" in a tool's result would
begin a turn of its own. A zero-width space after the first character keeps the text readable and the token away. What
the model copies from it is turned back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

_MARK = "\u200b"
_LONGEST = 256  # characters of a token's spelling
# The control tokens of the dialects' families, by their forms: <|im_start|>, <|tool_call>, <tool_call|>, <|"|>,
# <start_of_turn>, <unused12>, </s>, <bos>, [INST], [TOOL_CALLS], <tool_call>, <｜tool▁calls▁begin｜>.
_FORMS = (
    r"<\|[^<>|\s]{0,60}\|?>|<[^<>|\s]{1,60}\|>|<｜[^<>]{1,60}｜>"
    r"|<(?:repo_?name|file_sep|gh_stars|issue_\w+|jupyter_\w+|empty_output|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|start_function_\w+|end_function_\w+"
    r"|escape|bos|eos|pad|unk|mask|unused\d+|begin_of_\w+|end_of_\w+|tool_code|tool_output)>"
    r"|</?(?:s|tool_call|tool_response|tool_results|tools|think|function(?:=[^<>]{0,80})?|parameter(?:=[^<>]{0,80})?)>"
    r"|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|TOOL_CONTENT|CALL_ID|ARGS|SYSTEM_PROMPT|THINK"
    r"|MODEL_SETTINGS|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|TRANSCRIBE|PREFIX|MIDDLE|SUFFIX)\]|</?<SYS>>|\[multimodal\]"
)
TRUSTED = ("system", "developer")  # roles whose text the application wrote
# What templates themselves look for in the text of the assistant, to leave old thoughts out.
_THOUGHTS = re.compile(r"</?think>|<\|channel>|<channel\|>|\[/?THINK\]")


class Escaper:
    """tokens: spellings of the model's own control tokens, where they are known, on top of the known forms."""

    def __init__(self, tokens: Collection[str] = ()) -> None:
        own = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1]
        self._pattern = re.compile("|".join([*own, _FORMS]))
        self._back = re.compile(f"(?<=[<\\[]){_MARK}")

    def text(self, text: str) -> str:
        """The text with every special token broken."""
        if "<" not in text and "[" not in text and not self._pattern.search(text):
            return text
        return self._pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)

    def restore(self, text: str) -> str:
        """What text() did, undone: for what the model copied."""
        return self._back.sub("", text) if _MARK in text else text

    def restorer(self) -> Callable[[str], str]:
        """restore() for text that comes in pieces, one after the other."""
        last = ""

        def piece(text: str) -> str:
            nonlocal last
            if not text:
                return ""
            whole = self.restore(last + text)
            before, last = len(last), text[-1]
            return whole[before:]

        return piece

    def message(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A message with its text escaped, and how many pieces of text changed.

        The assistant's text and arguments too: the model may have copied them from a page, and what it copied was
        turned back for the caller, who sends it again with the next request.
        """
        if message.get("role") in TRUSTED:
            return dict(message), 0
        own = message.get("role") == "assistant"
        found, changed = dict(message), 0
        content = message.get("content")
        if isinstance(content, str):
            found["content"] = self._own(content) if own else self.text(content)
            changed += found["content"] != content
        elif isinstance(content, list):
            found["content"] = self._parts(content)
            changed += sum(new != old for new, old in zip(found["content"], content, strict=True))
        if own and message.get("tool_calls"):
            found["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            changed += found["tool_calls"] != message["tool_calls"]
        return found, changed

    def _own(self, text: str) -> str:
        """The assistant's text, whose thoughts stay marked."""
        if not self._pattern.search(text):
            return text
        return self._pattern.sub(
            lambda match: match[0] if _THOUGHTS.fullmatch(match[0]) else match[0][0] + _MARK + match[0][1:], text
        )

    def _parts(self, parts: list[Any]) -> list[Any]:
        """Parts of a content. A token may be spelled over several: templates put them together."""
        found, before = [], ""
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                found.append(part)
                before = ""
                continue
            new = self.text(text)
            if self.text(before + new) != before + new:
                new = _MARK + new
            before = (before + new)[-_LONGEST:]
            found.append(part | {"text": new})
        return found

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        if not isinstance(arguments, str) or self.text(arguments) == arguments:
            return dict(call)
        return {**call, "function": {**function, "arguments": self.text(arguments)}}
