"""Batches that tests make, and what came of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batch_server import answer

SCHEMA = {
    "type": "object", "properties": {"label": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["label", "score"],
}  # fmt: skip


def request(custom_id: str, said: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": said}], "max_tokens": 16, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, said: Iterable[str], **body: Any) -> Path:
    """IN with a line for each text; ids are "0", "1", ..."""
    with open(path, "w", encoding="utf-8") as handle:
        for i, text in enumerate(said):
            handle.write(json.dumps(request(str(i), text, **body)) + "\n")
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of OUT by custom_id, each of which is there once."""
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        assert line["custom_id"] not in found, f"{line['custom_id']} is there twice"
        found[line["custom_id"]] = line
    return found


def contents(path: Path) -> dict[str, str]:
    return {
        custom_id: line["response"]["body"]["choices"][0]["message"]["content"]
        for custom_id, line in read(path).items()
        if line["error"] is None
    }


def expected(said: Iterable[str]) -> dict[str, str]:
    return {str(i): answer(text) for i, text in enumerate(said)}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "lowbit", "batch", *map(str, words)]


def lowbit(*words: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)
