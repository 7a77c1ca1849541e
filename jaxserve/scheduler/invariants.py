"""Checks that the scheduler's structures tell the same story. Cheap enough for every idle tick and every test step."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from jaxserve.scheduler.request import Status

if TYPE_CHECKING:
    from jaxserve.scheduler.state import SchedulerState


class SchedulerInvariantError(RuntimeError):
    """The scheduler, or whoever gave it a result, is broken: the engine must not go on."""


def require(condition: bool, what: str, *where: object) -> None:
    """Raises SchedulerInvariantError(what) unless ``condition``."""
    if not condition:
        raise SchedulerInvariantError(" ".join([what, *map(repr, where)]))


def check_state(state: SchedulerState) -> None:
    """Checks everything; O(blocks + choices + outstanding rows).

    Raises:
        SchedulerInvariantError: the first thing that's wrong.
    """
    check_pool(state)
    check_running(state)
    check_waiting(state)


def check_idle(state: SchedulerState) -> None:
    """That nothing is held while there is no choice at all; a scan in C, quick enough between any two requests.

    Raises:
        SchedulerInvariantError: the first thing that's wrong.
    """
    pool = state.pool
    require(pool.num_available == pool.num_blocks, "blocks leaked or doubled:", pool.num_available, pool.num_blocks)
    require(not any(pool.refs), "references are left where nobody runs")
    require(len(state.free_slots) == state.config.max_num_seqs, "slots leaked or doubled:", state.free_slots)


def check_pool(state: SchedulerState) -> None:
    """Conservation: every block is free, idle or held; references are the tables that hold it; writers own alone."""
    pool, cache = state.pool, state.cache
    running = [*state.decoding, *state.prefilling]
    holders = Counter(block for choice in running for block in choice.block_ids)
    free, idle = pool.free_and_idle()
    require(len(free) + len(idle) + len(holders) == pool.num_blocks, "blocks leaked or doubled:", free, idle, holders)
    require(set(free) | set(idle) | set(holders) == set(range(pool.num_blocks)), "blocks lost:", free, idle, holders)
    require(
        all(holders[block] == refs for block, refs in enumerate(pool.refs)), "references don't match tables:", holders
    )
    require(all(pool.published[block] for block in idle), "an idle block has no content:", idle)
    require(not any(pool.published[block] for block in free), "a free block is published:", free)
    require(cache.is_consistent(), "prefix cache and pool disagree")
    for choice in running:
        require(len(set(choice.block_ids)) == len(choice.block_ids), "a table holds a block twice:", choice)
        for block in choice.block_ids[choice.computed_len // pool.block_size :]:
            require(pool.refs[block] == 1, "a block that will be written is shared:", block, choice)
            require(not pool.published[block], "a block that will be written is published:", block, choice)


def check_running(state: SchedulerState) -> None:
    """Lengths stay within limits and blocks; what is in flight is what the outstanding plans say; slots are unique."""
    config = state.config
    in_flight: Counter[int] = Counter()
    for plan in state.outstanding:
        for choice, epoch, width in zip(plan.choices, plan.epochs.tolist(), plan.widths.tolist(), strict=True):
            if choice.epoch == epoch:
                in_flight[choice.choice_id] += width
    for running in (state.decoding, state.prefilling):
        orders = [choice.order for choice in running]
        require(orders == sorted(set(orders)), "running choices are out of order:", orders)
        for choice in running:
            planned = choice.computed_len + choice.in_flight_len
            require(choice.status is Status.RUNNING, "a running choice isn't RUNNING:", choice)
            require(state.choices.get(choice.choice_id) is choice, "a running choice isn't known:", choice)
            require(in_flight[choice.choice_id] == choice.in_flight_len, "in_flight_len isn't the plans':", choice)
            require(choice.computed_len >= 0 and choice.in_flight_len >= 0, "negative length:", choice)
            require(choice.computed_len < choice.tokens_len <= config.max_model_len, "tokens_len is off:", choice)
            require(len(choice.output_token_ids) < choice.max_output_len, "a full choice still runs:", choice)
            require(planned <= choice.limit_len < config.max_model_len, "planned past the limit:", choice)
            require(planned <= choice.capacity_len, "planned past the table:", choice)
            require(choice.capacity_len == len(choice.block_ids) * config.block_size, "capacity_len is off:", choice)
            decoding = running is state.decoding
            require((planned >= choice.prefill_len) == decoding, "prefill and decode are mixed up:", choice)
            if decoding and choice.computed_len >= choice.prefill_len:
                require(choice.computed_len == choice.tokens_len - 1, "decode without exactly one new token:", choice)
            if choice.draft_token_ids is not None:
                require(not choice.in_flight_len, "stale drafts:", choice)
    everyone = [*state.decoding, *state.prefilling]
    slots = sorted([choice.slot for choice in everyone] + state.free_slots)
    require(slots == list(range(config.max_num_seqs)), "slots leaked or doubled:", slots)
    require(len(state.outstanding) <= config.run_ahead + 1, "too many plans outstanding")


def check_waiting(state: SchedulerState) -> None:
    """Waiting choices hold nothing; each is queued or parked, exactly once; the parked have somebody to wait for."""
    queued = state.waiting.choices()
    parked = [choice for siblings in state.siblings.values() for choice in siblings.parked]
    waiting = [choice for choice in state.choices.values() if choice.status is Status.WAITING]
    ids = Counter(choice.choice_id for choice in [*queued, *parked])
    require(ids == Counter(choice.choice_id for choice in waiting), "queue and waiting choices differ:", ids)
    require(len(queued) == len(state.waiting), "the queue's count is off:", len(queued), len(state.waiting))
    running = len(state.choices) - len(waiting)
    require(running == state.num_running, "running choices differ:", running, state.num_running)
    for choice in waiting:
        clean = not choice.block_ids and not choice.computed_len and not choice.in_flight_len and choice.slot == -1
        require(clean and choice.draft_token_ids is None, "a waiting choice holds something:", choice)
    for siblings in state.siblings.values():
        require(not siblings.parked or siblings.must_wait(), "parked choices wait for nobody:", siblings.parked)
        leader = siblings.leader
        require(leader is None or leader.status is Status.RUNNING, "a leader doesn't run:", leader)
    alive = Counter(c.group_id for c in state.choices.values() if c.siblings is not None)
    require(alive == Counter({k: s.num_alive for k, s in state.siblings.items()}), "sibling counts are off:", alive)
