"""Which choices run in the next step, and what a step's results change. Host only: imports no jax.

One cycle is ``plan = schedule()``, run it, ``commit(plan, result)``. Up to ``run_ahead`` plans may be uncommitted when
another one is built; results are committed in the order of the plans. Frees and preemptions take effect at once,
steps in flight or not: the device's effects are ordered by data dependence, so whatever a step in flight still writes
to a freed block is overwritten before a later step reads it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.admission import check, prepare
from jaxserve.scheduler.block_pool import BlockPool
from jaxserve.scheduler.commit import Commit, Committer
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.invariants import check_idle, check_state
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.planner import Planner
from jaxserve.scheduler.request import FINISH_REASONS, Choice, FinishReason, Status
from jaxserve.scheduler.state import SchedulerState
from jaxserve.scheduler.stats import SchedulerStats


class Scheduler:
    """Continuous batching over a paged pool. Not thread-safe: one thread calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.state = SchedulerState(config)
        self.planner = Planner(self.state)
        self.committer = Committer(self.state)
        self._deadlines: list[tuple[float, int, Choice]] = []
        self._num_arrivals = 0

    @property
    def choices(self) -> dict[int, Choice]:
        """Every choice that isn't finished, by id."""
        return self.state.choices

    @property
    def pool(self) -> BlockPool:
        return self.state.pool

    @property
    def stats(self) -> SchedulerStats:
        return self.state.stats

    @property
    def has_work(self) -> bool:
        """Whether any choice is unfinished."""
        return bool(self.state.choices)

    @property
    def num_running(self) -> int:
        return self.state.num_running

    @property
    def num_waiting(self) -> int:
        return len(self.state.choices) - self.state.num_running

    @property
    def num_in_flight(self) -> int:
        """Plans that aren't committed yet."""
        return len(self.state.outstanding)

    def validate(self, choice: Choice) -> None:
        """Raises what ``add`` would raise. Changes nothing, and may be called from any thread.

        Raises:
            InvalidRequestError: the choice could never run to its end here, or was added before.
        """
        check(choice, self.config)
        if choice.choice_id in self.state.choices or choice.status is not Status.WAITING or choice.epoch:
            raise InvalidRequestError(f"choice_id {choice.choice_id} was added before; allowed: a new Choice each time")

    def add(self, choice: Choice) -> None:
        """Queues a new choice. A refused one leaves no trace.

        Raises:
            InvalidRequestError: it could never run to its end here, or its id is taken.
        """
        self.validate(choice)
        prepare(choice, self.config, self._num_arrivals)
        self._num_arrivals += 1
        self.state.enter(choice)
        if choice.deadline is not None:
            heapq.heappush(self._deadlines, (choice.deadline, choice.arrival, choice))
            if len(self._deadlines) > 2 * len(self.state.choices) + 64:  # mostly of choices that ended long ago
                self._deadlines = [entry for entry in self._deadlines if not entry[2].finished]
                heapq.heapify(self._deadlines)

    def finish(self, choice: Choice, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """Ends a choice at any moment, steps in flight included. Idempotent.

        Returns:
            Whether it was alive.
        """
        if reason not in FINISH_REASONS:
            raise ValueError(f"finish reason is {reason!r}; allowed: {', '.join(FINISH_REASONS)}")
        return self.state.finish(choice, reason, stop_reason)

    def expire(self, now: float) -> list[Commit]:
        """Ends the choices whose ``max_seconds`` have passed at ``now`` (the clock of ``arrival_time``, in seconds)."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, choice = heapq.heappop(self._deadlines)
            if self.finish(choice, "timeout"):
                ended.append(Commit(choice, -1, [], "timeout"))
        return ended

    def schedule(self) -> StepPlan | None:
        """The next step's plan; None where nothing can be planned before a result is committed, or at all.

        Raises:
            SchedulerInvariantError: there is work, nothing is in flight, and still nothing can be planned.
        """
        return self.planner.plan()

    def commit(self, plan: StepPlan, result: StepResult) -> list[Commit]:
        """Applies the result of the oldest outstanding plan; rows of choices that have left it meanwhile are dropped.

        Returns:
            One entry for each choice that got tokens, an end, or prompt logprobs.

        Raises:
            SchedulerInvariantError: the result isn't the oldest plan's, or claims what the plan didn't allow.
        """
        return self.committer.apply(plan, result)

    def set_drafts(self, choice: Choice, token_ids: Sequence[int]) -> bool:
        """Proposes drafts for the next step (``drafting="host"``); what the width rule leaves of them is verified.

        Returns:
            False, and nothing is kept, where the choice isn't decoding or has tokens in flight.

        Raises:
            ValueError: an id lies outside the vocabulary, or drafts are looked up on the device.
        """
        if self.config.drafting != "host":
            raise ValueError('drafting is "device"; drafts can be set where it is "host"')
        drafts = [int(token_id) for token_id in token_ids]
        for token_id in drafts:
            if not 0 <= token_id < self.config.vocab_size:
                raise ValueError(f"draft token id is {token_id}; allowed: 0..{self.config.vocab_size - 1}")
        if choice.status is not Status.RUNNING or choice.in_flight_len or choice.computed_len < choice.prefill_len:
            return False
        choice.draft_token_ids = drafts
        return True

    def clear_prefix_cache(self) -> int:
        """Forgets the cached prefixes that no running choice holds; returns how many blocks that were."""
        return self.state.pool.evict_idle()

    def check_idle(self) -> None:
        """Checks that nothing is held; call it where ``has_work`` is False.

        Raises:
            SchedulerInvariantError: something leaked.
        """
        check_idle(self.state)

    def check_invariants(self) -> None:
        """Checks that every structure tells the same story; O(blocks + choices).

        Raises:
            SchedulerInvariantError: says which doesn't.
        """
        check_state(self.state)
