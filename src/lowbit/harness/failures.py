"""What can go wrong with an answer, and how the outside hears of it: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.harness.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why an answer cannot be given to the caller.

    kind:   a word: empty, truncated, repetition, not_json, schema, unknown_tool, bad_arguments, no_tool_call,
            identical_call, ping_pong, missing_step, announced, upstream
    detail: what was wrong
    advice: what to tell the model before it tries again
    """

    kind: str
    detail: str
    advice: str = ""


class HarnessError(Exception):
    """An honest error. status: HTTP's. code: a word for programs. trace: what was tried."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None, trace: Trace | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.trace = message, status, code, param, trace
        self.after = 0.0  # seconds that whoever refused asks to wait

    def as_json(self) -> dict[str, Any]:
        """OpenAI's form: {"error": {"message", "type", "param", "code"}}, and "lowbit" where something was tried."""
        # 422 is the model's failure, not the caller's.
        kind = "invalid_request_error" if 400 <= self.status < 500 and self.status != 422 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error} | ({"lowbit": self.trace.as_json()} if self.trace else {})


class BadRequest(HarnessError):
    """The caller's mistake: 400."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, status=400, code="invalid_request", param=param)


class InvalidOutput(HarnessError):
    """The tries are spent and no answer was valid: 422, which clients do not send again by themselves."""

    def __init__(self, problem: Problem, trace: Trace) -> None:
        message = f"no valid answer after {trace.tries} tries: {problem.detail}"
        super().__init__(message, status=422, code=f"output_{problem.kind}", trace=trace)
        self.problem = problem


class UpstreamFailed(HarnessError):
    """The model's server cannot be reached, or answered with an error: 502, or its own 4xx status."""

    def __init__(self, message: str, *, status: int = 502, code: str = "upstream_failed", again: bool = True) -> None:
        super().__init__(message, status=status, code=code)
        self.again = again  # whether the same request may succeed if it is sent once more
        self.answered: int | None = None  # the status that the server itself gave
