"""Whether tool calls are those that were wanted, by the rules of the Berkeley Function Calling Leaderboard (BFCL).

Of each parameter a set of acceptable values is given; "" among them means that the parameter may be left out. Strings
are compared without case, spaces and some punctuation, a whole number may stand for a float, and the calls of a
parallel question may come in any order. Written anew after bfcl-eval's ast_checker (Apache-2.0), whose verdicts a test
compares it with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Wanted = Mapping[str, Mapping[str, Sequence[Any]]]  # {function: {parameter: [acceptable values]}}
_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as the model made it."""

    name: str
    arguments: Mapping[str, Any]


def right(calls: Sequence[Call], functions: Sequence[Mapping[str, Any]], wanted: Sequence[Wanted]) -> bool:
    """functions: as BFCL describes them; wanted: a call each, in any order; none where no call is right."""
    if len(calls) != len(wanted):
        return False
    left = list(calls)
    for want in wanted:
        name = next(iter(want))
        function = next((f for f in functions if f["name"] == name), None)
        fitting = None if function is None else next((c for c in left if fits(c, function, want[name])), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return True


def fits(call: Call, function: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]]) -> bool:
    """Whether one call is of this function, with acceptable arguments."""
    properties, required = function["parameters"]["properties"], function["parameters"].get("required", ())
    if call.name != function["name"] or any(name not in call.arguments for name in required):
        return False
    if any("" not in values for name, values in wanted.items() if name not in call.arguments):
        return False
    return all(
        name in properties and name in wanted and _acceptable(value, properties[name], wanted[name])
        for name, value in call.arguments.items()
    )


def _acceptable(value: Any, about: Mapping[str, Any], values: Sequence[Any]) -> bool:
    kind: Any = _TYPES.get(about["type"])
    given: Any = _type_of(values)
    if kind is None:
        return False
    value = list(value) if isinstance(value, tuple) and kind is list else value
    value = float(value) if kind is float and type(value) is int else value
    nested = _TYPES.get(about.get("items", {}).get("type", "")) if kind is list else None
    # A value of another type than the description's may be acceptable: the name of a variable, say.
    other = given is not None and given is not kind
    if type(value) is kind:
        if nested is not None and not _nested_fits(value, nested, values):
            if given is not kind:
                return False
            other = True
    elif type(value) is given:
        other = True
    else:
        return False
    if other:
        return value in values
    if kind is dict:
        return _dict_fits(value, values)
    if kind is list and nested is dict:
        return any(_dicts_fit(value, listed) for listed in values)
    if kind is str:
        return _plain(value) in [_plain(v) for v in values if isinstance(v, str)]
    if kind is list:
        return [_plain(v) for v in value] in [[_plain(v) for v in listed] for listed in values]
    return value in values


def _nested_fits(value: Sequence[Any], nested: type, values: Sequence[Any]) -> bool:
    """Whether every element has the elements' type, or that of the acceptable ones."""
    lists = [listed for listed in values if isinstance(listed, list)]
    if len(lists) < len(values):
        return True
    return any(all(type(v) is nested or type(v) is _type_of(listed) for v in value) for listed in lists)


def _type_of(values: Sequence[Any]) -> type | None:
    return next((type(v) for v in values if v != ""), None)


def _dicts_fit(value: Sequence[Any], wanted: Any) -> bool:
    if len(value) != len(wanted) or not all(isinstance(v, dict) for v in value):
        return False
    return all(_dict_fits(v, [want]) for v, want in zip(value, wanted, strict=True))


def _dict_fits(value: Mapping[str, Any], wanted: Sequence[Any]) -> bool:
    return any(
        all(k in want and _plain(v) in [_plain(x) for x in want[k]] for k, v in value.items())
        and all(k in value or "" in listed for k, listed in want.items())
        for want in wanted
        if isinstance(want, dict)
    )


def _plain(value: Any) -> Any:
    """A string as BFCL compares it; anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
