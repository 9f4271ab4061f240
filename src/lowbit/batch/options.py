"""How a batch is run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowbit.errors import BadOption
from lowbit.harness.options import HarnessOptions


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """slots:        requests under way at a time; None is what the engine finds
    harness:      bounds and layers of each answer
    tries:        how often an item is sent whose request took too long or met a fault of the server (5xx)
    minutes:      stops after so long, whatever is done by then; None goes on to the end
    grace:        seconds that requests under way have to end, when the batch is asked to stop
    patience:     seconds to wait for a server that does not answer before the batch is given up for now
    strict:       a line that is no request refuses the whole file
    restart:      forgets what was done before
    retry_failed: takes up items that had failed
    """

    slots: int | None = None
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    tries: int = 3
    minutes: float | None = None
    grace: float = 5.0
    patience: float = 600.0
    strict: bool = False
    restart: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        for name in ("slots", "tries"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= 4096):
                raise BadOption(f"impossible {name}", found=value, expected="a whole number from 1 to 4096")
        for name in ("minutes", "grace", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e7:
                raise BadOption(f"impossible {name}", found=value, expected="0 or more")

    def deciding(self) -> dict[str, Any]:
        """What of it the answers depend on: a batch goes on only with the same."""
        asked = asdict(self.harness)
        asked["layers"] = sorted(asked["layers"])
        asked["required"] = list(asked["required"])
        return {f"harness.{name}": value for name, value in asked.items() if name != "seconds"}
