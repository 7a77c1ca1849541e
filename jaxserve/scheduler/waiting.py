"""The queue of choices that wait for a slot, in the policy's order."""

from __future__ import annotations

import heapq

from jaxserve.scheduler.request import Choice, Status


class WaitingQueue:
    """A heap on ``Choice.order``. A preempted choice keeps its order, so it comes back in front of later arrivals.

    An aborted choice isn't searched for: its entry goes stale, is skipped when it comes up, and all stale entries are
    dropped once they outnumber the live ones.
    """

    __slots__ = ("_heap", "_num_stale")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Choice]] = []
        self._num_stale = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_stale

    def push(self, choice: Choice) -> None:
        heapq.heappush(self._heap, (choice.order, choice))

    def head(self) -> Choice | None:
        """The next choice, left in the queue."""
        heap = self._heap
        while heap and heap[0][1].status is not Status.WAITING:
            heapq.heappop(heap)
            self._num_stale -= 1
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Takes out the choice that ``head`` just gave."""
        heapq.heappop(self._heap)

    def mark_stale(self) -> None:
        """Says that one queued choice has left the WAITING state."""
        self._num_stale += 1
        if self._num_stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
            self._num_stale = 0

    def choices(self) -> list[Choice]:
        """The queued choices, in no particular order."""
        return [choice for _, choice in self._heap if choice.status is Status.WAITING]
