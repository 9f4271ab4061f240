"""Reliable answers of small models: schema, tool calls, healing, retries, guards, fallback.

``Harness(HttpUpstream("http://127.0.0.1:8080/v1")).complete({"messages": [...]})``, a coroutine.
"""

from __future__ import annotations

from lowbit.harness.failures import BadRequest, HarnessError, InvalidOutput, Problem, UpstreamFailed
from lowbit.harness.harness import Harness
from lowbit.harness.options import LAYERS, HarnessOptions
from lowbit.harness.trace import Trace
from lowbit.harness.upstream import HttpUpstream, Upstream

__all__ = [
    "LAYERS", "BadRequest", "Harness", "HarnessError", "HarnessOptions", "HttpUpstream", "InvalidOutput", "Problem",
    "Trace", "Upstream", "UpstreamFailed",
]  # fmt: skip
