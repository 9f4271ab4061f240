"""URLs in a request that would make the model's server fetch something or open a file."""

from __future__ import annotations

import re
from typing import Any

from lowbit.harness.failures import BadRequest

# What is text to be read, wherever in a message it stands; a URL in it is a word.
_TEXT = frozenset({
    "text", "content", "refusal", "arguments", "output", "reasoning", "reasoning_content", "thinking", "summary",
    "instructions", "type",
})  # fmt: skip
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def refuse(body: dict[str, Any]) -> None:
    """Images and the like must come inside the request (data:), never from an address that the server would fetch or a
    file that it would open, in whatever form of OpenAI's, llama-server's, vLLM's or Ollama's they are named.

    Raises BadRequest naming the message.
    """
    for name in ("messages", "input", "prompt"):
        entries = body.get(name)
        for i, entry in enumerate(entries if isinstance(entries, list) else ()):
            if _leads_away(entry):
                message = "a URL in a message must be a data: URL: nothing is fetched for a request"
                raise BadRequest(message, param=f"{name}[{i}]")


def _leads_away(entry: Any) -> bool:
    """Whether a message names something to be fetched: a URL outside what is text, or anything but data: where a URL
    belongs. Other text may look like anything: a sound in base64 begins with "//"."""
    todo: list[tuple[str, Any]] = [("", entry)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            # What an answer quoted is shown to people, and comes back with the conversation.
            todo.extend((str(key).casefold(), inner) for key, inner in value.items() if key != "annotations")
        elif isinstance(value, list):
            todo.extend((name, inner) for inner in value)
        elif isinstance(value, str) and name and name not in _TEXT:
            is_place = name.endswith(("url", "uri", "urls", "uris"))
            if (is_place and not value.startswith("data:")) or _SCHEME.match(value):
                return True
    return False
