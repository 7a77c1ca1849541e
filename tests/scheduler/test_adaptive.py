"""The adaptive K: the pure rule against brute force, and how a choice lives with it."""

import pytest
from scheduler_world import HashModel, World

from jaxserve.errors import ConfigError
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import AdaptiveDrafts, SchedulerConfig
from jaxserve.scheduler.adaptive import choose_draft_len, compute_bound_cap, judge

RULE = AdaptiveDrafts(token_cost=0.1, compute_bound_tokens=64, window=4, probe_window=1, first_pause=3, max_pause=10)


@pytest.mark.parametrize("cost", [0.0, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_draft_len_maximises_tokens_per_cost(rate, cost):
    gains = [sum(rate**i for i in range(k + 1)) / (1 + k * cost) for k in range(9)]
    chosen = choose_draft_len(rate, 8, cost)
    assert gains[chosen] == pytest.approx(max(gains))


def test_useless_drafts_pause_twice_as_long_each_time():
    pauses, pause = [], 0
    for _ in range(4):
        verdict = judge(accepted=0, failures=4, pause=pause, max_drafts=4, rule=RULE)
        assert verdict.draft_len == 0
        pause = verdict.pause
        pauses.append(pause)
    assert pauses == [3, 6, 10, 10]
    assert judge(accepted=16, failures=0, pause=10, max_drafts=4, rule=RULE) == (4, 0)


def test_compute_bound_cap():
    assert compute_bound_cap(16, 16, RULE) == 3
    assert compute_bound_cap(64, 64, RULE) == 0
    assert compute_bound_cap(200, 1, RULE) == 0


@pytest.mark.parametrize(
    "setting", [{"token_cost": -0.1}, {"probe_window": 0}, {"first_pause": 0}, {"compute_bound_tokens": 0}]
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
    assert planned[:4] == [4, 4, 4, 4]
    assert sum(map(bool, planned[4:])) == 4  # nothing but one probe after 3, 6, 10 and 10 steps without
    assert all(planned[step] == 4 for step in (7, 14, 25, 36))


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
