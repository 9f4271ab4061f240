"""Damage as it is done to JSON by small models and bad lines, each kind a function of valid JSON and a generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from lowbit.harness import repair


def closed_schema(value: Any) -> dict[str, Any]:
    """The schema that says of a value what it is, and no more."""
    if isinstance(value, dict):
        properties = {key: closed_schema(item) for key, item in value.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False, "required": list(value)}
    if isinstance(value, list):
        return {"type": "array", "maxItems": len(value), "items": closed_schema(value[-1]) if value else {}}
    return {}


def structural(text: str) -> list[int]:
    """Places of brackets, commas, colons and quotes that are not within a string."""
    found, inside, at = [], False, 0
    while at < len(text):
        if text[at] == "\\" and inside:
            at += 1
        elif text[at] == '"':
            inside = not inside
            found.append(at)
        elif not inside and text[at] in "{}[],:":
            found.append(at)
        at += 1
    return found


def commas(text: str) -> list[int]:
    return [at for at in structural(text) if text[at] == ","]


def sub(text: str, at: int, new: str, length: int = 1) -> str:
    return text[:at] + new + text[at + length :]


def quotes_of(text: str, opening: str, closing: str) -> str:
    at = [i for i in structural(text) if text[i] == '"']
    letters = list(text)
    for n, i in enumerate(at):
        letters[i] = closing if n % 2 else opening
    return "".join(letters)


def swapped(text: str, r: random.Random) -> str:
    at = min(r.choice(structural(text)), len(text) - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def literals(text: str, r: random.Random) -> str:
    return text.replace("true", "True").replace("false", "False").replace("null", "None")


DAMAGE: dict[str, Callable[[str, random.Random], str]] = {
    "fenced": lambda text, r: f"Here it is:\n```json\n{text}\n```\nDone.",
    "in words": lambda text, r: f"Here it is: {text} I hope that helps!",
    "single quotes": lambda text, r: quotes_of(text, "'", "'"),
    "typographic quotes": lambda text, r: quotes_of(text, "“", "”"),
    "trailing comma": lambda text, r: text[:-1] + "," + text[-1],
    "python's literals": literals,
    "raw line ends": lambda text, r: text.replace("\\n", "\n").replace("\\t", "\t"),
    "inner quotes bare": lambda text, r: text.replace('\\"', '"'),
    "a comment": lambda text, r: sub(text, 1, "// the answer\n", 0),
    "closers missing": lambda text, r: text.rstrip("]}"),
    "one closer missing": lambda text, r: text[:-1],
    "cut": lambda text, r: text[: r.randrange(1, len(text))],
    "a comma missing": lambda text, r: sub(text, r.choice(commas(text) or [0]), ""),
    "a comma twice": lambda text, r: sub(text, r.choice(commas(text) or [0]), ",,"),
    "one structural character missing": lambda text, r: sub(text, r.choice(structural(text)), ""),
    "one more": lambda text, r: sub(text, r.randrange(len(text) + 1), r.choice("{}[],:\"'"), 0),
    "one for another": lambda text, r: sub(text, r.choice(structural(text)), r.choice("{}[],:\"'")),
    "two swapped": swapped,
    "twice": lambda text, r: f"{text}\n{text[:-1]} {text[-1]}",
    "a key twice": lambda text, r: text[:-1] + ', "a": 1, "a": 2}' if text[0] == "{" else text,
    "dots": lambda text, r: text[:-1] + ", ..." + text[-1],
}


def is_json(text: str) -> bool:
    try:
        repair.loads(text)
    except ValueError:
        return False
    return True


def same(a: Any, b: Any) -> bool:
    return json.dumps(a) == json.dumps(b)
