"""Tool calls that are nearly right: names, quoting, nesting and types mended, so far as the tool's schema decides it.

Nothing is made up: a value is only read in another way ("5" as 5 where a number is due), never invented, and a call
that was cut off is not closed by guesswork.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from lowbit.harness import repair
from lowbit.harness.answer import Call
from lowbit.harness.failures import Problem
from lowbit.harness.request import Tool
from lowbit.harness.trace import Trace

_WRAPPERS = ("arguments", "parameters", "args", "input", "kwargs")


def heal(call: Call, tools: Mapping[str, Tool], trace: Trace, *, mend: bool, cut: bool) -> Problem | None:
    """Mends ``call`` in place; what is wrong with it all the same, or None.

    mend: False only checks. cut: the answer ended at the token limit, so that arguments may be a part of themselves.
    """
    if call.name not in tools:
        known = nearest(call.name, tools) if mend else None
        if known is None:
            names = ", ".join(tools)
            advice = f"There is no tool {call.name[:60]}. The tools are: {names}."
            return Problem(kind="unknown_tool", detail=f"{call.name[:60]!r} is no tool", advice=advice)
        trace.add("heal", "name_healed", f"{call.name} to {known}")
        call.name = known
    schema = tools[call.name].parameters
    value, how = read_arguments(call.arguments, mend=mend and not cut, schema=schema.raw)
    if value is None:
        kind = "truncated" if cut else "bad_arguments"
        detail = f"the arguments of {call.name} are {'cut off' if cut else 'no JSON object'}"
        advice = f"Call {call.name} again with arguments that are one JSON object" + (", kept short." if cut else ".")
        return Problem(kind=kind, detail=detail, advice=advice)
    wrong = schema.problem(value)
    if wrong and mend:
        changed, notes = fitted(value, schema.raw)
        if notes and schema.problem(changed) is None:
            how, value, wrong = [*how, *notes], changed, None
    if wrong:
        advice = f"Call {call.name} again with arguments that follow its schema: {json.dumps(schema.raw)[:1000]}"
        detail = f"the arguments of {call.name} do not follow its schema: {wrong}"
        return Problem(kind="bad_arguments", detail=detail, advice=advice)
    for note in how:
        trace.add("heal", "arguments_healed", f"{call.name}: {note}")
    if how or not call.arguments.strip():
        call.arguments = repair.dumps(value)
    return None


def nearest(name: str, tools: Mapping[str, Tool]) -> str | None:
    """The one tool that a misspelt name can mean."""

    def plain(text: str) -> str:
        last = text.strip().strip("`'\"").removesuffix("()").replace("/", ".").split(".")[-1]
        return "".join(c for c in last.casefold() if c.isalnum())

    same = [known for known in tools if plain(known) == plain(name)]
    if len(same) == 1:
        return same[0]
    close = difflib.get_close_matches(name.casefold(), [t.casefold() for t in tools], n=2, cutoff=0.85)
    found = [known for known in tools if known.casefold() in close]
    return found[0] if len(found) == 1 else None


def read_arguments(text: str, *, mend: bool, schema: Any = None) -> tuple[dict[str, Any] | None, list[str]]:
    """The arguments as an object, and what it took to read them; None where they are none."""
    if not text.strip():
        return {}, []
    how: list[str] = []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not mend:
            return None, how
        value, word = repair.mended(text, schema)
        if word is None:
            return None, how
        how.append(word.replace("_", " "))
    if mend and isinstance(value, str):  # JSON as a string of JSON
        try:
            value = json.loads(value)
            how.append("unquoted")
        except (ValueError, RecursionError):
            return None, how
    if mend and isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
        how.append("taken out of a list")
    return (value, how) if isinstance(value, dict) else (None, how)


def fitted(value: dict[str, Any], schema: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments with types and names of properties as the schema has them, and what was changed."""
    notes: list[str] = []
    if isinstance(schema, dict):
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        for wrapper in _WRAPPERS:  # {"arguments": {...}} around the arguments
            inner = value.get(wrapper)
            if len(value) <= 2 and isinstance(inner, dict) and wrapper not in properties:
                value = inner
                notes.append(f"taken out of {wrapper}")
                break
        value = _object(value, schema, properties, notes, "")
    return value, notes


def _object(
    value: dict[str, Any], schema: dict[str, Any], properties: dict[str, Any], notes: list[str], path: str
) -> dict[str, Any]:
    required = [name for name in schema.get("required") or [] if isinstance(name, str)]
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = key
        if key not in properties:
            missing = [known for known in properties if known not in value]
            plain = {"".join(c for c in known.casefold() if c.isalnum()): known for known in missing}
            name = plain.get("".join(c for c in key.casefold() if c.isalnum()), key)
            if name != key:
                notes.append(f"{path}{key} to {name}")
        sub = properties.get(name)
        if item is None and name in properties and name not in required and not _allows(sub, "null"):
            notes.append(f"{path}{name} null left out")
            continue
        found[name] = _value(item, sub, notes, f"{path}{name}")
    return found


def _value(item: Any, schema: Any, notes: list[str], path: str) -> Any:
    if not isinstance(schema, dict):
        return item
    if isinstance(item, dict) and isinstance(schema.get("properties"), dict):
        return _object(item, schema, schema["properties"], notes, f"{path}.")
    if isinstance(item, list) and isinstance(schema.get("items"), dict):
        return [_value(element, schema["items"], notes, f"{path}[{i}]") for i, element in enumerate(item)]
    read = _as(item, schema)
    if read is not item:
        notes.append(f"{path} read as {type(read).__name__}")
    return read


def _as(item: Any, schema: dict[str, Any]) -> Any:
    """The value in the type that is due, where there is one way to read it so; the same object otherwise."""
    options = schema.get("enum")
    if isinstance(options, list) and isinstance(item, str) and item not in options:
        same = [o for o in options if isinstance(o, str) and o.strip().casefold() == item.strip().casefold()]
        return same[0] if len(same) == 1 else item
    if _fits(item, schema):
        return item
    if isinstance(item, str):
        text = item.strip()
        if _allows(schema, "boolean") and text.casefold() in ("true", "false"):
            return text.casefold() == "true"
        if _allows(schema, "null") and text.casefold() in ("null", "none"):
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = item
        if value is not item and not isinstance(value, str) and _fits(value, schema):
            return value
    if isinstance(item, float) and item.is_integer() and _allows(schema, "integer"):
        return int(item)
    if isinstance(item, int | float) and not isinstance(item, bool) and _allows(schema, "string"):
        return json.dumps(item)
    if _allows(schema, "array") and not isinstance(item, list | dict):
        inner = schema.get("items")
        element = _as(item, inner) if isinstance(inner, dict) else item
        return [element] if not isinstance(inner, dict) or _fits(element, inner) else item
    return item


def _fits(item: Any, schema: Any) -> bool:
    kinds = _types(schema)
    return not kinds or any(_is(item, kind) for kind in kinds)


def _is(item: Any, kind: str) -> bool:
    if isinstance(item, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(item, int)
    if kind == "number":
        return isinstance(item, int | float)
    known = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    return isinstance(item, known.get(kind, ()))


def _types(schema: Any) -> list[str]:
    kinds = schema.get("type") if isinstance(schema, dict) else None
    return [kinds] if isinstance(kinds, str) else [k for k in kinds or [] if isinstance(k, str)]


def _allows(schema: Any, kind: str) -> bool:
    return kind in _types(schema)
