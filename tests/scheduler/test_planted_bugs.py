"""The world and the sweeps see real bugs: each test plants one of the catalogue's bugs and must find it.

Every bug first passes through the same search unplanted, so that it's the bug that is found and nothing else.
"""

from __future__ import annotations

import numpy as np
import pytest
from scheduler_explore import Setting, explore
from scheduler_random import random_schedule
from scheduler_world import HashModel, World

import jaxserve.scheduler.commit
import jaxserve.scheduler.planner
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import SchedulerConfig, SchedulerInvariantError, StepResult
from jaxserve.scheduler.block_pool import BlockPool
from jaxserve.scheduler.commit import Committer
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.siblings import Siblings
from jaxserve.scheduler.state import SchedulerState

FOUND = (AssertionError, SchedulerInvariantError, IndexError, ValueError)


def at_the_context_limit() -> None:
    """Prompts and drafts that meet the context limit, all accept patterns."""
    for block_size in (1, 2, 4):
        for max_model_len in (8, 9):
            explore(Setting(block_size, 4, max_model_len, 0, (max_model_len - 4,), interrupts=()), 200)
            explore(Setting(block_size, 2, max_model_len, 1, (max_model_len - 4,), interrupts=()), 200)


def in_a_tiny_pool() -> None:
    """Two choices that fight for blocks, aborts and preemptions at every moment."""
    explore(Setting(1, 2, 6, 1, (2, 3)), 300)
    explore(Setting(2, 1, 6, 1, (3, 3), spare_blocks=1), 300)


def at_random() -> None:
    for seed in range(100):
        random_schedule(seed)


# ---- row 1: vLLM #16151 ----


def count_first_clamp_after(monkeypatch) -> None:
    """vLLM 0.8.2's allocator: drafts aren't cut at the limit, the block count is clamped to the table's columns."""
    correct = BlockPool.reserve
    table_lens: dict[int, int] = {}

    def reserve(self, table, up_to, hits=(), headroom=0):
        needed = -(-up_to // self.block_size) - len(table) - len(hits)
        if needed > 0:
            free_columns = table_lens[id(self)] - len(table) - len(hits)
            needed = min(needed, self.num_available, free_columns)
            assert needed > 0, "num_new_blocks > 0"  # the line that killed the engine
        return correct(self, table, (len(table) + len(hits) + needed) * self.block_size, hits, headroom)

    def step_width(planned_len, limit, wanted):
        return wanted

    original = SchedulerState.__init__

    def remember(self, config):
        original(self, config)
        table_lens[id(self.pool)] = -(-config.max_model_len // config.block_size)

    monkeypatch.setattr(SchedulerState, "__init__", remember)
    monkeypatch.setattr(BlockPool, "reserve", reserve)
    monkeypatch.setattr(jaxserve.scheduler.planner, "step_width", step_width)


def decode_to_the_limit(block_size: int, num_drafts: int) -> World:
    """The reproducer of ArcticInference #60: a small max_model_len, and an answer that would pass it."""
    world = world_at_the_limit(block_size, num_drafts)
    world.drain(lambda most: (most, most))  # a verbatim loop: every draft is accepted
    return world


def world_at_the_limit(block_size: int, num_drafts: int) -> World:
    config = SchedulerConfig(
        max_num_seqs=1,
        max_model_len=33,
        max_num_batched_tokens=64,
        block_size=block_size,
        num_blocks=64,
        max_drafts=num_drafts,
        adaptive_drafts=None,
        run_ahead=0,
    )
    world = World(config, HashModel(eos_every=0))
    world.add([1, 2, 3], SamplingParams(max_tokens=None, ignore_eos=True))
    return world


def test_row01_drafts_at_the_context_limit():
    for block_size in (1, 2, 4, 8, 16, 32, 33):
        for num_drafts in range(6):
            world = decode_to_the_limit(block_size, num_drafts)
            assert world.choices[0].tokens_len == 33
            assert world.choices[0].finish_reason == "length"


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 33])
def test_row01_is_seen_on_the_allocator_that_counts_first_and_clamps_after(monkeypatch, block_size):
    count_first_clamp_after(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        for num_drafts in range(1, 6):
            decode_to_the_limit(block_size, num_drafts)
    text = str(caught.value)
    assert any(trace in text for trace in ("num_new_blocks > 0", "room for the sampled token", "granted", "overflows"))


def test_row01_the_assertion_itself(monkeypatch):
    """A step whose drafts filled the table was rejected; the next one wants a block past it, and the engine is dead."""
    count_first_clamp_after(monkeypatch)
    scheduler = world_at_the_limit(block_size=1, num_drafts=4).scheduler
    with pytest.raises(AssertionError, match="num_new_blocks > 0"):
        while (plan := scheduler.schedule()) is not None:  # no device here, which would have noticed before
            token_ids = np.ones((1, 5), np.int32)
            scheduler.commit(plan, StepResult(plan.step_id, token_ids, np.ones(1, np.int32), plan.num_drafts))


# ---- other rows ----


def row02_resume_skips_the_width_rule(monkeypatch):
    correct = SchedulerState.start_decode

    def start_decode(self, choice):
        correct(self, choice)
        if choice.num_preemptions:
            choice.limit_len = 10**6

    monkeypatch.setattr(SchedulerState, "start_decode", start_decode)


def row03_in_flight_is_not_counted(monkeypatch):
    def step_width(planned_len, limit, wanted):
        return wanted if planned_len < limit else 0  # looks at what is committed, not at where the step would end

    monkeypatch.setattr(jaxserve.scheduler.planner, "step_width", step_width)


def row09_append_takes_one_block_at_most(monkeypatch):
    correct = BlockPool.reserve

    def reserve(self, table, up_to, hits=(), headroom=0):
        return correct(self, table, min(up_to, (len(table) + len(hits) + 1) * self.block_size), hits, headroom)

    monkeypatch.setattr(BlockPool, "reserve", reserve)


def row10_idle_hits_are_not_charged(monkeypatch):
    def reserve(self, table, up_to, hits=(), headroom=0):
        fresh = -(-up_to // self.block_size) - len(table) - len(hits)
        if fresh + headroom > self.num_available:
            return False
        for block in hits:
            if not self.refs[block]:
                del self._idle[block]
            self.refs[block] += 1
            table.append(block)
        for _ in range(fresh):
            block = self._free.pop() if self._free else self._evict_any()
            self.refs[block] = 1
            table.append(block)
        return True

    def evict_any(self):
        if not self._idle:
            raise IndexError("the pool promised more than it had")
        return self._evict()

    monkeypatch.setattr(BlockPool, "_evict_any", evict_any, raising=False)
    monkeypatch.setattr(BlockPool, "reserve", reserve)


def row11_length_is_checked_before_stop(monkeypatch):
    correct = jaxserve.scheduler.commit.append_tokens

    def append_tokens(choice, token_ids, stats):
        room = choice.max_output_len - len(choice.output_token_ids)
        if len(token_ids) >= room:
            del token_ids[room:]
            choice.output_token_ids.extend(token_ids)
            return "length", None
        return correct(choice, token_ids, stats)

    monkeypatch.setattr(jaxserve.scheduler.commit, "append_tokens", append_tokens)


def row14_stop_is_looked_for_in_the_last_token_only(monkeypatch):
    correct = jaxserve.scheduler.commit.append_tokens

    def append_tokens(choice, token_ids, stats):
        last, stops = token_ids[-1], choice.stop_ids
        choice.stop_ids = stops & {last}
        try:
            return correct(choice, token_ids, stats)
        finally:
            choice.stop_ids = stops

    monkeypatch.setattr(jaxserve.scheduler.commit, "append_tokens", append_tokens)


def row15_min_tokens_is_off_by_a_step(monkeypatch):
    correct = jaxserve.scheduler.commit.append_tokens

    def append_tokens(choice, token_ids, stats):
        minimum = choice.min_output_len
        if len(choice.output_token_ids) + len(token_ids) > minimum:
            choice.min_output_len = 0  # the step passes the minimum, so all of it is looked at
        try:
            return correct(choice, token_ids, stats)
        finally:
            choice.min_output_len = minimum

    monkeypatch.setattr(jaxserve.scheduler.commit, "append_tokens", append_tokens)


def row26_results_of_an_older_epoch_are_applied(monkeypatch):
    correct = SchedulerState.preempt

    def preempt(self, choice):
        correct(self, choice)
        choice.epoch -= 1

    monkeypatch.setattr(SchedulerState, "preempt", preempt)


def row27_in_flight_outlives_a_preemption(monkeypatch):
    correct = SchedulerState.preempt

    def preempt(self, choice):
        in_flight = choice.in_flight_len
        correct(self, choice)
        choice.in_flight_len = in_flight

    monkeypatch.setattr(SchedulerState, "preempt", preempt)


def row30_drafts_in_flight_are_published(monkeypatch):
    def publish(self, choice):
        block_size = self.config.block_size
        while choice.publish_at <= choice.computed_len + choice.in_flight_len:
            start = choice.num_published * block_size
            token_ids = list(choice.tokens(start, start + block_size))
            token_ids += [0] * (block_size - len(token_ids))
            block = choice.block_ids[choice.num_published]
            choice.cache_parent = self.cache.publish(block, choice.cache_parent, token_ids)
            choice.num_published += 1
            choice.publish_at += block_size
            choice.find_quiet_len()

    monkeypatch.setattr(SchedulerState, "publish", publish)


def row33_an_abort_keeps_the_last_block(monkeypatch):
    correct = BlockPool.release

    def release(self, table):
        if len(table) > 2:
            table.pop()
        correct(self, table)

    monkeypatch.setattr(BlockPool, "release", release)


def row34_blocks_are_freed_twice(monkeypatch):
    correct = SchedulerState.preempt

    def preempt(self, choice):
        table = list(choice.block_ids)
        correct(self, choice)
        self.pool._free.extend(table)

    monkeypatch.setattr(SchedulerState, "preempt", preempt)


def row35_a_held_block_is_evicted(monkeypatch):
    def release(self, table):
        for block in table:
            self.refs[block] -= 1
            if self.published[block]:
                self._idle[block] = None  # although another table may still hold it
            elif not self.refs[block]:
                self._free.append(block)
        table.clear()

    monkeypatch.setattr(BlockPool, "release", release)


def row37_the_last_rejection_is_not_counted(monkeypatch):
    correct = Committer.apply

    def apply(self, plan, result):
        commits = correct(self, plan, result)
        for commit in commits:
            drafts_len = plan.num_drafts[commit.row]
            if commit.finish_reason is None and drafts_len and result.num_emitted[commit.row] == drafts_len:
                commit.choice.computed_len += 1
        return commits

    monkeypatch.setattr(Committer, "apply", apply)


def row41_an_abort_forgets_the_steps_in_flight(monkeypatch):
    correct = SchedulerState.finish

    def finish(self, choice, reason, stop_reason=None):
        ended = correct(self, choice, reason, stop_reason)
        if ended and reason == "abort":
            choice.epoch -= 1
        return ended

    monkeypatch.setattr(SchedulerState, "finish", finish)


def row43_a_resumed_choice_loses_its_output(monkeypatch):
    correct = SchedulerState.preempt

    def preempt(self, choice):
        correct(self, choice)
        del choice.output_token_ids[:]

    monkeypatch.setattr(SchedulerState, "preempt", preempt)


def row45_siblings_wait_for_a_leader_that_left(monkeypatch):
    def unpark(self):
        return []

    monkeypatch.setattr(Siblings, "unpark", unpark)


def a_hit_covers_the_whole_prompt(monkeypatch):
    correct = PrefixCache.match

    def match(self, root, token_ids):
        return correct(self, root, [*token_ids, 0])

    monkeypatch.setattr(PrefixCache, "match", match)


def salts_are_ignored(monkeypatch):
    correct = SchedulerState.enter

    def enter(self, choice):
        correct(self, choice)
        if choice.cache_root is not None:
            choice.cache_root = "everybody's"

    monkeypatch.setattr(SchedulerState, "enter", enter)


@pytest.mark.parametrize(
    ("plant", "search"),
    [
        (row02_resume_skips_the_width_rule, in_a_tiny_pool),
        (row03_in_flight_is_not_counted, at_the_context_limit),
        (row09_append_takes_one_block_at_most, at_the_context_limit),
        (row10_idle_hits_are_not_charged, at_random),
        (row11_length_is_checked_before_stop, at_random),
        (row14_stop_is_looked_for_in_the_last_token_only, at_random),
        (row15_min_tokens_is_off_by_a_step, at_random),
        (row26_results_of_an_older_epoch_are_applied, in_a_tiny_pool),
        (row27_in_flight_outlives_a_preemption, in_a_tiny_pool),
        (row30_drafts_in_flight_are_published, in_a_tiny_pool),
        (row33_an_abort_keeps_the_last_block, in_a_tiny_pool),
        (row34_blocks_are_freed_twice, in_a_tiny_pool),
        (row35_a_held_block_is_evicted, at_random),
        (row37_the_last_rejection_is_not_counted, at_the_context_limit),
        (row41_an_abort_forgets_the_steps_in_flight, in_a_tiny_pool),
        (row43_a_resumed_choice_loses_its_output, in_a_tiny_pool),
        (row45_siblings_wait_for_a_leader_that_left, at_random),
        (a_hit_covers_the_whole_prompt, at_random),
        (salts_are_ignored, at_random),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_planted_bug_is_found(monkeypatch, plant, search):
    plant(monkeypatch)
    with pytest.raises(FOUND):
        search()


def test_nothing_is_found_where_nothing_is_planted():
    at_the_context_limit()
    in_a_tiny_pool()
    at_random()
