"""Run-ahead: step n+1 is dispatched before step n is fetched, in decode and across prefill -> decode."""

import pytest
from core_world import FakeRunner, Sink, expected, make_choice, make_core, run

from jaxserve.engine.core import num_due


def dispatched_before(log, step_id):
    """Number of steps dispatched when ``step_id`` was fetched."""
    before = log[: log.index(("fetch", step_id))]
    return sum(what == "dispatch" for what, _ in before)


def test_how_many_steps_are_due():
    """Sent steps stay in flight up to run_ahead, or a whole burst; without new ones the oldest is awaited."""
    due = {(flight, new): num_due(flight, new, 2) for flight in range(6) for new in (0, 1, 4) if flight >= new}
    idle = {(0, 0): 0} | {(flight, 0): 1 for flight in range(1, 6)}
    assert due == idle | {(1, 1): 0, (2, 1): 0, (3, 1): 1, (4, 1): 2, (5, 1): 3} | {(4, 4): 0, (5, 4): 1}


@pytest.mark.parametrize("run_ahead", [0, 1, 2, 3])
def test_steady_decode_keeps_run_ahead_steps_in_flight(run_ahead):
    runner = FakeRunner()
    choice = make_choice(prompt_len=3, max_tokens=12)
    sink = run(make_core(runner, run_ahead=run_ahead), [choice])
    assert sink.tokens(choice) == expected(choice)
    num_steps = len(runner.plans)
    assert num_steps == 12  # the prompt in one step, which samples; then 11 decodes
    for step_id in range(num_steps):
        assert dispatched_before(runner.log, step_id) == min(num_steps, step_id + 1 + run_ahead)


@pytest.mark.parametrize("run_ahead", [0, 1, 2, 3])
def test_decode_is_dispatched_before_the_last_prefill_chunk_is_fetched(run_ahead):
    runner = FakeRunner()
    choice = make_choice(prompt_len=41, max_tokens=8)
    sink = run(make_core(runner, run_ahead=run_ahead), [choice])
    assert sink.tokens(choice) == expected(choice)
    assert [plan.num_tokens for plan in runner.plans[:4]] == [16, 16, 9, 1]
    last_chunk, first_decode = 2, 3
    order = runner.log.index(("dispatch", first_decode)) < runner.log.index(("fetch", last_chunk))
    assert order == (run_ahead > 0)
    for step_id in range(len(runner.plans)):
        assert dispatched_before(runner.log, step_id) == min(len(runner.plans), step_id + 1 + run_ahead)


@pytest.mark.parametrize("run_ahead", [0, 1, 2, 3])
def test_a_prefill_joins_running_decodes_without_a_gap(run_ahead):
    """An arrival in mid-decode: mixed steps run ahead like all others, and nobody's tokens change."""
    late = make_choice(prompt_len=30, max_tokens=5)

    def arrive(what, step_id):
        if (what, step_id) == ("fetch", 4):
            core.submit([late], sink)

    runner = FakeRunner(arrive)
    core = make_core(runner, run_ahead=run_ahead)
    early = [make_choice(prompt_len=4, max_tokens=20), make_choice(prompt_len=7, max_tokens=20)]
    sink = Sink()
    core.submit(early, sink)
    core.start()
    sink.wait([*early, late])
    core.shutdown()
    for choice in [*early, late]:
        assert sink.tokens(choice) == expected(choice)
        assert sink.reason(choice) == "length"
    mixed = [plan.step_id for plan in runner.plans if plan.num_tokens > len(plan.slots) and plan.step_id]
    assert mixed, "the late prompt never shared a step with decodes"
    for step_id in [0, 1, 2, 3, *mixed]:
        assert dispatched_before(runner.log, step_id) == step_id + 1 + run_ahead


def test_steps_are_fetched_in_the_order_of_dispatch_and_each_once():
    runner = FakeRunner()
    run(make_core(runner), [make_choice(prompt_len=3 * i + 1, max_tokens=9) for i in range(7)])
    for what in ("dispatch", "fetch"):
        assert [step for kind, step in runner.log if kind == what] == list(range(len(runner.plans)))


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_preemption_under_run_ahead_changes_no_token(run_ahead):
    """Ten blocks for four choices of up to eight: some are thrown out and computed again."""
    runner = FakeRunner()
    core = make_core(runner, run_ahead=run_ahead, num_blocks=10, max_model_len=32, admission_headroom_len=0)
    choices = [make_choice(prompt_len=6, max_tokens=20) for _ in range(4)]
    sink = run(core, choices)
    assert core.stats()["num_preemptions"] > 0
    for choice in choices:
        assert sink.tokens(choice) == expected(choice)
