"""The core's life: aborts at every phase, many threads, deaths that everybody hears of, hangs, shutdown."""

import gc
import threading
import time

import numpy as np
import pytest
from core_world import FakeRunner, Sink, Watchdog, expected, make_choice, make_core, run, until
from fakes import Clock

from jaxserve.engine import core as core_module
from jaxserve.engine.submission import raise_dead
from jaxserve.errors import EngineDeadError, InvalidRequestError
from jaxserve.scheduler import request as request_module
from jaxserve.scheduler.plan import StepResult

SHUT_DOWN = "^the engine was shut down; build another LLM or AsyncEngine to go on$"


class Failure(Exception):
    pass


class WrongStep(FakeRunner):
    """Returns another step's result: the scheduler's commit refuses it."""

    def fetch(self, step):
        step = super().fetch(step)
        return StepResult(step.step_id + (step.step_id == 3), step.token_ids, step.num_emitted, step.num_drafted)


def failing(what, step_id):
    def hook(kind, number):
        if (kind, number) == (what, step_id):
            raise Failure("device lost")

    return FakeRunner(hook)


DEATHS = {
    "first dispatch": (lambda: failing("dispatch", 0), Failure),
    "dispatch": (lambda: failing("dispatch", 4), Failure),
    "fetch": (lambda: failing("fetch", 3), Failure),
    "commit": (WrongStep, Exception),
}


@pytest.mark.parametrize("where", DEATHS)
def test_an_exception_in_a_step_reaches_every_caller(where):
    make_runner, kind = DEATHS[where]
    core = make_core(make_runner())
    sinks = [Sink() for _ in range(3)]
    choices = [make_choice(prompt_len=5, max_tokens=30) for _ in range(9)]  # four run, five wait
    for number, choice in enumerate(choices):
        core.submit([choice], sinks[number % 3])
    core.start()
    for number, choice in enumerate(choices):
        sinks[number % 3].wait([choice])
        end = sinks[number % 3].terminal(choice)
        assert end.finish_reason == "error" and isinstance(end.error, kind)
        got = sinks[number % 3].tokens(choice)
        assert got == expected(choice)[: len(got)]
    assert all(set(sink.events) <= {c.choice_id for c in choices[i::3]} for i, sink in enumerate(sinks))
    for call in (core.check_health, lambda: core.submit([make_choice()], sinks[0]), lambda: core.call(id)):
        with pytest.raises(EngineDeadError) as dead:
            call()
        assert dead.value.__cause__ is end.error
    core.finish(choices[0].choice_id, "abort")  # of no use, but no error
    core.shutdown()
    core.shutdown()
    assert all(sinks[i % 3].terminal(c) for i, c in enumerate(choices))


def test_collections_leave_out_what_existed_at_the_start_until_the_shutdown():
    core = make_core()
    old = {}
    old["old"] = old  # a cycle
    core.start()
    assert gc.get_freeze_count() > 10_000
    assert not any(thing is old for thing in gc.get_objects())
    core.shutdown()
    assert gc.get_freeze_count() == 0
    assert any(thing is old for thing in gc.get_objects())


def test_a_sink_that_raises_kills_the_engine_and_the_others_hear_of_it():
    def bad(event):
        raise Failure("sink")

    core = make_core()
    good = Sink()
    broken, others = make_choice(max_tokens=30), [make_choice(max_tokens=30) for _ in range(3)]
    core.submit([broken], bad)
    core.submit(others, good)
    core.start()
    good.wait(others)
    assert {good.reason(c) for c in others} == {"error"}
    with pytest.raises(EngineDeadError, match="sink"):
        core.check_health()
    core.shutdown()


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("what", ["dispatch", "fetch"])
def test_abort_at_every_phase(what, run_ahead):
    """At each dispatch and fetch of a run in turn one choice is aborted: the others never notice."""
    settings = {"run_ahead": run_ahead, "max_num_seqs": 2, "num_blocks": 32}
    phases = range(14)
    reasons = set()
    for phase in phases:
        # the victim waits first (two slots), then prefills in chunks, then decodes
        others = [make_choice(prompt_len=4, max_tokens=3), make_choice(prompt_len=9, max_tokens=4)]
        victim = make_choice(prompt_len=35, max_tokens=4)

        core = make_core(runner := FakeRunner(), **settings)

        def hook(kind, number, phase=phase, victim=victim, core=core):
            if (kind, number) == (what, phase):
                core.finish(victim.choice_id, "abort")

        runner.hook = hook
        sink = run(core, [*others, victim, last := make_choice(prompt_len=6, max_tokens=3)])
        for choice in [*others, last]:
            assert sink.tokens(choice) == expected(choice) and sink.reason(choice) == "length"
        got = sink.tokens(victim)
        assert got == expected(victim)[: len(got)]
        assert sink.reason(victim) in ("abort", "length")
        reasons.add((sink.reason(victim), bool(got)))
        core.scheduler.check_invariants()
        assert core.scheduler.pool.num_available == 32 and not core.callers
    assert reasons == {("abort", False), ("abort", True), ("length", True)}


def test_abort_before_the_first_step_and_of_unknown_and_finished_choices():
    core, sink = make_core(), Sink()
    first, second = make_choice(), make_choice()
    core.submit([first, second], sink)
    core.finish(first.choice_id, "abort")
    core.finish(10**9, "abort")
    core.start()
    sink.wait([first, second])
    for _ in range(3):
        core.finish(first.choice_id, "abort")
        core.finish(second.choice_id, "abort")
    third = make_choice()
    core.submit([third], sink)
    sink.wait([third])
    core.shutdown()
    assert (sink.reason(first), sink.tokens(first)) == ("abort", [])
    assert sink.reason(second) == "length"
    assert sink.tokens(third) == expected(third)


def test_the_reason_and_stop_reason_of_a_finish_are_handed_on():
    """What a front does when it finds a stop string."""
    choice = make_choice(max_tokens=30)

    def hook(kind, number):
        if (kind, number) == ("fetch", 3):
            core.finish(choice.choice_id, "stop", "END")

    core = make_core(FakeRunner(hook))
    end = run(core, [choice]).terminal(choice)
    assert (end.finish_reason, end.stop_reason, end.token_ids, end.error) == ("stop", "END", (), None)


def test_many_threads_submit_and_abort():
    core = make_core(num_blocks=24, max_model_len=32)
    core.start()
    results = []

    def caller(seed):
        rng = np.random.default_rng(seed)
        sink = Sink()
        choices = [make_choice(int(rng.integers(1, 12)), int(rng.integers(1, 12))) for _ in range(12)]
        for at in range(0, 12, 3):
            core.submit(choices[at : at + 3], sink)
            if rng.random() < 0.7:
                core.finish(choices[int(rng.integers(at + 1))].choice_id, "abort")
        results.append((sink, choices))

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sink, choices in results:
        sink.wait(choices)
        for choice in choices:
            got = sink.tokens(choice)
            if sink.reason(choice) == "length":
                assert got == expected(choice)
            else:
                assert sink.reason(choice) == "abort" and got == expected(choice)[: len(got)]
    until(lambda: core.stats()["num_running"] == 0)
    core.check_health()
    core.shutdown()
    assert core.scheduler.pool.num_available == 24


def test_a_wrong_choice_is_refused_at_the_door_and_the_engine_goes_on():
    core, sink = make_core(num_blocks=4), Sink()
    core.start()
    good = make_choice(prompt_len=3, max_tokens=9)
    core.submit([good], sink)
    for wrong, name in (
        (make_choice(prompt_len=64), "prompt has 64 tokens"),
        (make_choice(prompt_len=10, max_tokens=20), "KV blocks"),
        (make_choice(max_tokens=80), "max_tokens is 80"),
    ):
        with pytest.raises(InvalidRequestError, match=name):
            core.submit([make_choice(), wrong], sink)
        assert wrong.choice_id not in sink.events
    sink.wait([good])
    core.check_health()
    assert sink.tokens(good) == expected(good)
    assert set(sink.events) == {good.choice_id}, "a call is refused as a whole"
    core.shutdown()


def test_the_watchdog_ends_a_hung_step():
    hung, release = threading.Event(), threading.Event()

    def hook(kind, number):
        if (kind, number) == ("fetch", 2):
            hung.set()
            assert release.wait(20)

    core, sink = make_core(FakeRunner(hook)), Sink()
    choices = [make_choice(max_tokens=20) for _ in range(6)]
    core.submit(choices, sink)
    core.start()
    assert hung.wait(20)
    core._patience.seconds = 0.2  # not before: the first step of a busy machine may take that long
    sink.wait(choices)
    assert all("watchdog_seconds" in str(sink.terminal(c).error) for c in choices)
    with pytest.raises(EngineDeadError, match="watchdog_seconds"):
        core.check_health()
    release.set()  # the step comes back after all: nobody may hear of it a second time
    core._thread.join(20)
    assert not core._thread.is_alive()
    core.shutdown()
    for choice in choices:
        assert sink.reason(choice) == "error"


def test_the_watchdog_leaves_a_slow_but_moving_engine_and_an_idle_one_alone(monkeypatch):
    """It looks after each dispatch and fetch, which take a quarter of its patience, and then where nothing is to do."""
    monkeypatch.setattr(core_module, "time", clock := Clock())
    runner = FakeRunner(lambda kind, number: watchdog.after(0.01))
    core, sink = make_core(runner, watchdog_seconds=0.04), Sink()
    watchdog = Watchdog(core, clock)
    core.start()
    choices = [make_choice(max_tokens=20)]
    core.submit(choices, sink)
    sink.wait(choices)
    until(lambda: not core._busy)
    for _ in range(10):
        watchdog.after(0.01)
    core.check_health()
    core.shutdown()


def test_shutdown_waits_for_what_the_device_computes():
    """Steps of finished choices too: Python's own end doesn't."""
    runner = FakeRunner(lambda what, step_id: time.sleep(0.001))
    core, sink = make_core(runner, run_ahead=2, max_model_len=4000, num_blocks=1000), Sink()
    core.start()
    core.submit([make_choice(max_tokens=3900)], sink)
    until(lambda: len(runner.log) > 10)
    core.shutdown()
    fetched = {step for what, step in runner.log if what == "fetch"}
    assert fetched == {step for what, step in runner.log if what == "dispatch"}


def test_the_heartbeat_moves_while_idle_and_while_busy(monkeypatch):
    monkeypatch.setattr(core_module, "_IDLE_CHECK_SECONDS", 0.01)
    core, sink = make_core(), Sink()
    core.start()
    before = core.heartbeat
    until(lambda: core.heartbeat > before + 0.03)
    choice = make_choice()
    core.submit([choice], sink)
    sink.wait([choice])
    before = core.heartbeat
    until(lambda: core.heartbeat > before + 0.03)
    core.shutdown()
    assert not core._thread.is_alive()
    stopped = core.heartbeat
    time.sleep(0.05)
    assert core.heartbeat == stopped, "a dead engine's heart must not beat"


def test_shutdown_tells_the_unfinished_and_comes_twice():
    running, gate = threading.Event(), threading.Event()

    def hook(kind, number):
        if number == 3:
            running.set()
            assert gate.wait(20)

    core, sink = make_core(FakeRunner(hook)), Sink()
    choices = [make_choice(max_tokens=40) for _ in range(6)]
    core.submit(choices, sink)
    core.start()
    assert running.wait(20)
    stopper = threading.Thread(target=core.shutdown)
    stopper.start()
    until(lambda: core._stopping)  # or a choice may be done before
    gate.set()
    core.shutdown()
    stopper.join(20)
    assert {sink.reason(c) for c in choices} == {"error"}
    with pytest.raises(EngineDeadError, match=SHUT_DOWN):
        raise_dead(sink.terminal(choices[0]))
    for call in (core.check_health, lambda: core.submit([make_choice()], sink), lambda: core.call(id)):
        with pytest.raises(EngineDeadError, match=SHUT_DOWN) as dead:
            call()
        assert dead.value.__cause__ is None  # nothing was wrong


def test_a_call_that_waits_hears_that_the_engine_was_shut_down():
    core, raised = make_core(), []

    def work():
        with pytest.raises(EngineDeadError, match=SHUT_DOWN) as dead:
            core.call(id)
        raised.append(dead.value)

    caller = threading.Thread(target=work)
    caller.start()  # the core's thread isn't there yet to answer
    until(lambda: core._calls)
    core.shutdown()
    caller.join(20)
    assert len(raised) == 1


def test_shutdown_leaves_no_thread():
    """A thread that outlives Python frees device arrays while Python shuts down, and the process aborts."""
    core = make_core()
    before = set(threading.enumerate())
    core.start()
    threads = set(threading.enumerate()) - before
    assert {thread.name for thread in threads} == {"jaxserve-core", "jaxserve-watchdog"}
    core.shutdown()
    assert not [thread for thread in threads if thread.is_alive()]


def test_shutdown_of_a_core_that_never_ran():
    core, sink = make_core(), Sink()
    choice = make_choice()
    core.submit([choice], sink)
    core.shutdown()
    core.shutdown()
    assert sink.reason(choice) == "error"
    with pytest.raises(EngineDeadError):
        core.check_health()


def test_max_seconds_ends_waiting_and_running_choices(monkeypatch):
    clock = Clock()
    for module in (core_module, request_module):  # where choices are looked at, and where they arrive
        monkeypatch.setattr(module, "time", clock)

    def hook(kind, number):
        clock.now += 0.01

    core = make_core(FakeRunner(hook), max_num_seqs=1)
    running = make_choice(max_tokens=50, max_seconds=0.4)
    waiting = make_choice(max_tokens=5, max_seconds=0.4)
    patient = make_choice(max_tokens=5)
    sink = run(core, [running, waiting, patient])
    assert sink.reason(running) == "timeout" and 0 < len(sink.tokens(running)) < 50
    assert sink.reason(waiting) == "timeout" and sink.tokens(waiting) == []
    assert sink.tokens(patient) == expected(patient)


def test_a_call_that_fails_or_never_returns_ends_in_an_error():
    core = make_core()
    core.start()
    with pytest.raises(EngineDeadError, match="the engine failed: division"):
        core.call(lambda scheduler: 1 / 0)
    core.shutdown()
    with pytest.raises(EngineDeadError, match="the engine failed: division"):  # shutting it down doesn't hide that
        core.check_health()


def test_call_runs_between_steps_and_stats_count():
    core, sink = make_core(), Sink()
    core.start()
    thread = core.call(lambda scheduler: (threading.current_thread().name, scheduler.config.max_num_seqs))
    choice = make_choice(prompt_len=5, max_tokens=6)
    core.submit([choice], sink)
    sink.wait([choice])
    until(lambda: core.stats()["num_running"] == 0)
    stats = core.stats()
    assert thread == ("jaxserve-core", 4)
    assert (stats["num_emitted_tokens"], stats["num_finished"]["length"], stats["num_waiting"]) == (6, 1, 0)
    core.shutdown()


def test_a_caller_that_waits_for_the_end_hears_of_the_first_token_and_of_the_end():
    choices = [make_choice(max_tokens=9), make_choice(max_tokens=1), make_choice(max_tokens=9, stop=["x"])]
    core, sink = make_core(), Sink()
    core.submit(choices, sink, streaming=False)
    core.start()
    sink.wait(choices)
    core.shutdown()
    assert [len(event.token_ids) for event in sink.events[choices[0].choice_id]] == [1, 8]
    assert [len(event.token_ids) for event in sink.events[choices[1].choice_id]] == [1]
    assert [len(event.token_ids) for event in sink.events[choices[2].choice_id]] == [1] * 9  # looks for its stop string
    assert all(sink.tokens(choice) == expected(choice) for choice in choices)


@pytest.mark.parametrize("num_blocks", [32, 6], ids=["roomy", "preempted"])
def test_the_end_brings_all_tokens_that_were_not_told(num_blocks):
    """Also of choices that are aborted, and of those that were preempted on their way."""
    choices = [make_choice(prompt_len=4, max_tokens=14) for _ in range(3)]
    runner = FakeRunner()
    core, sink = make_core(runner, num_blocks=num_blocks, max_model_len=24, admission_headroom_len=0), Sink()
    aborted = choices[0]

    def abort(what, step_id):
        if what == "dispatch" and len(aborted.output_token_ids) >= 5:
            core.finish(aborted.choice_id, "abort")

    runner.hook = abort
    core.submit(choices, sink, streaming=False)
    core.start()
    sink.wait(choices)
    assert (core.stats()["num_preemptions"] > 0) == (num_blocks == 6)
    core.shutdown()
    for choice in choices:
        told = sink.tokens(choice)
        assert told == expected(choice)[: len(told)]
        assert len(sink.events[choice.choice_id]) <= 2
        assert sink.reason(choice) == ("abort" if choice is aborted else "length")
        assert len(told) >= 5
