"""Stop strings in a text that arrives in pieces.

The match that is complete first wins (of those that end together, the longest), whatever the pieces are: so a stop
string may span tokens and steps, and speculation changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Holds back text that may be the beginning of a stop string, and ends the text at the first match.

    ``buffer`` is text that was pushed and not released::

        [ searched before ][ new piece ]
                           ^_searched
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        self._stops = tuple(stops)
        self._include = include_stop
        self._buffer = ""
        self._searched = 0
        self._longest = max(map(len, self._stops), default=0)

    def push(self, text: str, *, search: bool = True) -> tuple[str, str | None]:
        """Adds a piece.

        Args:
            text: the piece.
            search: False where a match that ends in this piece doesn't count (``min_tokens``).

        Returns:
            The text that can be released now, and the stop string that was found (push nothing after that).
        """
        self._buffer += text
        if search and (found := self._find()) is not None:
            begin, stop = found
            released = self._buffer[: begin + len(stop) if self._include else begin]
            self._buffer = ""
            return released, stop
        keep = self._held_len()
        released = self._buffer[: len(self._buffer) - keep]
        self._buffer = self._buffer[len(released) :]
        self._searched = keep
        return released, None

    def flush(self) -> str:
        """What is held back, once nothing will follow."""
        rest, self._buffer, self._searched = self._buffer, "", 0
        return rest

    def _find(self) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, begin, stop): the earliest end, then the earliest begin
        for stop in self._stops:
            begin = self._buffer.find(stop, max(0, self._searched - len(stop) + 1))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _held_len(self) -> int:
        """Length of the longest suffix that a stop string may still grow from."""
        for size in range(min(self._longest - 1, len(self._buffer)), 0, -1):
            suffix = self._buffer[-size:]
            if any(len(stop) > size and stop.startswith(suffix) for stop in self._stops):
                return size
        return 0
