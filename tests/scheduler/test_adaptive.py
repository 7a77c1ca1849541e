"""The adaptive K: the pure rule against brute force, and how a choice lives with it."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_world import HashModel, World

from jaxserve.errors import ConfigError
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import AdaptiveDrafts, SchedulerConfig
from jaxserve.scheduler.adaptive import DraftLen, Wish, choose_draft_len, compute_bound_cap, judge, verify_costs

RULE = AdaptiveDrafts(token_cost=0.1, compute_bound_tokens=64, window=4, probe_window=1, first_pause=3, max_pause=10)
LINEAR = tuple(1 + 0.1 * k for k in range(5))  # costs of a verify step, by the drafts in it


def tokens(rate, k):
    return sum(rate**i for i in range(k + 1))


@pytest.mark.parametrize("cost", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_alone_it_maximises_tokens_per_cost(rate, cost):
    costs = [1 + k * cost for k in range(9)]
    gains = [tokens(rate, k) / costs[k] for k in range(9)]
    assert gains[choose_draft_len({Wish(rate, 8): 1}, 1, costs, 8)] == pytest.approx(max(gains))


RATES = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
WISHES = st.dictionaries(st.builds(Wish, RATES, st.integers(0, 4)), st.integers(1, 9), max_size=4)
COSTS = st.lists(st.floats(0.0, 1.5), min_size=4, max_size=4).map(lambda more: [1.0 + sum(more[:k]) for k in range(5)])


def product_of_speeds(wishes, num_others, costs, k):
    speeds = [tokens(wish.accept_rate, min(wish.most, k)) / costs[k] for wish in Counter(wishes).elements()]
    return math.prod(speeds) * (1 / costs[k]) ** num_others


@given(WISHES, st.integers(0, 30), COSTS, st.integers(0, 4))
def test_the_product_of_speeds_is_the_largest(wishes, num_others, costs, limit):
    num_running = sum(wishes.values()) + num_others
    found = choose_draft_len(wishes, num_running, costs, limit)
    products = [product_of_speeds(wishes, num_others, costs, k) for k in range(limit + 1)]
    assert products[found] == pytest.approx(max(products)) and products[found] >= 1.0
    assert all(product < products[found] * (1 + 1e-9) for product in products[:found])


@given(WISHES, st.integers(0, 30), COSTS)
def test_more_that_do_not_draft_never_lengthen_drafts(wishes, num_others, costs):
    num_running = sum(wishes.values()) + num_others
    longest = choose_draft_len(wishes, num_running, costs, 4)
    assert choose_draft_len(wishes, num_running + 1, costs, 4) <= longest


def test_one_that_is_always_right_is_outvoted_where_wide_steps_cost():
    runaway = {Wish(1.0, 4): 1}
    assert choose_draft_len(runaway, 1, [1.0, 2.0, 2.0, 2.0, 2.0], 4) == 4
    assert choose_draft_len(runaway, 8, [1.0, 2.0, 2.0, 2.0, 2.0], 4) == 0
    assert choose_draft_len(runaway, 8, [1.0, 1.0, 1.0, 1.0, 1.0], 4) == 4
    assert choose_draft_len(runaway, 8, [1.0, 1.0, 1.0, 2.0, 2.0], 4) == 2, "as far as it costs nobody anything"
    assert choose_draft_len({Wish(1.0, 4): 4}, 8, [1.0, 2.0, 2.0, 2.0, 2.0], 4) == 4, "four of eight are enough"


def test_a_step_costs_what_its_size_costs():
    rule = AdaptiveDrafts(token_cost=0.1, step_costs=((1, 1.0), (8, 2.0), (64, 5.0)))
    assert [rule.step_cost(n) for n in (1, 2, 8, 9, 64, 99)] == [1.0, 2.0, 2.0, 5.0, 5.0, 5.0]
    assert verify_costs({Wish(1.0, 4): 1}, 1, 2, rule) == pytest.approx([1.0, 2.1, 2.2])
    assert verify_costs({Wish(1.0, 4): 1, Wish(0.5, 1): 2}, 4, 4, rule) == pytest.approx([1.0, 1.1, 1.2, 2.8, 2.9])
    assert verify_costs({Wish(1.0, 4): 8}, 8, 4, AdaptiveDrafts(token_cost=0.1)) == pytest.approx(LINEAR)


def test_useless_drafts_pause_twice_as_long_each_time():
    pauses, pause = [], 0
    for _ in range(4):
        verdict = judge(0.0, pause, 4, LINEAR, RULE)
        assert verdict.draft_len == 0
        pause = verdict.pause
        pauses.append(pause)
    assert pauses == [3, 6, 10, 10]
    assert judge(1.0, 10, 4, LINEAR, RULE) == (4, 0)


def test_who_is_outvoted_for_long_is_measured_anew():
    draft_len = DraftLen(4, RULE)
    for accepted in (4, 1, 1, 1):
        draft_len.record(4, accepted, (1.0,) * 5)
    assert draft_len.wish == (0.7, 4)
    waits = []
    for _ in range(4):
        steps = 0
        while draft_len.wish.accept_rate < 1.0:
            draft_len.outvoted()
            steps += 1
        waits.append(steps)
        draft_len.record(4, 2, (1.0,) * 5)
    assert waits == [3, 6, 10, 10]


def test_a_probe_is_a_step_and_waits_for_what_it_says():
    draft_len = DraftLen(4, RULE)
    draft_len.record(4, 0, LINEAR)
    draft_len.record(4, 0, LINEAR)
    assert (draft_len.now, draft_len.rest_len) == (0, 3), "half a window without any accepted"
    for _ in range(3):
        draft_len.rest()
    assert draft_len.now == 4
    draft_len.probed()
    assert (draft_len.now, draft_len.rest_len) == (0, 0)
    draft_len.interrupted()
    assert draft_len.now == 4, "its result won't come"
    draft_len.probed()
    draft_len.record(4, 4, LINEAR)
    assert draft_len.now == 4


def test_a_probe_that_is_interrupted_starts_again():
    """After each of its steps, whether its result came or not."""
    for planned in range(3):
        for returned in range(planned):
            draft_len = DraftLen(4, AdaptiveDrafts(first_pause=1))
            for _ in range(4):
                draft_len.record(4, 0, LINEAR)
            draft_len.rest()
            assert (draft_len.now, draft_len.probe_len) == (4, 2)
            for _ in range(planned):
                draft_len.probed()
            for _ in range(returned):
                draft_len.record(4, 0, LINEAR)
            draft_len.interrupted()
            for _ in range(2):
                assert draft_len.now == 4
                draft_len.probed()
                draft_len.record(4, 4, LINEAR)
            assert draft_len.now == 4 and not draft_len.probe_len and not draft_len.rest_len


def test_compute_bound_cap():
    assert compute_bound_cap(16, 16, RULE) == 3
    assert compute_bound_cap(64, 64, RULE) == 0
    assert compute_bound_cap(200, 1, RULE) == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"token_cost": -0.1},
        {"step_costs": ((8, 1.0), (8, 2.0))},
        {"step_costs": ((8, 1.0), (1, 2.0))},
        {"step_costs": ((1, 0.0),)},
        {"probe_window": 0},
        {"first_pause": 0},
        {"compute_bound_tokens": 0},
    ],
)
def test_bad_constants_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        AdaptiveDrafts(**setting)


def world_for(rule, **settings):
    """Room for everybody, K = 4, no EOS."""
    sizes = {"max_model_len": 400, "max_num_batched_tokens": 256, "block_size": 16, "num_blocks": 512}
    config = SchedulerConfig(**sizes, max_drafts=4, adaptive_drafts=rule, **settings)
    return World(config, HashModel(eos_every=0))


def decode(accept, rule, steps=40):
    """Drafts planned in each step of one choice; ``accept(step)`` says how many are right."""
    world = world_for(rule, max_num_seqs=1, run_ahead=0)
    world.add([1, 2], SamplingParams(max_tokens=300, ignore_eos=True))
    planned = []
    for step in range(steps):
        world.dispatch(lambda most, step=step: (most, min(most, accept(step))))
        planned.append(int(world.steps[0][0].num_drafts[0]))
        world.commit()
    return planned[1:]


def test_drafts_that_fail_stop_and_are_probed():
    planned = decode(lambda step: 0, RULE)
    assert planned[:2] == [4, 4]
    assert sum(map(bool, planned[2:])) == 4  # nothing but one probe after 3, 6, 10 and 10 steps without
    assert all(planned[step] == 4 for step in (5, 12, 23, 34))


def test_drafts_come_back():
    planned = decode(lambda step: 4 if step > 15 else 0, RULE)
    assert planned[-10:] == [4] * 10


def test_switched_off_means_always_k():
    assert decode(lambda step: 0, None) == [4] * 39


def test_a_wide_batch_loses_its_drafts_until_rows_leave():
    """Sixteen rows leave no room for drafts below a width of 16; each that ends makes some."""
    rule = AdaptiveDrafts(token_cost=0.0, compute_bound_tokens=16)
    world = world_for(rule, max_num_seqs=16)
    for number in range(16):
        world.add([1, 2, 1 + number % 5], SamplingParams(max_tokens=50 if number < 2 else 3 + number, ignore_eos=True))
    found = {}
    while world.scheduler.has_work:
        world.dispatch(lambda most: (most, most))
        plan = world.steps[0][0]
        if (plan.widths - plan.num_drafts == 1).all():
            found.setdefault(len(plan.slots), set()).add(int(plan.num_drafts.max()))
        world.commit()
    assert found[16] == {0} and max(found) == 16
    assert all(num_rows * (1 + max(drafts)) <= 16 for num_rows, drafts in found.items())
    assert max(found[2]) == 4


def test_preempted_in_the_middle_of_a_probe_it_drafts_again():
    """At every step of two pauses and their probes, with what is in flight: drafts come back when they pay again."""
    rule = AdaptiveDrafts(token_cost=0.1, window=4, probe_window=2, first_pause=3, max_pause=6)
    for moment in range(2, 24):
        world = world_for(rule, max_num_seqs=1, run_ahead=1, enable_prefix_caching=False)
        (choice,) = world.add([1, 2], SamplingParams(max_tokens=300, ignore_eos=True))
        for step in range(60):
            world.dispatch(lambda most, step=step: (most, most if step > 30 else 0))
            if step == moment:
                world.preempt(choice)
            while len(world.steps) > 1:
                world.commit()
        assert choice.num_preemptions == 1
        assert int(world.steps[-1][0].num_drafts.max()) == 4, moment


def test_drafts_are_judged_by_the_costs_of_the_step_that_verified_them(monkeypatch):
    """Run ahead of them are steps of other costs, in which fewer choices draft or more of them run."""
    rule = AdaptiveDrafts(token_cost=0.1, step_costs=((8, 1.0), (64, 3.0)), window=4, probe_window=2, first_pause=3)
    world = world_for(rule, max_num_seqs=3, run_ahead=2)
    judged, correct = [], DraftLen.record
    monkeypatch.setattr(DraftLen, "record", lambda *args: (judged.append(args[-1]), correct(*args)))
    for number in range(3):
        world.add([1, 2, number], SamplingParams(max_tokens=60 + 20 * number, ignore_eos=True))
    num_other = 0
    for _ in range(120):
        world.dispatch(lambda most: (most, most // 2))
        if len(world.steps) > 2 or not world.scheduler.has_work:
            plan, (newest, _) = world.steps[0][0], world.steps[-1]
            world.commit()
            assert judged == [plan.verify_costs] * int(np.count_nonzero(plan.num_drafts))
            num_other += bool(judged) and newest.verify_costs != plan.verify_costs
            judged.clear()
    assert num_other


def test_a_step_costs_what_its_chunks_of_prompts_make_it_hold():
    """Beside a chunk of 20 tokens drafts cost nothing more. The 61 that are left after it are not all in one step."""
    rule = AdaptiveDrafts(token_cost=0.1, step_costs=((8, 1.0), (64, 3.0), (256, 9.0)))
    world = world_for(rule, max_num_seqs=2, run_ahead=0, max_prefill_chunk_len=20)
    world.add([1, 2], SamplingParams(max_tokens=60, ignore_eos=True))
    costs = []
    for step in range(12):
        if step == 2:
            world.add([1] * 81, SamplingParams(max_tokens=60, ignore_eos=True))
        world.dispatch(lambda most: (most, most))
        costs.append((world.steps[0][0].num_tokens, world.steps[0][0].verify_costs[-1:]))
        world.commit()
    assert costs[1] == (5, (1.4,)) and costs[3] == (25, (1.4,))
