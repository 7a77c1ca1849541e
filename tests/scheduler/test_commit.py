"""What results change: stopping, leaving, sharing, host drafts, accounting."""

import numpy as np
import pytest
from scheduler_world import EOS, HashModel, everything, make_config, make_world, nothing

from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Choice, Logprobs, Scheduler, SchedulerInvariantError, StepResult

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
    assert (choice.output_token_ids.tolist(), choice.finish_reason, choice.stop_reason) == ([1, 2, EOS], "stop", None)
    choice = stop_world([1, 2, 3, 4, 5], accept, stop_token_ids=(3, 4))
    assert (choice.output_token_ids.tolist(), choice.finish_reason, choice.stop_reason) == ([1, 2, 3], "stop", 3)
    choice = stop_world([1, EOS, 3, 4, 5], accept, ignore_eos=True)
    assert (len(choice.output_token_ids), choice.finish_reason) == (12, "length")
    choice = stop_world([1, EOS, 3], accept, ignore_eos=True, stop_token_ids=(EOS,))
    assert (choice.output_token_ids.tolist(), choice.stop_reason) == ([1, EOS], EOS)


@pytest.mark.parametrize("accept", [everything, nothing])
def test_stop_beats_length_at_the_same_token_only(accept):
    assert stop_world([1, 2, 3, EOS], accept, max_tokens=4).finish_reason == "stop"
    choice = stop_world([1, 2, 3, 4, EOS], accept, max_tokens=4)
    assert (choice.output_token_ids.tolist(), choice.finish_reason) == ([1, 2, 3, 4], "length")


@pytest.mark.parametrize("accept", [everything, nothing])
def test_min_tokens_suppresses_stops_before_it(accept):
    choice = stop_world([1, EOS, 2, EOS, 3, EOS], accept, min_tokens=3)
    assert choice.output_token_ids.tolist() == [1, EOS, 2, EOS]


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
    choice = Choice(choice_id=1, prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=9))
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
    assert all(plan.num_drafts.tolist() == [2] for plan, _ in world.steps[1:])
    world.commit()
    world.dispatch(nothing)
    plan, _ = world.steps[-1]
    assert dict(zip(plan.choices, plan.num_drafts.tolist(), strict=True)) == {slow: 0, fast: 2}
    world.drain(nothing)


# ---- results ----


def test_impossible_results_are_refused_loudly():
    for emitted, drafted in [(0, 0), (3, 1), (4, 4), (2, 3)]:
        scheduler = Scheduler(make_config(max_drafts=2))
        scheduler.add(Choice(choice_id=0, prompt_token_ids=[1], params=SamplingParams()))
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
    choice = Choice(choice_id=0, prompt_token_ids=[1] * 6, params=SamplingParams(prompt_logprobs=1, max_tokens=4))
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
    drafted: list[int] = []

    def one_is_right(most: int) -> tuple[int, int]:
        drafted.append(min(most, 3))
        return drafted[-1], min(most, 1)

    world.drain(one_is_right)
    stats = world.scheduler.stats
    assert stats.num_emitted_tokens == 11 == len(choice.output_token_ids)
    assert stats.num_accepted_tokens == 5
    assert stats.num_drafted_tokens == sum(drafted)
    assert stats.num_finished["length"] == 1 == sum(stats.num_finished.values())
