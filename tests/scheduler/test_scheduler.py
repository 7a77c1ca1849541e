"""What a plan holds: admission, widths, order, preemption."""

import subprocess
import sys

import pytest
from scheduler_world import everything, make_config, make_world, nothing

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import SchedulerInvariantError, Status


def rows_of(plan):
    return [
        (choice.choice_id, width, bool(samples))
        for choice, width, samples in zip(plan.choices, plan.widths.tolist(), plan.samples, strict=True)
    ]


def test_imports_no_jax():
    code = (
        "import sys, jaxserve.scheduler; sys.exit(any(name.split('.')[0] in ('jax', 'flax') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_model_len", 1),
        ("max_num_batched_tokens", 3),
        ("max_sample_rows", 3),
        ("block_size", 0),
        ("num_blocks", 0),
        ("max_drafts", -1),
        ("run_ahead", -1),
        ("policy", "random"),
        ("drafting", "psychic"),
        ("repetition", "maybe"),
        ("max_seconds", 0),
        ("max_prefill_chunk_len", 0),
        ("fixed_step_cost", -1),
        ("step_sizes", (8, 4)),
        ("step_sizes", (0, 4)),
    ],
)
def test_bad_config_names_the_setting(name, value):
    with pytest.raises(ConfigError, match=name):
        make_config(**{name: value})


# ---- admission (rows 4, 5, 7) ----


@pytest.mark.parametrize(
    ("prompt_len", "settings", "name"),
    [
        (0, {}, "prompt"),
        (32, {"max_tokens": 1}, "prompt"),
        (33, {"max_tokens": 1}, "prompt"),
        (31, {"max_tokens": 2}, "max_tokens"),
        (10, {"max_tokens": 23}, "max_tokens"),
        (10, {"max_tokens": None, "min_tokens": 23}, "min_tokens"),
        (10, {"max_tokens": 5, "num_speculative_tokens": 1}, "num_speculative_tokens"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_no_trace(prompt_len, settings, name):
    world = make_world()
    with pytest.raises(InvalidRequestError, match=name):
        world.add([1] * prompt_len, SamplingParams(**settings))
    assert not world.scheduler.has_work and world.scheduler.schedule() is None
    world.scheduler.check_invariants()
    (choice,) = world.add([1] * 31, SamplingParams(max_tokens=1))
    world.drain(nothing)
    assert len(choice.output_token_ids) == 1


def test_a_pool_that_is_too_small_for_a_request_refuses_it():
    world = make_world(num_blocks=4)
    with pytest.raises(InvalidRequestError, match="17"):
        world.add([1] * 10, SamplingParams(max_tokens=8))
    world.add([1] * 10, SamplingParams(max_tokens=7))
    world.drain(nothing)
    assert len(world.choices[0].output_token_ids) == 7


@pytest.mark.parametrize("num_drafts", range(5))
@pytest.mark.parametrize("run_ahead", range(3))
def test_exact_length_at_the_context_limit(num_drafts, run_ahead):
    for prompt_len in range(1, 32, 5):
        world = make_world(max_drafts=num_drafts, run_ahead=run_ahead)
        (choice,) = world.add([1] * prompt_len, SamplingParams(max_tokens=32 - prompt_len, ignore_eos=True))
        world.drain(everything)
        assert len(choice.output_token_ids) == 32 - prompt_len and choice.finish_reason == "length"


def test_a_choice_is_added_once():
    world = make_world()
    (choice,) = world.add([1, 2])
    with pytest.raises(InvalidRequestError, match="choice_id"):
        world.scheduler.add(choice)
    world.abort(choice)
    with pytest.raises(InvalidRequestError, match="choice_id"):
        world.scheduler.add(choice)


# ---- the plan ----


def test_decodes_come_first_then_chunks_by_budget():
    world = make_world(max_num_batched_tokens=8)
    world.add([1, 2, 3], SamplingParams(max_tokens=9))
    world.dispatch(nothing)
    world.commit()
    world.add([2] * 20, SamplingParams(max_tokens=4))
    plans = []
    for _ in range(3):
        world.dispatch(nothing)
        plans.append(rows_of(world.steps[0][0]))
        world.commit()
    assert plans == [[(0, 1, True), (1, 7, False)], [(0, 1, True), (1, 7, False)], [(0, 1, True), (1, 6, True)]]


def test_prefill_goes_on_beside_drafts():
    world = make_world(max_num_seqs=2, max_num_batched_tokens=8, max_drafts=4)
    world.add([1, 2, 3], SamplingParams(max_tokens=29))
    world.dispatch(nothing)
    world.commit()
    world.add([2] * 20, SamplingParams(max_tokens=4))
    world.dispatch(nothing)
    assert rows_of(world.steps[0][0]) == [(0, 4, True), (1, 4, False)]


def test_sampling_rows_are_bounded():
    world = make_world(max_num_seqs=3, max_drafts=4, max_sample_rows=9)
    for _ in range(3):
        world.add([1, 2, 3], SamplingParams(max_tokens=20))
    world.dispatch(nothing)
    world.commit()
    world.dispatch(nothing)
    assert world.steps[0][0].num_drafts.tolist() == [2, 2, 2]


def test_max_prefill_chunk_len():
    world = make_world(max_prefill_chunk_len=7)
    world.add([1] * 15, SamplingParams(max_tokens=1))
    widths = []
    while world.scheduler.has_work:
        world.dispatch(nothing)
        widths += world.steps[0][0].widths.tolist()
        world.commit()
    assert widths == [7, 7, 1]


@pytest.mark.parametrize(("last_len", "widths"), [(11, [[9, 7], [1, 4]]), (2, [[9, 2], [1, 1]])])
def test_a_last_chunk_is_cut_where_the_step_then_fills_its_bucket(last_len, widths):
    world = make_world(step_sizes=(4, 8, 16, 64), fixed_step_cost=2)
    world.add([1] * 9, SamplingParams(max_tokens=2))
    world.add([2] * last_len, SamplingParams(max_tokens=2))
    planned = []
    for _ in range(2):
        world.dispatch(nothing)
        planned.append(world.steps[0][0].widths.tolist())
        world.commit()
    assert planned == widths


def test_no_chunk_is_cut_that_is_shorter_than_the_excess():
    world = make_world(step_sizes=(4, 16, 64), fixed_step_cost=0)
    world.add([1] * 16, SamplingParams(max_tokens=2))
    world.add([2] * 3, SamplingParams(max_tokens=2))
    world.dispatch(nothing)
    assert world.steps[0][0].widths.tolist() == [16, 3]


def test_run_ahead_bounds_the_outstanding_plans_and_counts_them_in_full():
    world = make_world(run_ahead=2, max_drafts=2)
    (choice,) = world.add([1, 2], SamplingParams(max_tokens=7))
    assert [world.dispatch(nothing) for _ in range(4)] == [True, True, True, False]
    assert [rows_of(plan)[0][1] for plan, _ in world.steps] == [2, 3, 3]
    assert choice.in_flight_len == 8
    world.commit()
    assert not world.dispatch(nothing)  # 1 emitted and 6 in flight are all it may emit
    world.commit()
    assert world.dispatch(nothing)  # two of the three in flight were rejected
    world.drain(nothing)


def test_no_second_owner_of_a_slot_and_a_full_reset_on_reuse():
    world = make_world(max_num_seqs=1)
    for _ in range(3):
        world.add([3, 2, 1], SamplingParams(max_tokens=2))
    admissions = []
    while world.scheduler.has_work:
        world.dispatch(nothing)
        admissions += [(a.slot, a.choice.choice_id) for a in world.steps[0][0].admissions]
        world.commit()
    assert admissions == [(0, 0), (0, 1), (0, 2)]


# ---- order ----


def finish_order(policy, priorities):
    world = make_world(max_num_seqs=1, policy=policy)
    for priority in priorities:
        world.add([1, 2], SamplingParams(max_tokens=2, priority=priority))
    order = []
    while world.scheduler.has_work:
        world.dispatch(nothing)
        order += [commit.choice.choice_id for commit in world.commit() if commit.finish_reason]
    return order


def test_policies():
    assert finish_order("fcfs", [2, 0, 1, 0]) == [0, 1, 2, 3]
    assert finish_order("priority", [2, 0, 1, 0]) == [1, 3, 2, 0]


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 1), ("priority", 0)])
def test_the_last_in_order_is_preempted(policy, victim):
    world = make_world(max_num_seqs=2, num_blocks=8, block_size=4, policy=policy, admission_headroom_len=0)
    world.add([1] * 15, SamplingParams(max_tokens=16, priority=1, ignore_eos=True))
    world.add([2] * 15, SamplingParams(max_tokens=16, priority=0, ignore_eos=True))
    while not world.scheduler.stats.num_preemptions:
        world.dispatch(nothing)
        world.commit()
    assert world.choices[victim].num_preemptions == 1 and world.choices[1 - victim].num_preemptions == 0
    world.drain(nothing)


def test_a_preempted_choice_comes_back_first_with_all_its_tokens():
    world = make_world(max_num_seqs=1, enable_prefix_caching=False)
    first, second = world.add([1, 2, 3]) + world.add([3, 2, 1])
    for _ in range(4):
        world.dispatch(nothing)
        world.commit()
    emitted = list(first.output_token_ids)
    world.preempt(first)
    assert first.status is Status.WAITING and first.output_token_ids.tolist() == emitted and not first.block_ids
    world.dispatch(nothing)
    (admission,) = world.steps[0][0].admissions
    assert admission.choice is first and admission.token_ids.tolist() == [1, 2, 3, *emitted]
    world.drain(nothing)
    assert second.finished


def test_drafts_preempt_nobody():
    world = make_world(max_num_seqs=2, num_blocks=8, max_drafts=4, admission_headroom_len=0)
    world.add([1] * 14, SamplingParams(max_tokens=6, ignore_eos=True))
    world.add([2] * 14, SamplingParams(max_tokens=2, ignore_eos=True))
    world.dispatch(nothing)
    world.commit()
    world.dispatch(nothing)
    world.drain(nothing)
    assert world.scheduler.stats.num_preemptions == 0


def test_preemptions_are_few():
    world = make_world(max_num_seqs=4, num_blocks=12, block_size=4, run_ahead=1)
    for prompt in range(8):
        world.add([prompt % 6] * 8, SamplingParams(max_tokens=24, ignore_eos=True), seed=prompt)
    world.drain(nothing)
    emitted = sum(len(choice.output_token_ids) for choice in world.choices)
    assert emitted == 8 * 24 and world.scheduler.stats.num_preemptions <= emitted // 8


@pytest.mark.parametrize("max_drafts", [0, 4])
def test_drafts_make_nobody_preempt(max_drafts):
    """An older choice's drafts leave the last block to a younger one that needs it for a token."""
    world = make_world(num_blocks=4, block_size=4, max_drafts=max_drafts, admission_headroom_len=0)
    world.add([1] * 4, SamplingParams(max_tokens=9))
    world.add([2] * 4, SamplingParams(max_tokens=3))
    world.drain(nothing)
    assert world.scheduler.stats.num_preemptions == 0


def test_prefix_queries_are_counted_once_an_admission():
    """Not each time that a prompt is looked up and has to wait for blocks."""
    world = make_world(num_blocks=12, block_size=4, max_model_len=48, admission_retry_steps=1)
    world.add([1] * 25, SamplingParams(max_tokens=20))
    world.add([2] * 30, SamplingParams(max_tokens=2))
    world.drain(nothing)
    assert world.scheduler.stats.num_preemptions == 0
    assert world.scheduler.stats.num_prefix_queries == 55


def test_no_progress_is_an_error_not_a_spin():
    world = make_world(num_blocks=8)
    world.add([1, 2], SamplingParams(max_tokens=4))
    held: list[int] = []
    assert world.scheduler.pool.reserve(held, 32)  # somebody else took every block
    with pytest.raises(SchedulerInvariantError, match="no progress"):
        world.scheduler.schedule()
