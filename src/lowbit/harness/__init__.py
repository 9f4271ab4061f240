"""Reliable answers of small models: schema, tool calls, healing, retries, guards, fallback.

``Harness(HttpUpstream("http://127.0.0.1:8080/v1")).complete({"messages": [...]})``, a coroutine;
``ask("http://127.0.0.1:8080/v1", "Who?", output=Person).value``, a Pydantic model.
"""

from __future__ import annotations

from lowbit.harness.asking import Asked, ask, ask_async
from lowbit.harness.failures import BadRequest, HarnessError, InvalidOutput, Problem, UpstreamFailed
from lowbit.harness.fallback import Fallback
from lowbit.harness.harness import Harness
from lowbit.harness.options import LAYERS, HarnessOptions
from lowbit.harness.spend import Ledger, Price
from lowbit.harness.trace import Trace
from lowbit.harness.upstream import HttpUpstream, Upstream

__all__ = [
    "LAYERS", "Asked", "BadRequest", "Fallback", "Harness", "HarnessError", "HarnessOptions", "HttpUpstream",
    "InvalidOutput", "Ledger", "Price", "Problem", "Trace", "Upstream", "UpstreamFailed", "ask", "ask_async",
]  # fmt: skip
