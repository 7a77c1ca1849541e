"""When a heartbeat that doesn't move means that its loop hangs."""

from __future__ import annotations

from dataclasses import dataclass, field

_LONGEST_PERIOD = 1.0


@dataclass(slots=True)
class Patience:
    """Judges a loop by its heartbeat, from outside.

    An old heartbeat proves nothing: after Ctrl-Z and fg every heartbeat is old. So what counts is the time in which
    somebody watched: of the time between two looks no more than ``period``. Where a look comes later, the process was
    stopped or had no processor, and the loop couldn't move either.

    Args:
        seconds: how long a heartbeat may stand still.
    """

    seconds: float
    _heartbeat: float | None = field(default=None, init=False)  # as the last look found it
    _looked: float = field(default=0.0, init=False)
    _watched: float = field(default=0.0, init=False)  # seconds since it stands there

    @property
    def period(self) -> float:
        """Seconds from one look to the next."""
        return min(_LONGEST_PERIOD, self.seconds / 4)

    def is_over(self, heartbeat: float, now: float) -> bool:
        """A look at ``heartbeat``; both are ``time.monotonic()`` in seconds."""
        if heartbeat == self._heartbeat:
            self._watched += min(now - self._looked, self.period)
        else:
            self._heartbeat, self._watched = heartbeat, 0.0
        self._looked = now
        return self._watched > self.seconds
