"""Which choices run in the next step, and what a step's results change. Host only: imports no jax.

One cycle is ``plan = schedule()``, run it, ``commit(plan, result)``. Up to ``run_ahead`` plans may be uncommitted when
another one is built; results are committed in the order of the plans. Frees and preemptions take effect at once,
steps in flight or not: the device's effects are ordered by data dependence, so whatever a step in flight still writes
to a freed block is overwritten before a later step reads it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from jaxserve.errors import InvalidRequestError
from jaxserve.scheduler.adaptive import compute_bound_cap, judge
from jaxserve.scheduler.admission import NEVER, check, prepare
from jaxserve.scheduler.commit import Commit, append_tokens
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.invariants import SchedulerInvariantError, check_scheduler
from jaxserve.scheduler.plan import Admission, Logprobs, StepPlan, StepResult
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.request import FINISH_REASONS, Choice, FinishReason, Status
from jaxserve.scheduler.rows import Rows
from jaxserve.scheduler.siblings import Siblings
from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.scheduler.waiting import WaitingQueue
from jaxserve.scheduler.width import draft_cap, step_width

_ORDER = attrgetter("order")


class Scheduler:
    """Continuous batching over a paged pool. Not thread-safe: one thread calls it.

    Attributes:
        choices: every choice that isn't finished, by id.
        decoding: running choices whose prefill is planned to its end, oldest first.
        prefilling: the other running choices, oldest first.
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
        self.siblings: dict[str, Siblings] = {}
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._deadlines: list[tuple[float, int, Choice]] = []
        self._num_arrivals = 0
        self._next_step_id = 0

    # ---- what callers see -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any choice is unfinished."""
        return bool(self.choices)

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self.choices) - self.num_running

    @property
    def num_in_flight(self) -> int:
        """Plans that aren't committed yet."""
        return len(self.outstanding)

    def validate(self, choice: Choice) -> None:
        """Raises what ``add`` would raise. Changes nothing.

        Raises:
            InvalidRequestError: the choice could never run to its end here.
        """
        check(choice, self.config)

    def add(self, choice: Choice) -> None:
        """Queues a new choice. A refused one leaves no trace.

        Raises:
            InvalidRequestError: it could never run to its end here, or its id is taken.
        """
        check(choice, self.config)
        if choice.choice_id in self.choices or choice.status is not Status.WAITING or choice.epoch:
            raise InvalidRequestError(f"choice_id {choice.choice_id} was added before; allowed: a new Choice each time")
        prepare(choice, self.config, self._num_arrivals)
        self._num_arrivals += 1
        if choice.params.n > 1:
            self._join_siblings(choice)
        if self.config.enable_prefix_caching:
            choice.cache_root = ("salt", choice.cache_salt)
        elif choice.siblings is not None:
            choice.cache_root = choice.siblings
        self.choices[choice.choice_id] = choice
        self.waiting.push(choice)
        if choice.deadline is not None:
            heapq.heappush(self._deadlines, (choice.deadline, choice.arrival, choice))

    def finish(self, choice: Choice, reason: FinishReason, stop_reason: int | str | None = None) -> bool:
        """Ends a choice at any moment, steps in flight included. Idempotent.

        Returns:
            Whether it was alive.
        """
        if reason not in FINISH_REASONS:
            raise ValueError(f"finish reason is {reason!r}; allowed: {', '.join(FINISH_REASONS)}")
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
                del self.siblings[choice.request_id]
        self.stats.num_finished[reason] = self.stats.num_finished.get(reason, 0) + 1
        return True

    def expire(self, now: float) -> list[Commit]:
        """Ends the choices whose ``max_seconds`` have passed at ``now`` (the clock of ``arrival_time``, in seconds)."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, choice = heapq.heappop(self._deadlines)
            if self.finish(choice, "timeout"):
                ended.append(Commit(choice, -1, [], "timeout"))
        return ended

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
        return self.pool.evict_idle()

    def check_invariants(self) -> None:
        """Checks that every structure tells the same story; O(blocks + choices).

        Raises:
            SchedulerInvariantError: says which doesn't.
        """
        check_scheduler(self)

    # ---- schedule ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step's plan; None where nothing can be planned before a result is committed, or at all.

        Raises:
            SchedulerInvariantError: there is work, nothing is in flight, and still nothing can be planned.
        """
        if len(self.outstanding) > self.config.run_ahead or not self.choices:
            return None
        rows = Rows(self._next_step_id)
        preemptions = self.stats.num_preemptions
        self._plan_decodes(rows)
        self._plan_prefills(rows)
        if self.stats.num_preemptions == preemptions:
            self._admit(rows)
        if not rows.choices:
            if not self.outstanding:
                raise SchedulerInvariantError(
                    f"no progress: {self.num_waiting} waiting, {self.num_running} running, nothing in flight, "
                    f"{self.pool.num_available} of {self.pool.num_blocks} blocks available"
                )
            return None
        plan = rows.build(self.config.max_drafts if self.config.drafting == "host" else None)
        self._next_step_id += 1
        self.outstanding.append(plan)
        self.stats.num_steps += 1
        self.stats.num_planned_tokens += rows.num_tokens
        return plan

    def _plan_decodes(self, rows: Rows) -> None:
        """A row for every decoding choice that may emit more; drafts as far as they fit."""
        decoding = self.decoding
        cap = self._draft_cap()
        host_drafts = self.config.drafting == "host"
        i = 0
        while i < len(decoding):
            choice = decoding[i]
            i += 1
            in_flight = choice.in_flight_len
            if in_flight and choice.host_synchronous:
                continue
            drafts_len = choice.draft_len
            if not drafts_len and choice.draft_pause:
                drafts_len = self._wait_for_probe(choice)
            if host_drafts:
                drafts, choice.draft_token_ids = choice.draft_token_ids, None
                drafts_len = min(drafts_len, len(drafts)) if drafts else 0
            if drafts_len > cap:
                drafts_len = cap
            planned = choice.computed_len + in_flight
            width = step_width(planned, choice.limit_len, 1 + drafts_len)
            if not width:
                continue
            if planned + width > choice.capacity_len:
                width = self._grow(choice, planned, width, rows)
                if not width:
                    break
            choice.in_flight_len = in_flight + width
            rows.choices.append(choice)
            rows.widths.append(width)
            if host_drafts:
                rows.drafts.append(drafts[: width - 1] if drafts else [])
        rows.num_decodes = len(rows.choices)
        rows.num_tokens = sum(rows.widths)

    def _draft_cap(self) -> int:
        config = self.config
        num_rows = len(self.decoding)
        if not config.max_drafts or not num_rows:
            return 0
        pending = bool(self.prefilling or (self.free_slots and len(self.waiting)))
        rule = config.adaptive_drafts

        def cap(num_drafting: int) -> int:
            limit = draft_cap(
                num_decodes=num_rows,
                num_drafting=num_drafting,
                prefill_pending=pending,
                max_drafts=config.max_drafts,
                max_tokens=config.max_num_batched_tokens,
                max_sample_rows=config.max_sample_rows or 0,
                max_num_seqs=config.max_num_seqs,
            )
            if rule is None:
                return limit
            return min(limit, compute_bound_cap(num_rows, num_drafting, rule))

        limit = cap(num_rows)
        if limit < config.max_drafts:  # count those that want drafts only where it matters
            drafting = sum(1 for choice in self.decoding if choice.draft_len or choice.draft_pause)
            limit = cap(drafting) if drafting else 0
        return limit

    def _wait_for_probe(self, choice: Choice) -> int:
        """One step of a pause; the drafts of this step, which are more than 0 when the pause is over."""
        rule = self.config.adaptive_drafts
        choice.draft_wait -= 1
        if choice.draft_wait > 0 or rule is None:
            return 0
        choice.draft_len = choice.max_drafts
        choice.draft_steps = rule.window - rule.probe_window
        choice.draft_accepted = choice.draft_failures = 0
        return choice.draft_len

    def _grow(self, choice: Choice, planned: int, width: int, rows: Rows) -> int:
        """Reserves blocks for a decode row, without drafts if they don't fit, else at the expense of the newest choice.

        Returns:
            The width that is covered, in full; 0 where the choice itself was the newest and was preempted.
        """
        table = choice.block_ids
        held = len(table)
        reserve = self.pool.reserve
        while not reserve(table, planned + width):
            if width > 1:  # drafts never preempt anybody
                width = 1
                continue
            victim = self._newest_running()
            self._preempt(victim)
            if victim is choice:
                return 0
        choice.capacity_len = len(table) * self.config.block_size
        for index in range(held, len(table)):
            rows.updates.append((choice.slot, index, table[index]))
        return width

    def _plan_prefills(self, rows: Rows) -> None:
        for choice in list(self.prefilling):
            if rows.num_tokens >= self.config.max_num_batched_tokens:
                return
            self._plan_chunk(choice, rows)

    def _plan_chunk(self, choice: Choice, rows: Rows) -> None:
        """The next piece of a prefill, whose blocks were reserved at admission."""
        config = self.config
        planned = choice.computed_len + choice.in_flight_len
        wanted = min(choice.prefill_len - planned, config.max_num_batched_tokens - rows.num_tokens)
        if config.max_prefill_chunk_len is not None:
            wanted = min(wanted, config.max_prefill_chunk_len)
        width = step_width(planned, choice.limit_len, wanted)
        choice.in_flight_len += width
        rows.choices.append(choice)
        rows.widths.append(width)
        rows.num_tokens += width
        samples = planned + width == choice.prefill_len
        rows.samples.append(samples)
        if samples:
            self.prefilling.remove(choice)
            insort(self.decoding, choice, key=_ORDER)

    def _admit(self, rows: Rows) -> None:
        """Gives slots and blocks to waiting choices, in order, as far as they reach."""
        waiting = self.waiting
        while self.free_slots and rows.num_tokens < self.config.max_num_batched_tokens:
            choice = waiting.head()
            if choice is None:
                return
            siblings = choice.siblings
            if siblings is not None and siblings.must_wait():
                waiting.pop()
                siblings.parked.append(choice)
                continue
            if not self._reserve_prefill(choice):
                return
            waiting.pop()
            choice.slot = self.free_slots.pop()
            choice.status = Status.RUNNING
            if siblings is not None and siblings.leader is None:
                siblings.leader = choice
            insort(self.prefilling, choice, key=_ORDER)
            self.stats.num_admissions += 1
            rows.admissions.append(
                Admission(
                    slot=choice.slot,
                    choice=choice,
                    token_ids=np.array(choice.tokens(0, choice.prefill_len), np.int32),
                    computed_len=choice.computed_len,
                    block_ids=np.array(choice.block_ids, np.int32),
                )
            )
            self._plan_chunk(choice, rows)

    def _reserve_prefill(self, choice: Choice) -> bool:
        """Blocks for all host-known tokens of a waiting choice, cached ones first, or none at all.

        Something must be left over for those that run already, or each admission would soon end in a preemption.
        """
        pool, config = self.pool, self.config
        headroom = pool.blocks_for(self.num_running * config.admission_headroom_len)
        if self.num_running and choice.refusal is not None:
            needed, retry_at = choice.refusal
            if pool.num_available < needed and self._next_step_id < retry_at:
                return False  # a long prompt isn't looked up again each step just to be refused again
        tokens_len = choice.tokens_len
        hits: list[int] = []
        parent = choice.cache_root
        if parent is not None and not choice.needs_prompt_logprobs:
            hits, parent = self.cache.match(choice.cache_root, choice.tokens(0, tokens_len))
            self.stats.num_prefix_queries += tokens_len
        if not pool.reserve(choice.block_ids, tokens_len, hits, headroom):
            idle_hits = sum(1 for block in hits if not pool.refs[block])
            needed = pool.blocks_for(tokens_len) - len(hits) + idle_hits + headroom
            choice.refusal = (needed, self._next_step_id + config.admission_retry_steps)
            return False
        choice.refusal = None
        block_size = config.block_size
        choice.prefill_len = tokens_len
        choice.computed_len = len(hits) * block_size
        choice.capacity_len = len(choice.block_ids) * block_size
        choice.cache_parent = parent
        choice.num_published = len(hits)
        choice.publish_at = (len(hits) + 1) * block_size if parent is not None else NEVER
        self.stats.num_prefix_hits += choice.computed_len
        if not choice.num_preemptions:
            choice.num_cached_tokens = choice.computed_len
        return True

    # ---- commit -----------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[Commit]:
        """Applies the result of the oldest outstanding plan; rows of choices that have left it meanwhile are dropped.

        Returns:
            One entry for each choice that got tokens, an end, or prompt logprobs.

        Raises:
            SchedulerInvariantError: the result isn't the oldest plan's, or claims what the plan didn't allow.
        """
        if not self.outstanding or self.outstanding[0] is not plan or result.step_id != plan.step_id:
            raise SchedulerInvariantError(f"result of step {result.step_id} isn't that of the oldest outstanding plan")
        self.outstanding.popleft()
        commits: list[Commit] = []
        stats = self.stats
        rows = zip(
            plan.choices,
            plan.epochs.tolist(),
            plan.widths.tolist(),
            plan.num_drafts.tolist(),
            plan.samples.tolist(),
            result.num_emitted.tolist(),
            result.num_drafted.tolist(),
            result.token_ids.tolist(),
            strict=True,
        )
        window = self.config.adaptive_drafts.window if self.config.adaptive_drafts is not None else NEVER
        for row, (choice, epoch, width, drafts_len, samples, emitted, drafted, token_ids) in enumerate(rows):
            if choice.epoch != epoch:
                stats.num_dropped_rows += 1
                continue
            choice.in_flight_len -= width
            if not samples:
                choice.computed_len += width
                self._publish(choice)
                self._wake_siblings(choice)
                if row in result.prompt_logprobs:
                    commits.append(Commit(choice, row, [], None, None, _new_logprobs(choice, row, result)))
                continue
            if not 1 <= emitted <= 1 + drafted <= 1 + drafts_len:
                raise SchedulerInvariantError(
                    f"step {plan.step_id} row {row}: {emitted} tokens from {drafted} drafts of at most {drafts_len}"
                )
            choice.computed_len += width - 1 - drafts_len + emitted
            if drafts_len:
                choice.num_drafted += drafted
                choice.num_accepted += emitted - 1
                stats.num_drafted_tokens += drafted
                stats.num_accepted_tokens += emitted - 1
                if choice.draft_len:
                    choice.draft_steps += 1
                    choice.draft_accepted += emitted - 1
                    if emitted <= drafts_len:
                        choice.draft_failures += 1
                    if choice.draft_steps >= window:
                        self._judge_drafts(choice)
            new, reason, stop_reason = append_tokens(choice, token_ids[:emitted], stats)
            stats.num_emitted_tokens += len(new)
            if choice.computed_len >= choice.publish_at:
                self._publish(choice)
            self._wake_siblings(choice)
            commit = Commit(choice, row, new, reason, stop_reason)
            if row in result.prompt_logprobs:
                commit.prompt_logprobs = _new_logprobs(choice, row, result)
            commits.append(commit)
            if reason is not None:
                self.finish(choice, reason, stop_reason)
        return commits

    def _publish(self, choice: Choice) -> None:
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

    def _judge_drafts(self, choice: Choice) -> None:
        rule = self.config.adaptive_drafts
        if rule is None:
            return
        verdict = judge(choice.draft_accepted, choice.draft_failures, choice.draft_pause, choice.max_drafts, rule)
        choice.draft_len, choice.draft_pause = verdict
        choice.draft_wait = verdict.pause
        choice.draft_steps = choice.draft_accepted = choice.draft_failures = 0

    # ---- leaving ----------------------------------------------------------------------------------------------------

    def _newest_running(self) -> Choice:
        """The running choice that is last in the policy's order: the one to preempt."""
        if not self.prefilling:
            return self.decoding[-1]
        if not self.decoding or self.prefilling[-1].order > self.decoding[-1].order:
            return self.prefilling[-1]
        return self.decoding[-1]

    def _preempt(self, choice: Choice) -> None:
        """Back to the queue without blocks; emitted tokens are kept, what is in flight is dropped and recomputed."""
        self._leave_running(choice)
        choice.status = Status.WAITING
        choice.epoch += 1
        choice.num_preemptions += 1
        choice.draft_token_ids = None
        self.stats.num_preemptions += 1
        self.waiting.push(choice)

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
        siblings = self.siblings.get(choice.request_id)
        if siblings is None:
            share_len = (choice.prompt_len - 1) // self.config.block_size * self.config.block_size
            siblings = self.siblings[choice.request_id] = Siblings(share_len)
        siblings.num_alive += 1
        choice.siblings = siblings

    def _wake_siblings(self, choice: Choice) -> None:
        siblings = choice.siblings
        if siblings is not None and siblings.parked and not siblings.must_wait():
            for sibling in siblings.unpark():
                self.waiting.push(sibling)


def _new_logprobs(choice: Choice, row: int, result: StepResult) -> tuple[int, Logprobs] | None:
    """A row's prompt logprobs, less what was handed out before a preemption."""
    first, logprobs = result.prompt_logprobs[row]
    end = first + len(logprobs.token_logprob)
    start = max(first, choice.prompt_logprobs_len)
    if start >= end:
        return None
    choice.prompt_logprobs_len = end
    if start == first:
        return first, logprobs
    skip = start - first
    return start, Logprobs(
        logprobs.token_logprob[skip:], logprobs.token_rank[skip:], logprobs.top_ids[skip:], logprobs.top_logprobs[skip:]
    )
