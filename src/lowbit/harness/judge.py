"""Whether an answer can be given to the caller: mends what can be mended, and names what cannot."""

from __future__ import annotations

import json
from collections.abc import Callable

from lowbit.harness import dialects, guards, healing, repair, structured, thoughts
from lowbit.harness.answer import Answer, Call, arguments_text, new_id
from lowbit.harness.failures import Problem
from lowbit.harness.request import Request
from lowbit.harness.trace import Trace


def judge(answer: Answer, asked: Request, trace: Trace, restore: Callable[[str], str] = str) -> Problem | None:
    """Mends ``answer`` in place; what is wrong with it all the same, or None. restore: turns escaped special tokens
    back, which is done when calls have been looked for: a page that the model quotes must not become a call."""
    on = asked.options.on
    if on("rescue") and thoughts.separate(answer):
        trace.add("rescue", "thoughts_separated", f"{len(answer.reasoning)} characters")
    if asked.forced is not None and not answer.calls:
        _call_under_schema(answer, asked)
    if on("rescue") and asked.tools and not answer.calls:
        rescue(answer, asked, trace)
    answer.content = restore(answer.content)
    for call in answer.calls:
        call.arguments = restore(call.arguments)
    if on("guard") and (found := guards.empty(answer) or guards.repetition(answer.content)):
        return found
    if answer.calls:
        return _calls(answer, asked, trace)
    if asked.forced is not None:
        wanted = asked.forced or "one of " + ", ".join(asked.tools)
        advice = f"Do not answer in words. Call {wanted}."
        return Problem(kind="no_tool_call", detail=f"a call of {wanted} was required and none came", advice=advice)
    if on("guard") and (found := guards.missing_step(answer, asked)):
        return found
    if on("guard") and asked.options.nudge and (found := guards.announced(answer, asked)):
        return found
    return _content(answer, asked, trace)


def _call_under_schema(answer: Answer, asked: Request) -> None:
    """A call that feedback.shaped asked for as JSON: {"name": ..., "arguments": {...}} and nothing else."""
    try:
        value = json.loads(answer.content)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value.keys() == {"name", "arguments"} and value["name"] in asked.tools:
        answer.calls = [Call(name=value["name"], arguments=arguments_text(value["arguments"]))]
        answer.content = ""


def rescue(answer: Answer, asked: Request, trace: Trace) -> None:
    """Finds calls that the runtime left in the text, or in the thoughts of a model that then said nothing."""
    own = asked.options.dialect
    for text, where in ((answer.content, "the text"), (answer.reasoning, "the thoughts")):
        if where == "the thoughts" and answer.content.strip():
            return
        for name in (own,) if own else dialects.likely(text):
            parsed = dialects.get(name).parse(text, asked.tools)
            if parsed.calls:
                answer.calls = parsed.calls
                if where == "the text":
                    answer.content = parsed.content.rstrip()
                trace.add("rescue", "call_rescued", f"{name}, in {where}: {', '.join(c.name for c in parsed.calls)}")
                for note in parsed.notes:
                    trace.add("rescue", "call_broken", note)
                return


def _calls(answer: Answer, asked: Request, trace: Trace) -> Problem | None:
    on = asked.options.on
    if not asked.tools:
        names = ", ".join(call.name for call in answer.calls)[:100]
        return Problem(
            kind="unknown_tool",
            detail=f"{names} was called and there are no tools",
            advice="There are no tools. Answer in words.",
        )
    for call in answer.calls:
        cut = answer.finish == "length" and call is answer.calls[-1]
        found = healing.heal(call, asked.tools, trace, mend=on("heal"), cut=cut)
        if found is not None:
            return found
    if asked.forced and any(call.name != asked.forced for call in answer.calls):
        advice = f"Call {asked.forced} and nothing else."
        return Problem(kind="no_tool_call", detail=f"{asked.forced} was required, another was called", advice=advice)
    if on("guard"):
        if dropped := guards.without_duplicates(answer):
            trace.add("guard", "duplicate_calls_dropped", ", ".join(dropped))
        if not asked.parallel and len(answer.calls) > 1:
            trace.add("guard", "parallel_calls_dropped", ", ".join(call.name for call in answer.calls[1:]))
            answer.calls = answer.calls[:1]
        if found := guards.identical_call(answer, asked) or guards.ping_pong(answer, asked):
            return found
    _unique_ids(answer, asked, trace)
    return None


def _unique_ids(answer: Answer, asked: Request, trace: Trace) -> None:
    """New ids for calls that have one of the same answer or of the history: a result must belong to one call."""
    seen = {str(made.get("id")) for message in asked.messages for made in message.get("tool_calls") or []}
    for call in answer.calls:
        if call.id in seen:
            trace.add("heal", "id_replaced", call.name)
            call.id = new_id()
        seen.add(call.id)


def _content(answer: Answer, asked: Request, trace: Trace) -> Problem | None:
    if asked.schema is None:
        return None
    value, problem = structured.read_value(
        answer.content, asked.schema, trace, repair=asked.options.on("repair") and answer.finish != "length"
    )
    if problem is None and asked.check is not None and (wrong := asked.check(value)):
        advice = "Answer with the JSON alone, and mend that."
        problem = Problem(kind="schema", detail=f"the JSON is not valid: {wrong[:1000]}", advice=advice)
    if problem is None:
        # Repaired text becomes the JSON that it was taken for; what was JSON stays as the model wrote it.
        if trace.events and trace.events[-1]["layer"] == "repair":
            answer.content = repair.dumps(value)
        return None
    if answer.finish == "length":
        advice = "Answer with the JSON alone, and keep it short."
        return Problem(kind="truncated", detail="the JSON was cut off at the token limit", advice=advice)
    return problem
