"""Everything a scheduler knows, and the moves that more than one of its parts make."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter

from jaxserve.scheduler.admission import NEVER
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.request import Choice, FinishReason, Status
from jaxserve.scheduler.siblings import Siblings
from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.scheduler.waiting import WaitingQueue

_ORDER = attrgetter("order")


class SchedulerState:
    """The structures of one scheduler.

    Attributes:
        choices: every choice that isn't finished, by id.
        waiting: those without a slot, except parked siblings.
        decoding: running choices whose prefill is planned to its end, oldest first.
        prefilling: the other running choices, oldest first.
        outstanding: plans that aren't committed yet, oldest first.
        siblings: of requests with n > 1, by their ``group_id``.
        free_slots: a stack.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.cache = PrefixCache(config.num_blocks, config.block_size)
        self.pool = self.cache.pool
        self.stats = SchedulerStats()
        self.choices: dict[int, Choice] = {}
        self.waiting = WaitingQueue()
        self.decoding: list[Choice] = []
        self.prefilling: list[Choice] = []
        self.outstanding: deque[StepPlan] = deque()
        self.siblings: dict[int, Siblings] = {}
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def enter(self, choice: Choice) -> None:
        """Queues a prepared choice."""
        if choice.params.n > 1:
            self._join_siblings(choice)
        if self.config.enable_prefix_caching:
            choice.cache_root = ("salt", choice.cache_salt)
        elif choice.siblings is not None:
            choice.cache_root = choice.siblings
        self.choices[choice.choice_id] = choice
        self.waiting.push(choice)

    def start_prefill(self, choice: Choice) -> None:
        """Makes a choice whose blocks are reserved a running one."""
        choice.slot = self.free_slots.pop()
        choice.status = Status.RUNNING
        siblings = choice.siblings
        if siblings is not None and siblings.leader is None:
            siblings.leader = choice
        insort(self.prefilling, choice, key=_ORDER)
        self.stats.num_admissions += 1

    def start_decode(self, choice: Choice) -> None:
        """Moves a choice whose last prefill chunk is planned."""
        self.prefilling.remove(choice)
        insort(self.decoding, choice, key=_ORDER)

    def finish(self, choice: Choice, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """Ends a choice wherever it stands; False where it has ended before."""
        if self.choices.get(choice.choice_id) is not choice:
            return False
        if choice.status is Status.RUNNING:
            self._leave_running(choice)
            choice.status = Status.FINISHED
        else:
            choice.status = Status.FINISHED
            if choice.siblings is None or choice not in choice.siblings.parked:
                self.waiting.mark_stale()
            else:
                choice.siblings.parked.remove(choice)
        choice.epoch += 1
        choice.draft_token_ids = None
        choice.finish_reason = reason
        choice.stop_reason = stop_reason
        del self.choices[choice.choice_id]
        siblings = choice.siblings
        if siblings is not None:
            siblings.num_alive -= 1
            if not siblings.num_alive:
                del self.siblings[choice.group_id]
        self.stats.num_finished[reason] += 1
        return True

    def newest_running(self) -> Choice:
        """The running choice that is last in the policy's order: the one to preempt."""
        if not self.prefilling:
            return self.decoding[-1]
        if not self.decoding or self.prefilling[-1].order > self.decoding[-1].order:
            return self.prefilling[-1]
        return self.decoding[-1]

    def preempt(self, choice: Choice) -> None:
        """Back to the queue without blocks; emitted tokens are kept, what is in flight is dropped and recomputed."""
        self._leave_running(choice)
        choice.status = Status.WAITING
        choice.epoch += 1
        choice.num_preemptions += 1
        choice.draft_len.interrupted()
        choice.draft_token_ids = None
        self.stats.num_preemptions += 1
        self.waiting.push(choice)

    def publish(self, choice: Choice) -> None:
        """Makes the blocks known that ``computed_len`` covers and the host knows the tokens of."""
        block_size = self.config.block_size
        known_len = min(choice.computed_len, choice.tokens_len)
        while choice.publish_at <= known_len:
            index = choice.num_published
            start = index * block_size
            choice.cache_parent = self.cache.publish(
                choice.block_ids[index], choice.cache_parent, choice.tokens(start, start + block_size)
            )
            choice.num_published = index + 1
            choice.publish_at += block_size
            choice.find_quiet_len()

    def wake_siblings(self, choice: Choice) -> None:
        """Queues the parked siblings again once the prompt they wait for is computed."""
        siblings = choice.siblings
        if siblings is not None and siblings.parked and not siblings.must_wait():
            for sibling in siblings.unpark():
                self.waiting.push(sibling)

    def _leave_running(self, choice: Choice) -> None:
        """Gives back slot and blocks, and lets siblings go on that waited for this choice's prompt."""
        for running in (self.decoding, self.prefilling):
            at = bisect_left(running, choice.order, key=_ORDER)
            if at < len(running) and running[at] is choice:
                del running[at]
        self.pool.release(choice.block_ids)
        self.free_slots.append(choice.slot)
        choice.slot = -1
        choice.computed_len = choice.in_flight_len = choice.capacity_len = 0
        choice.cache_parent, choice.num_published, choice.publish_at = None, 0, NEVER
        siblings = choice.siblings
        if siblings is not None and siblings.leader is choice:
            siblings.leader = None
            for sibling in siblings.unpark():
                self.waiting.push(sibling)

    def _join_siblings(self, choice: Choice) -> None:
        siblings = self.siblings.get(choice.group_id)
        if siblings is None:
            share_len = (choice.prompt_len - 1) // self.config.block_size * self.config.block_size
            siblings = self.siblings[choice.group_id] = Siblings(share_len)
        siblings.num_alive += 1
        choice.siblings = siblings
