"""The n choices of one request: the later ones wait for the first one's prompt, then share its blocks."""

from __future__ import annotations

from jaxserve.scheduler.request import Choice, Status


class Siblings:
    """What the choices of one request know about each other.

    ``leader`` is the running choice that computes the prompt. While its shareable prompt blocks aren't computed,
    siblings that come up for admission are parked; they return to the queue when the prompt is computed, or when the
    leader leaves the running set for whatever reason. So parked choices always have a running leader to wait for.
    """

    __slots__ = ("leader", "num_alive", "parked", "share_len")

    def __init__(self, share_len: int) -> None:
        self.share_len = share_len  # prompt tokens in blocks that siblings can share
        self.leader: Choice | None = None
        self.parked: list[Choice] = []
        self.num_alive = 0

    def must_wait(self) -> bool:
        """Whether a sibling that comes up for admission has to wait for the leader's prompt."""
        return self.leader is not None and self.leader.computed_len < self.share_len

    def unpark(self) -> list[Choice]:
        """The parked choices that are still waiting; nobody is parked afterwards."""
        parked, self.parked = self.parked, []
        return [choice for choice in parked if choice.status is Status.WAITING]
