"""/metrics: what the harness did, in Prometheus' form."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lowbit.harness import Trace

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server. Names begin with lowbit_; none has a label that a request could choose."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("lowbit_requests", "Requests by path and status", ["path", "status"], **of)
        self._seconds = Histogram("lowbit_request_seconds", "Time of a request", ["path"], buckets=_SECONDS, **of)
        self.open = Gauge("lowbit_requests_open", "Requests that are being answered", **of)
        self._events = Counter("lowbit_harness_events", "What the harness did", ["layer", "what"], **of)
        self._answers = Counter("lowbit_answers", "Answers by outcome: ok or the kind of failure", ["outcome"], **of)
        self._tries = Counter("lowbit_tries", "Requests to the model", **of)
        self._tokens = Counter("lowbit_tokens", "Tokens of all tries", ["kind"], **of)
        self._fallbacks = Counter("lowbit_fallbacks", "Answers that a fallback gave", **of)

    def request(self, path: str, status: int, seconds: float) -> None:
        """path: the route, not what was asked for."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answer(self, trace: Trace, failure: str | None) -> None:
        """For Harness's on_answer."""
        for event in trace.events:
            self._events.labels(event["layer"], event["what"]).inc()
        self._answers.labels(failure or "ok").inc()
        self._tries.inc(trace.tries)
        self._tokens.labels("prompt").inc(trace.prompt_tokens)
        self._tokens.labels("completion").inc(trace.completion_tokens)
        self._fallbacks.inc(int(trace.fallback is not None and failure is None))

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4
