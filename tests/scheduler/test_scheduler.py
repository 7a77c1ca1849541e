"""What a caller of the scheduler relies on, case by case."""

import subprocess
import sys

import numpy as np
import pytest
from scheduler_world import EOS, HashModel, World

from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Choice, Logprobs, Scheduler, SchedulerConfig, SchedulerInvariantError, Status, StepResult


def make_config(**changes):
    settings = {
        "max_num_seqs": 4,
        "max_model_len": 32,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "adaptive_drafts": None,
        "run_ahead": 0,
    }
    return SchedulerConfig(**{**settings, **changes})


def make_world(model=None, **changes):
    return World(make_config(**changes), model or HashModel(eos_every=0))


def everything(most):
    return most, most


def nothing(most):
    return most, 0


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
    assert first.status is Status.WAITING and first.output_token_ids == emitted and not first.block_ids
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


# ---- stopping ----


def stop_world(tokens, accept=everything, **settings):
    """One choice whose answer is ``tokens``, verified four drafts at a time."""

    class Scripted(HashModel):
        def next_token(self, fingerprint, seed, index, output_index):
            return tokens[output_index % len(tokens)]

    world = make_world(Scripted(), max_drafts=4)
    (choice,) = world.add([1, 2], SamplingParams(**{"max_tokens": 12, **settings}))
    world.drain(accept)
    return choice


@pytest.mark.parametrize("accept", [everything, nothing])
def test_stops_inside_a_verified_run(accept):
    choice = stop_world([1, 2, EOS, 4, 5], accept)
    assert (choice.output_token_ids, choice.finish_reason, choice.stop_reason) == ([1, 2, EOS], "stop", None)
    choice = stop_world([1, 2, 3, 4, 5], accept, stop_token_ids=(3, 4))
    assert (choice.output_token_ids, choice.finish_reason, choice.stop_reason) == ([1, 2, 3], "stop", 3)
    choice = stop_world([1, EOS, 3, 4, 5], accept, ignore_eos=True)
    assert (len(choice.output_token_ids), choice.finish_reason) == (12, "length")
    choice = stop_world([1, EOS, 3], accept, ignore_eos=True, stop_token_ids=(EOS,))
    assert (choice.output_token_ids, choice.stop_reason) == ([1, EOS], EOS)


@pytest.mark.parametrize("accept", [everything, nothing])
def test_stop_beats_length_at_the_same_token_only(accept):
    assert stop_world([1, 2, 3, EOS], accept, max_tokens=4).finish_reason == "stop"
    choice = stop_world([1, 2, 3, 4, EOS], accept, max_tokens=4)
    assert (choice.output_token_ids, choice.finish_reason) == ([1, 2, 3, 4], "length")


@pytest.mark.parametrize("accept", [everything, nothing])
def test_min_tokens_suppresses_stops_before_it(accept):
    choice = stop_world([1, EOS, 2, EOS, 3, EOS], accept, min_tokens=3)
    assert choice.output_token_ids == [1, EOS, 2, EOS]


# ---- leaving ----


@pytest.mark.parametrize("in_flight", [0, 1, 3])
def test_abort_with_steps_in_flight(in_flight):
    world = make_world(run_ahead=3, max_drafts=2)
    victim, other = world.add([1, 2, 3, 4, 5]) + world.add([1, 2, 3, 4, 5])
    for _ in range(in_flight):
        world.dispatch(everything)
    world.abort(victim)
    (third,) = world.add([5, 4, 3])
    world.drain(everything)
    assert victim.finish_reason == "abort" and other.finish_reason == third.finish_reason == "length"


def test_finish_reasons_are_checked():
    world = make_world()
    (choice,) = world.add([1, 2])
    with pytest.raises(ValueError, match="bored"):
        world.scheduler.finish(choice, "bored")


def test_timeouts():
    world = make_world(max_seconds=10.0)
    quick, slow = world.add([1], SamplingParams(max_seconds=2.0)) + world.add([1])
    world.dispatch(nothing)
    assert world.scheduler.expire(1.9) == []
    (commit,) = world.scheduler.expire(2.0)
    assert commit.choice is quick and quick.finish_reason == "timeout" and commit.row == -1
    (commit,) = world.scheduler.expire(60.0)
    assert commit.choice is slow
    world.drain(nothing)


# ---- sharing ----


def test_the_second_request_hits_the_first_ones_blocks():
    world = make_world()
    prompt = [1, 2, 3, 4, 5, 0, 1, 2, 3]
    world.add(prompt, SamplingParams(max_tokens=2))
    world.drain(nothing)
    (second,) = world.add(prompt, SamplingParams(max_tokens=2))
    (salted,) = world.add(prompt, SamplingParams(max_tokens=2), salt="tenant")
    world.drain(nothing)
    assert second.num_cached_tokens == 8 and salted.num_cached_tokens == 0


def test_prompt_logprobs_skip_the_lookup_for_the_first_choice_only():
    world = make_world()
    prompt = [1, 2, 3, 4, 5, 0, 1, 2, 3]
    world.add(prompt, SamplingParams(max_tokens=2))
    world.drain(nothing)
    first, second = world.add(prompt, SamplingParams(max_tokens=2, prompt_logprobs=1, n=2))
    world.drain(nothing)
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 8


@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_a_request_share_its_prompt(caching):
    world = make_world(enable_prefix_caching=caching, max_num_batched_tokens=5)
    prompt = [1, 2, 3, 4, 5, 0, 1, 2, 3]
    choices = world.add(prompt, SamplingParams(max_tokens=3, n=3))
    others = world.add(prompt, SamplingParams(max_tokens=3))
    world.drain(nothing)
    assert [choice.num_cached_tokens for choice in choices] == [0, 8, 8]
    assert [choice.num_cached_tokens > 0 for choice in others] == [caching]


@pytest.mark.parametrize("leave", ["abort", "preempt"])
def test_siblings_go_on_when_their_leader_leaves(leave):
    world = make_world(max_num_batched_tokens=4)
    choices = world.add([1, 2, 3, 4, 5, 0, 1, 2, 3], SamplingParams(max_tokens=3, n=3))
    world.dispatch(nothing)
    world.dispatch(nothing)
    assert world.scheduler.num_waiting == 2 and world.scheduler.num_running == 1
    getattr(world, leave)(choices[0])
    world.drain(nothing)
    assert all(choice.finish_reason == "length" for choice in choices[1:])


def test_evicting_everything_changes_no_answer():
    world = make_world(num_blocks=8, max_num_seqs=2)
    for prompt in ([1] * 9, [2] * 9, [1] * 9):
        world.add(prompt, SamplingParams(max_tokens=4))
        world.dispatch(nothing)
        world.evict()
        world.drain(nothing)
    assert world.scheduler.pool.num_available == 8


# ---- host drafts, masks ----


def test_host_drafts_live_for_one_schedule():
    scheduler = Scheduler(make_config(max_drafts=2, drafting="host", run_ahead=2, vocab_size=100))
    choice = Choice(choice_id=1, request_id="a", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=9))
    scheduler.add(choice)
    assert not scheduler.set_drafts(choice, [5])  # not running
    plan = scheduler.schedule()
    assert plan.draft_ids.shape == (1, 2) and scheduler.schedule() is None  # host-synchronous
    scheduler.commit(plan, StepResult(plan.step_id, np.array([[7, 0, 0]]), np.array([1]), np.array([0])))
    for bad in ([-1], [100], [3, 2**40]):
        with pytest.raises(ValueError, match="draft"):
            scheduler.set_drafts(choice, bad)
    assert scheduler.set_drafts(choice, [5, 6, 7, 8])  # too many: the width rule cuts them
    plan = scheduler.schedule()
    assert plan.draft_ids.tolist() == [[5, 6]] and plan.num_drafts.tolist() == [2]
    scheduler.commit(plan, StepResult(plan.step_id, np.array([[5, 9, 0]]), np.array([2]), np.array([2])))
    assert scheduler.schedule().num_drafts.tolist() == [0]
    scheduler.check_invariants()


def test_device_drafting_takes_no_host_drafts():
    world = make_world(max_drafts=2)
    (choice,) = world.add([1])
    with pytest.raises(ValueError, match="device"):
        world.scheduler.set_drafts(choice, [1])


def test_host_synchronous_choices_wait_for_their_tokens():
    world = make_world(run_ahead=2, max_drafts=2)
    slow, fast = world.add([1, 2], host_synchronous=True) + world.add([1, 2])
    for _ in range(3):
        world.dispatch(nothing)
    assert [len(plan.choices) for plan, _ in world.steps] == [2, 1, 1]
    assert all(choice is fast for plan, _ in world.steps[1:] for choice in plan.choices)
    world.drain(nothing)
    assert slow.num_drafted == 0 < fast.num_drafted


# ---- results ----


def test_impossible_results_are_refused_loudly():
    for emitted, drafted in [(0, 0), (3, 1), (4, 4), (2, 3)]:
        scheduler = Scheduler(make_config(max_drafts=2))
        scheduler.add(Choice(choice_id=0, request_id="a", prompt_token_ids=[1], params=SamplingParams()))
        plan = scheduler.schedule()
        scheduler.commit(plan, StepResult(plan.step_id, np.array([[1, 0, 0]]), np.array([1]), np.array([0])))
        plan = scheduler.schedule()
        with pytest.raises(SchedulerInvariantError, match="row 0"):
            scheduler.commit(
                plan, StepResult(plan.step_id, np.array([[1, 2, 3, 4]]), np.array([emitted]), np.array([drafted]))
            )


def test_results_come_in_the_order_of_the_plans():
    world = make_world(run_ahead=1)
    world.add([1, 2])
    world.dispatch(nothing)
    world.dispatch(nothing)
    plan, result = world.steps[1]
    with pytest.raises(SchedulerInvariantError, match="oldest"):
        world.scheduler.commit(plan, result)


def test_prompt_logprobs_are_handed_out_once():
    def logprobs(count):
        ids = np.arange(count)
        return Logprobs(ids.astype(np.float32), ids, ids[:, None], ids[:, None].astype(np.float32))

    scheduler = Scheduler(make_config(max_prefill_chunk_len=3))
    choice = Choice(
        choice_id=0, request_id="a", prompt_token_ids=[1] * 6, params=SamplingParams(prompt_logprobs=1, max_tokens=4)
    )
    scheduler.add(choice)

    def step(first, count, samples):
        plan = scheduler.schedule()
        emitted = np.array([int(samples)])
        result = StepResult(
            plan.step_id, np.array([[1]]), emitted, np.array([0]), prompt_logprobs={0: (first, logprobs(count))}
        )
        return [commit.prompt_logprobs for commit in scheduler.commit(plan, result)]

    ((first, values),) = step(1, 3, False)
    assert first == 1 and len(values.token_rank) == 3
    scheduler.state.preempt(choice)
    assert step(1, 3, False) == [None]
    ((first, values),) = step(3, 3, True)
    assert first == 4 and values.token_rank.tolist() == [1, 2]


def test_accounting():
    world = make_world(max_drafts=4)
    (choice,) = world.add([1, 2], SamplingParams(max_tokens=11, ignore_eos=True))
    world.drain(lambda most: (min(most, 3), min(most, 1)))
    stats = world.scheduler.stats
    assert stats.num_emitted_tokens == 11 == len(choice.output_token_ids)
    assert choice.num_accepted == stats.num_accepted_tokens == 5
    assert choice.num_drafted == stats.num_drafted_tokens
    assert stats.num_finished["length"] == 1 == sum(stats.num_finished.values())


def test_no_progress_is_an_error_not_a_spin():
    world = make_world(num_blocks=8)
    world.add([1, 2], SamplingParams(max_tokens=4))
    held: list[int] = []
    assert world.scheduler.pool.reserve(held, 32)  # somebody else took every block
    with pytest.raises(SchedulerInvariantError, match="no progress"):
        world.scheduler.schedule()
