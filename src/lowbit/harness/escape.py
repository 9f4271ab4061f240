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
# The control tokens of the dialects' families, by their forms: <|im_start|>, <|tool_call>, <tool_call|>, <|"|>,
# <start_of_turn>, <unused12>, </s>, <bos>, [INST], [TOOL_CALLS], <tool_call>, <｜tool▁calls▁begin｜>.
_FORMS = (
    r"<\|[^<>|\s]{0,60}\|?>|<[^<>|\s]{1,60}\|>|<｜[^<>]{1,60}｜>"
    r"|<(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|start_function_\w+|end_function_\w+"
    r"|escape|bos|eos|pad|unk|mask|unused\d+|begin_of_\w+|end_of_\w+|tool_code|tool_output)>"
    r"|</?(?:s|tool_call|tool_response|tool_results|tools|think|function(?:=[^<>]{0,80})?|parameter(?:=[^<>]{0,80})?)>"
    r"|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|TOOL_CONTENT|CALL_ID|ARGS|SYSTEM_PROMPT|THINK)\]|<<SYS>>"
)
TRUSTED = ("system", "developer", "assistant")  # roles whose text the application or the model itself wrote


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
        """A message with the text of users and tools escaped, and how many pieces of text changed."""
        if message.get("role") in TRUSTED:
            return dict(message), 0
        content, changed = message.get("content"), 0
        if isinstance(content, str):
            escaped: Any = self.text(content)
            changed = int(escaped != content)
        elif isinstance(content, list):
            escaped = []
            for part in content:
                text = part.get("text") if isinstance(part, dict) else None
                new = part | {"text": self.text(text)} if isinstance(text, str) else part
                changed += new != part
                escaped.append(new)
        else:
            escaped = content
        return {**message, "content": escaped}, changed
