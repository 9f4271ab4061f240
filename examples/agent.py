"""An agent with three tools, through OpenAI's client and lowbit serve: ``python examples/agent.py "What is 17 * 23?"``.

Nothing here repairs anything: names, arguments, loops and empty answers are the endpoint's work. What is left for the
application is what only it can do: the tools themselves, which trust nothing that they are given.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from lowbit.serve import ServeOptions, running_model

NOTES = Path(__file__).parent / "data"
STEPS = 6
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_UNITS = {"m": 1.0, "km": 1000.0, "mi": 1609.344, "ft": 0.3048, "in": 0.0254, "cm": 0.01}


def calculate(expression: str) -> str:
    """Sums and products of numbers; no names, no calls."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("only numbers and + - * / // % are allowed")

    return str(value(ast.parse(expression[:200], mode="eval").body))


def read_note(name: str, folder: Path = NOTES) -> str:
    """A text file of one folder, and of no other."""
    path = (folder / name).resolve()
    if path.parent != folder.resolve() or path.suffix != ".txt":
        raise ValueError("that is not one of the notes: " + ", ".join(sorted(p.name for p in folder.glob("*.txt"))))
    return path.read_text(encoding="utf-8")[:2000]


def convert(value: float, unit: str, to: str) -> str:
    """A length in another unit."""
    return f"{value * _UNITS[unit] / _UNITS[to]:.6g} {to}"


def _tool(name: str, description: str, /, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_UNIT = {"type": "string", "enum": list(_UNITS)}
TOOLS = [
    _tool("calculate", "Evaluates arithmetic such as 2 * (3 + 4).", expression={"type": "string"}),
    _tool("read_note", "Reads a note by its file name.", name={"type": "string"}),
    _tool("convert", "Converts a length.", value={"type": "number"}, unit=_UNIT, to=_UNIT),
]
FUNCTIONS: dict[str, Callable[..., str]] = {"calculate": calculate, "read_note": read_note, "convert": convert}


async def run(client: openai.AsyncOpenAI, task: str, show: Callable[[str], None] = lambda line: None) -> str:
    """The final answer. Raises openai.APIStatusError where the endpoint gives up, and says why."""
    messages: list[Any] = [{"role": "user", "content": task}]
    bounds = {"lowbit": {"max_steps": STEPS, "same_call": 2}}
    while True:
        response = await client.chat.completions.create(
            model="local", messages=messages, tools=TOOLS, max_tokens=200, temperature=0, extra_body=bounds  # type: ignore[arg-type]
        )  # fmt: skip
        for event in (response.model_extra or {}).get("lowbit", {}).get("events", []):
            show(f"lowbit: {event['layer']}: {event['what']} {event['detail']}")
        message = response.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            function = call.function  # type: ignore[union-attr]
            try:
                result = FUNCTIONS[function.name](**json.loads(function.arguments))
            except (ValueError, KeyError, OSError, SyntaxError, ArithmeticError) as error:
                result = f"error: {error}"
            show(f"{function.name}({function.arguments}) = {result[:80]}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def main(task: str, model: str, url: str | None) -> int:
    async def go(at: str) -> int:
        async with openai.AsyncOpenAI(base_url=at, api_key="-", max_retries=0) as client:
            try:
                print(await run(client, task, lambda line: print(line, file=sys.stderr)))
            except openai.APIStatusError as error:
                print(f"no answer: {error.message}", file=sys.stderr)
                return 1
        return 0

    if url is not None:
        return await go(url)
    async with running_model(model, ServeOptions(port=0)) as at:
        return await go(at)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--model", default="smollm2-135m", help="served for this; default: %(default)s")
    parser.add_argument("--url", help="instead: a lowbit serve that runs, up to /v1")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.task, given.model, given.url)))
