"""What lowbit says when it cannot go on: one line with what, where, found, expected and what to do.

The command line prints ``str(error)`` to standard error and exits with ``error.exit_code``.
"""

from __future__ import annotations


class LowbitError(Exception):
    """Base of every error that a user can cause or mend.

    what:     the failure in a few words ("rows are not a multiple of 32")
    where:    the file, tensor, key or line it happened in
    found:    what was there
    expected: what should have been there
    hint:     what to do next
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.hint = what, where, found, expected, hint
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where is not None else self.what
        if self.found is not None:
            line += f"; found {self.found}"
        if self.expected is not None:
            line += f"; expected {self.expected}"
        if self.hint:
            line += f". {self.hint}"
        # One line, and nothing a hostile file could use to steer the terminal.
        return "".join(c if c.isprintable() else " " for c in line)


class BadFile(LowbitError):
    """A file is truncated, lies about itself, or is not what its name says."""


class BadConfig(LowbitError):
    """A config has a missing, unknown or contradictory key."""


class BadText(LowbitError):
    """A text or data set cannot be used: empty, binary, wrong columns."""


class BadOption(LowbitError):
    """An option or argument has a value that cannot work."""


class Unsupported(LowbitError):
    """A well-formed input that lowbit does not handle."""


class NotFound(LowbitError):
    """A file, model or package that is not there."""


class CannotWrite(LowbitError):
    """No room, no permission, no such folder."""


class RuntimeFailed(LowbitError):
    """The runtime (llama.cpp) refused or failed."""

    exit_code = 3
