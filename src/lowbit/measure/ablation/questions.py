"""BFCL's questions as requests to a harness: single ones, and conversations with simulated APIs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import BadOption
from lowbit.measure.ablation import simulated
from lowbit.measure.tasks import tool_calls
from lowbit.measure.tasks._call_checker import Call, fits, right
from lowbit.measure.tasks.base import TaskOptions, spread

GROUPS = {
    "simple": "one tool, one call",
    "multiple": "several tools, one call",
    "parallel": "one tool, several calls",
    "irrelevance": "no call is right",
    "multi-turn": "a conversation with simulated APIs, every turn's state checked",
    "required": "the simple questions with tool_choice required",
    "as-json": "the simple questions, the arguments asked for by response_format",
}
_FILES = {"simple": "simple_python", "required": "simple_python", "as-json": "simple_python"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """turns:    the messages of each turn
    functions: as BFCL describes them; tools: the same in OpenAI's form
    wanted:    a call each of a single question, see _call_checker; of a conversation the calls of each turn
    entry:     a conversation's own line, for simulated.World
    """

    id: str
    group: str
    turns: Sequence[Sequence[Mapping[str, Any]]]
    functions: Sequence[Mapping[str, Any]]
    wanted: Sequence[Any]
    entry: Mapping[str, Any] | None = None

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [tool_calls.tool_of(function) for function in self.functions]

    def extra(self) -> dict[str, Any]:
        """What goes into the request beside the messages."""
        if self.group == "as-json":
            schema = self.tools[0]["function"]["parameters"]
            return {"response_format": {"type": "json_schema", "json_schema": {"name": "arguments", "schema": schema}}}
        return {"tools": self.tools} | ({"tool_choice": "required"} if self.group == "required" else {})

    def right_calls(self) -> list[Call]:
        """A right answer to a single question."""
        needed = {n for f in self.functions for n in f["parameters"].get("required", ())}
        return [_first(want, needed) for want in self.wanted]

    def right(self, calls: Sequence[Call], content: str) -> bool:
        """Whether a single question was answered right, by BFCL's rules."""
        if self.group == "as-json":
            name = next(iter(self.wanted[0]))
            try:
                value = json.loads(content)
            except ValueError:
                return False
            made = Call(name=name, arguments=value) if isinstance(value, dict) else None
            return made is not None and fits(made, self.functions[0], self.wanted[0][name])
        return right(calls, self.functions, self.wanted)


def read(groups: Sequence[str], limit: int | None) -> list[Question]:
    """The questions of the groups, ``limit`` of each evenly spread over it, the groups in turn.

    Raises BadOption for a group that there is not, NotFound where bfcl-eval is not installed.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise BadOption("no such group of questions", found=unknown[0][:60], expected=", ".join(GROUPS))
    listed = [_group(group, limit) for group in dict.fromkeys(groups)]
    longest = max((len(group) for group in listed), default=0)
    # In turn, so that a run that is cut short has some of each.
    return [group[i] for i in range(longest) for group in listed if i < len(group)]


def _group(group: str, limit: int | None) -> list[Question]:
    if group == "multi-turn":
        return [_conversation(entry) for entry in spread(simulated.entries(), limit)]
    source = f"bfcl:{_FILES.get(group, group)}"
    task = tool_calls.ToolCalls.open(source, TaskOptions(tasks=[source], limit=limit))
    return [
        Question(
            id=f"{group}/{item.id}", group=group, turns=[item.fields["question"]], functions=item.fields["function"],
            wanted=item.fields["ground_truth"],
        )
        for item in task.items
    ]  # fmt: skip


def _conversation(entry: Mapping[str, Any]) -> Question:
    return Question(
        id=f"multi-turn/{entry['id']}", group="multi-turn", turns=entry["question"],
        functions=simulated.functions(entry), wanted=entry["ground_truth"], entry=entry,
    )  # fmt: skip


def _first(want: Mapping[str, Mapping[str, Sequence[Any]]], needed: Collection[str]) -> Call:
    """The first acceptable value of each parameter. "" among them says that it may be left out, which it is where it is
    the first and the schema does not require it."""
    name, parameters = next(iter(want.items()))
    arguments = {}
    for key, values in parameters.items():
        given = [value for value in values if value != ""]
        if given and (values[0] != "" or key in needed):
            arguments[key] = tool_calls.plainly(given[0])
    return Call(name=name, arguments=arguments)
