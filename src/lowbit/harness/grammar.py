"""Which schemas llama.cpp's own grammar holds whole (its common/json-schema-to-grammar.cpp turns a schema into one).

A whole answer cannot break such a schema. Of others the grammar silently leaves out a part: of two rules at one place
it takes the first, it leaves out required names that are no properties, and what it does not know. What is listed here
was seen to hold: ``python benchmarks/grammar_keywords.py`` tells a real server to break each rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_SAYS_NOTHING = frozenset({
    "title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly",
    "$defs", "definitions",
})  # fmt: skip
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_OF_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": _BOUNDS,
}
_IS = {
    "object": "dict", "array": "list", "string": "str", "boolean": "bool", "null": "NoneType", "integer": "int",
    "number": "float",
}  # fmt: skip


def holds(schema: Any) -> bool:
    """Whether the grammar enforces all that a schema says; False too where it says nothing, as {} or "object" alone:
    a free value can have a key twice."""
    todo = [schema]
    while todo:
        node = todo.pop()
        if not isinstance(node, dict) or not _holds_here(node):
            return False
        todo.extend(_below(node))
    return True


def _holds_here(node: dict[str, Any]) -> bool:
    """Of one level of a schema: exactly one kind of rule, and only those of its keywords that are enforced."""
    rules = node.keys() - _SAYS_NOTHING
    if "$ref" in rules:
        return rules == {"$ref"} and re.fullmatch(r"#/(\$defs|definitions)/[^/~%]+", str(node["$ref"])) is not None
    for key in ("const", "enum"):
        if key in rules:
            values = node["enum"] if key == "enum" else [node["const"]]
            return rules <= {key, "type"} and all(_fits(value, node.get("type")) for value in values)
    if "anyOf" in rules:
        return rules == {"anyOf"}
    if "oneOf" in rules:  # the grammar takes it for anyOf
        return rules == {"oneOf"} and _apart(node["oneOf"])
    kinds = node.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not _IS.keys() >= set(kinds):
        return False
    if not rules <= {"type"}.union(*(_OF_TYPE.get(kind, ()) for kind in kinds)):
        return False
    return ("object" not in kinds or _object(node)) and ("array" not in kinds or _array(node)) and _integers(node)


def _object(node: dict[str, Any]) -> bool:
    properties = node.get("properties")
    closed = node.get("additionalProperties", False) is False
    return isinstance(properties, dict) and closed and set(node.get("required", ())) <= properties.keys()


def _array(node: dict[str, Any]) -> bool:
    """prefixItems make exactly that many, whatever else is said."""
    if "prefixItems" in node:
        n = len(node["prefixItems"])
        return "items" not in node and node.get("minItems", 0) <= n <= node.get("maxItems", n)
    return isinstance(node.get("items"), dict)


def _integers(node: dict[str, Any]) -> bool:
    return all(type(node[key]) is int for key in _BOUNDS & node.keys()) and (
        not _BOUNDS & node.keys() or node["type"] == "integer"
    )


def _apart(options: list[Any]) -> bool:
    """Whether no value can be of two of the options, because their types are different."""
    kinds = [option.get("type") for option in options if isinstance(option, dict)]
    kinds = ["number" if kind == "integer" else kind for kind in kinds if isinstance(kind, str)]
    return len(kinds) == len(options) == len(set(kinds))


def _fits(value: Any, kinds: Any) -> bool:
    if kinds is None:
        return True
    allowed = {_IS.get(kind, "") for kind in ([kinds] if isinstance(kinds, str) else kinds)}
    here = type(value).__name__
    return here in allowed or (here == "int" and "float" in allowed)


def _below(node: dict[str, Any]) -> Iterator[Any]:
    for key in ("properties", "$defs", "definitions"):
        yield from node.get(key, {}).values()
    for key in ("anyOf", "oneOf", "prefixItems"):
        yield from node.get(key, ())
    if "items" in node:
        yield node["items"]
