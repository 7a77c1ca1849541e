"""Builds a step's plan: decode rows first, then prefill chunks, then new choices."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter

import numpy as np

from jaxserve.scheduler.adaptive import AdaptiveDrafts, choose_draft_len, compute_bound_cap, verify_costs
from jaxserve.scheduler.admission import NEVER
from jaxserve.scheduler.filling import tokens_to_run
from jaxserve.scheduler.invariants import SchedulerInvariantError
from jaxserve.scheduler.plan import Admission, StepPlan
from jaxserve.scheduler.request import Choice
from jaxserve.scheduler.rows import Rows
from jaxserve.scheduler.state import SchedulerState
from jaxserve.scheduler.width import draft_cap, step_width

_WISH = attrgetter("draft_len.wish")


class Planner:
    """Plans steps over a scheduler's state."""

    def __init__(self, state: SchedulerState) -> None:
        self.state = state
        self.config = state.config
        self._next_step_id = 0

    def plan(self) -> StepPlan | None:
        """The next step's plan; None where nothing can be planned before a result is committed, or at all.

        Raises:
            SchedulerInvariantError: there is work, nothing is in flight, and still nothing can be planned.
        """
        state = self.state
        if len(state.outstanding) > self.config.run_ahead or not state.choices:
            return None
        rows = Rows(self._next_step_id)
        preemptions = state.stats.num_preemptions
        self._plan_decodes(rows)
        self._plan_prefills(rows)
        if state.stats.num_preemptions == preemptions:
            self._admit(rows)
        self._end_prefills(rows)
        if not rows.choices:
            if not state.outstanding:
                raise SchedulerInvariantError(
                    f"no progress: {len(state.choices)} choices, {state.num_running} running, nothing in flight, "
                    f"{state.pool.num_available} of {state.pool.num_blocks} blocks available"
                )
            return None
        plan = rows.build(self.config.max_drafts if self.config.drafting == "host" else None)
        self._next_step_id += 1
        state.outstanding.append(plan)
        state.stats.num_steps += 1
        state.stats.num_planned_tokens += rows.num_tokens
        return plan

    def _plan_decodes(self, rows: Rows) -> None:
        """A row for every decoding choice that may emit more; drafts as far as they fit."""
        decoding = self.state.decoding
        cap = self._draft_cap(rows)
        host_drafts = self.config.drafting == "host"
        row_choices, row_widths, row_drafts = rows.choices, rows.widths, rows.drafts
        drafts: list[int] | None = None
        at = 0
        while at < len(decoding):  # a preemption shortens the list, never before ``at``
            choice = decoding[at]
            at += 1
            in_flight = choice.in_flight_len
            wanted = choice.draft_len
            drafts_len = wanted.now
            if host_drafts:
                drafts, choice.draft_token_ids = choice.draft_token_ids, None
                drafts_len = min(drafts_len, len(drafts)) if drafts else 0
            if in_flight and choice.host_synchronous:
                continue
            if drafts_len > cap:
                drafts_len = cap
                if not cap:
                    wanted.outvoted()
            planned = choice.computed_len + in_flight
            width = step_width(planned, choice.limit_len, 1 + drafts_len)
            if planned + width > choice.capacity_len:
                width = self._grow(choice, planned, width, rows, num_others=len(decoding) - at)
            if not width:
                continue
            if wanted.rest_len:
                wanted.rest()
            elif width > 1 and wanted.probe_len:
                wanted.probed()
            choice.in_flight_len = in_flight + width
            row_choices.append(choice)
            row_widths.append(width)
            if host_drafts:
                row_drafts.append(drafts[: width - 1] if drafts else [])
        rows.num_decodes = len(row_choices)
        rows.num_tokens = sum(row_widths)

    def _draft_cap(self, rows: Rows) -> int:
        config = self.config
        num_rows = len(self.state.decoding)
        if not config.max_drafts or not num_rows:
            return 0
        pending = bool(self.state.prefilling or (self.state.free_slots and len(self.state.waiting)))
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
            drafting = sum(1 for choice in self.state.decoding if choice.draft_len.now)
            limit = cap(drafting) if drafting else 0
        return limit if rule is None or not limit else self._fair_cap(limit, rule, rows)

    def _fair_cap(self, limit: int, rule: AdaptiveDrafts, rows: Rows) -> int:
        """What the adaptive rule leaves of ``limit``; the plan keeps the costs that it reckoned with."""
        state, config = self.state, self.config
        wishes = Counter(map(_WISH, state.decoding))
        if not any(wish.most for wish in wishes):
            return 0
        longest = config.max_prefill_chunk_len or config.max_num_batched_tokens
        prefill = sum(min(longest, c.prefill_len - c.computed_len - c.in_flight_len) for c in state.prefilling)
        num_tokens = min(len(state.decoding) + prefill, config.max_num_batched_tokens)
        rows.verify_costs = costs = verify_costs(wishes, num_tokens, config.max_drafts, rule)
        return choose_draft_len(wishes, state.num_running, costs, limit)

    def _grow(self, choice: Choice, planned: int, width: int, rows: Rows, *, num_others: int) -> int:
        """Reserves blocks for a decode row: without drafts if they don't fit, else at the expense of the newest choice.

        A choice with tokens in flight preempts nobody: its own demand is an upper bound that may still come down.
        Drafts make nobody preempt: they leave a block for each of the ``num_others`` that are still to be planned.

        Returns:
            The width that is covered, in full; 0 where the choice waits or, being the newest, was preempted itself.
        """
        table = choice.block_ids
        held = len(table)
        reserve = self.state.pool.reserve
        while not reserve(table, planned + width, headroom=num_others if width > 1 else 0):
            if width > 1:
                width = 1
                continue
            if choice.in_flight_len:
                return 0
            victim = self.state.newest_running()
            self.state.preempt(victim)
            if victim is choice:
                return 0
        choice.capacity_len = len(table) * self.config.block_size
        for index in range(held, len(table)):
            rows.updates.append((choice.slot, index, table[index]))
        return width

    def _plan_prefills(self, rows: Rows) -> None:
        for choice in list(self.state.prefilling):
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
        rows.samples.append(planned + width == choice.prefill_len)

    def _end_prefills(self, rows: Rows) -> None:
        """Cuts the last chunk where the step then fills its bucket. Prompts planned to their end decode next."""
        if not rows.samples:
            return
        config, num_rows = self.config, len(rows.choices)
        excess = rows.num_tokens - tokens_to_run(rows.num_tokens, num_rows, config.step_sizes, config.fixed_step_cost)
        if 0 < excess < rows.widths[-1]:
            rows.choices[-1].in_flight_len -= excess
            rows.widths[-1] -= excess
            rows.num_tokens -= excess
            rows.samples[-1] = False
        for choice, samples in zip(rows.choices[rows.num_decodes :], rows.samples, strict=True):
            if samples:
                self.state.start_decode(choice)

    def _admit(self, rows: Rows) -> None:
        """Gives slots and blocks to waiting choices, in order, as far as they reach."""
        waiting = self.state.waiting
        while self.state.free_slots and rows.num_tokens < self.config.max_num_batched_tokens:
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
            self.state.start_prefill(choice)
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
        pool, config = self.state.pool, self.config
        headroom = pool.blocks_for(self.state.num_running * config.admission_headroom_len)
        if self.state.num_running and choice.refusal is not None:
            needed, retry_at = choice.refusal
            if pool.num_available < needed and self._next_step_id < retry_at:
                return False  # a long prompt isn't looked up again each step just to be refused again
        tokens_len = choice.tokens_len
        hits: list[int] = []
        parent = choice.cache_root
        logprobs_missing = choice.needs_prompt_logprobs and choice.prompt_logprobs_len < choice.prompt_len
        if parent is not None and not logprobs_missing:
            hits, parent = self.state.cache.match(choice.cache_root, choice.tokens(0, tokens_len))
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
        choice.find_quiet_len()
        if choice.cache_root is not None and not logprobs_missing:
            self.state.stats.num_prefix_queries += tokens_len
        self.state.stats.num_prefix_hits += choice.computed_len
        if not choice.num_preemptions:
            choice.num_cached_tokens = choice.computed_len
        return True
