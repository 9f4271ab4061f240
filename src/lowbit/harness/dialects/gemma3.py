"""Gemma 3, whose template has no tools: calls as Python, in a ```tool_code fence or as a list that is all there is.

    ```tool_code
    get_weather(city="Rome", days=3)
    ```

Read from Google's guide to function calling with Gemma 3, which asks for [name(key=value, ...)] or for JSON (which
bare_json.py reads), and from the pythonic parsers of vLLM and mlx-lm. The text is parsed as Python and never run: only
calls by keyword with literal values count, and outside a fence only those of tools that there are.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from lowbit.harness.answer import Call
from lowbit.harness.dialects._json import arguments_of
from lowbit.harness.dialects.base import Dialect, Parsed

_FENCE = "```tool_code"
_LONGEST = 64 << 10  # characters of a call: Python's parser takes much memory for each
_LIST = re.compile(r"\s*\[\s*[A-Za-z_]\w*(?:\.\w+)*\s*\(")
_MAY_BE_LIST = re.compile(r"\s*\[\s*(?:\Z|[A-Za-z_][\w.]*\s*(?:\Z|\())")


class Gemma3(Dialect):
    name = "gemma3"
    marks = (_FENCE,)
    opens = ("[",)

    def parse(self, text: str, tools: Collection[str]) -> Parsed:
        if _LIST.match(text) and (calls := _calls(text.strip(), tools)):
            return Parsed(content="", calls=calls)
        parsed, rest, at, after = Parsed(content=""), [], 0, 0
        while (mark := text.find(_FENCE, after)) >= 0:
            begin = after = mark + len(_FENCE)
            end = text.find("```", begin)
            stop = end if end >= 0 else len(text)
            calls = _calls(text[begin:stop].strip(), tools)
            if not calls:
                continue
            parsed.calls += calls
            if end < 0:
                parsed.notes.append("no closing ```")
            rest.append(text[at:mark])
            at = after = min(stop + 3, len(text))
        parsed.content = "".join(rest) + text[at:]
        return parsed

    def may_be(self, text: str, tools: Collection[str]) -> bool:
        return text.startswith(_FENCE) or _MAY_BE_LIST.match(text) is not None

    def describe(self, tools: Sequence[dict[str, Any]]) -> str:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You have access to these functions:\n{listed}\n"
            "To call one, answer with nothing but the call, as Python with named arguments:\n"
            f"{_FENCE}\nfunction_name(argument_name=value)\n```"
        )

    def call_text(self, calls: Sequence[Call]) -> str:
        return f"{_FENCE}\n" + "\n".join(_written(call) for call in calls) + "\n```"

    def result_text(self, name: str, content: str) -> str:
        return f"```tool_output\n{content}\n```"


def _written(call: Call) -> str:
    values = arguments_of(call)
    values = {"arguments": call.arguments} if values is None else values
    if all(key.isidentifier() for key in values):
        return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"
    return f"{call.name}(**{values!r})"


def _calls(source: str, tools: Collection[str]) -> list[Call]:
    """The calls that a piece of Python is; none where it is, or holds, anything else."""
    if len(source) > _LONGEST:
        return []
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for statement in body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        for entry in value.elts if isinstance(value, ast.List) else [value]:
            call = _call(entry, tools)
            if call is None:
                return []
            found.append(call)
    return found


def _call(node: ast.AST | None, tools: Collection[str]) -> Call | None:
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and len(node.args) == 1
    ):
        node = node.args[0]  # print(get_weather(...)), as the guide's examples have it
    if not isinstance(node, ast.Call) or node.args:
        return None
    try:
        name = ast.unparse(node.func)
        if tools and name not in tools:
            return None
        arguments: dict[str, Any] = {}
        for keyword in node.keywords:
            value = ast.literal_eval(_json_names(keyword.value))
            arguments |= {keyword.arg: value} if keyword.arg else value
        return Call(name=name, arguments=json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _json_names(node: ast.expr) -> ast.expr:
    """The value with JSON's true, false and null as Python's."""
    names = {"true": True, "false": False, "null": None}

    class Renamed(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return ast.copy_location(ast.Constant(names[name.id]), name) if name.id in names else name

    return Renamed().visit(node)  # type: ignore[no-any-return]


DIALECT = Gemma3()
