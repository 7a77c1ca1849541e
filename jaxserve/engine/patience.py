"""When a heartbeat that doesn't move means that its loop hangs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Patience:
    """Judges a loop by its heartbeat, from outside.

    One old heartbeat proves nothing: after Ctrl-Z and fg every heartbeat is old. A second look that finds the same one
    does, because a loop that hadn't hung would have moved it since.

    Args:
        seconds: how old a heartbeat may be.
    """

    seconds: float
    _suspected: float | None = field(default=None, init=False)  # a heartbeat that a look found too old

    def is_over(self, heartbeat: float, now: float) -> bool:
        """A look at ``heartbeat``; both are ``time.monotonic()`` in seconds."""
        if now - heartbeat <= self.seconds:
            return False
        seen_before = self._suspected == heartbeat
        self._suspected = heartbeat
        return seen_before
