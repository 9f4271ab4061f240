"""Every scripted fault, whole and streamed: a valid answer or an honest error, in time, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from faults import FAULTS, SCHEMA, Fault
from faulty_server import FaultyServer, as_whole

from lowbit.harness import Harness, HarnessError, HarnessOptions, HttpUpstream
from lowbit.harness.structured import Schema

SECONDS = 1.5  # for one answer
CASES = [(fault, form) for fault in FAULTS for form in ("whole", "streamed") if getattr(fault, form)]


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 100 and len({fault.name for fault in FAULTS}) == len(FAULTS)


async def outcome(harness: Harness, body: dict[str, Any], form: str) -> dict[str, Any]:
    """The answer as {"content", "tool_calls", "finish"}, or {"error": code}."""
    try:
        if form == "whole":
            choice = (await harness.complete(body))["choices"][0]
            return choice["message"] | {"finish": choice["finish_reason"]}
        text, calls, finish = "", [], None
        async for chunk in harness.stream(body):
            json.dumps(chunk).encode()
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                calls += choice["delta"].get("tool_calls") or []
                assert finish is None or not choice["delta"], "words after the end"
                finish = choice["finish_reason"] or finish
        assert finish is not None
        return {"content": text, "tool_calls": calls, "finish": finish}
    except HarnessError as error:
        form_of_it = error.as_json()["error"]
        assert form_of_it["message"] and form_of_it.keys() == {"message", "type", "param", "code"}
        assert 400 <= error.status < 600
        return {"error": error.code}


def check(found: dict[str, Any], fault: Fault) -> None:
    if fault.wants == "any":
        return
    if fault.wants == "error":
        assert fault.says in found["error"], found
        return
    assert "error" not in found, found
    if fault.wants == "text":
        assert found["content"] == fault.says and not found.get("tool_calls")
    elif fault.wants == "json":
        value = json.loads(found["content"])
        assert Schema(SCHEMA).problem(value) is None and fault.says in found["content"]
    else:
        assert found["finish"] == "tool_calls" and found["tool_calls"]
        ids = [call["id"] for call in found["tool_calls"]]
        assert all(ids) and len(set(ids)) == len(ids)
        if fault.body.get("parallel_tool_calls") is False:
            assert len(ids) == 1
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in fault.body["tools"]}
        for call in found["tool_calls"]:
            value = json.loads(call["function"]["arguments"])
            assert Schema(schemas[call["function"]["name"]]).problem(value) is None
            assert fault.says in call["function"]["arguments"]


@pytest.mark.parametrize("fault, form", CASES, ids=lambda c: c.name if isinstance(c, Fault) else c)
def test_a_fault(fault: Fault, form: str) -> None:
    async def go() -> None:
        server = FaultyServer(whole=fault.whole or (as_whole("All is well."),), streamed=fault.streamed)
        async with server.running(), HttpUpstream(server.url) as upstream:
            harness = Harness(upstream, HarnessOptions(seconds=SECONDS))
            body = {"messages": list(fault.messages), **fault.body}
            begun = time.monotonic()
            found = await outcome(harness, body, form)
            assert time.monotonic() - begun < 2 * SECONDS + 1, "the time budget"
            check(found, fault)
            # The pool still works, and with it the next request.
            server.whole = (as_whole("Still here."),)
            after = await harness.complete({"messages": [{"role": "user", "content": "?"}]})
            assert after["choices"][0]["message"]["content"] == "Still here."
        await asyncio.sleep(0)
        for _ in range(100):
            left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "_serve" not in repr(t)]
            if not left:
                break
            await asyncio.sleep(0.01)
        assert not left, left

    asyncio.run(go())
