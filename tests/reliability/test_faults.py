"""Faults under load, one by one: 200 requests in flight, and every caller hears of it at once; nothing hangs or leaks.

Also rows 46 and 47 of the catalogue: an engine that dies silently, and one that is taken for dead under long prefills.
"""

import asyncio
import ctypes
import dataclasses
import threading
import time

import numpy as np
import pytest
from callers import KINDS, LONG, NUM_CHOICES, Callers, Gate, crowded_core, hold
from core_world import FakeRunner, Sink, Watchdog, make_choice, make_core, until
from fakes import Clock
from jax.errors import JaxRuntimeError
from serving import GREEDY, generate, idle, ids, serve

from jaxserve import LLM, AsyncEngine, EngineDeadError, SamplingParams
from jaxserve.engine import async_engine, submission
from jaxserve.engine import core as core_module
from jaxserve.engine.core import EngineCore
from jaxserve.engine.submission import Submission
from jaxserve.scheduler.invariants import SchedulerInvariantError

# a thread's death may be the fault
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
AT = 6  # the step at which the fault strikes
ENDLESS = LONG.with_changes(max_tokens=480)  # for those who leave: many times as long as that takes them


@pytest.fixture
def nobody_asks(monkeypatch):
    """Callers that wait don't look whether the engine still lives: who isn't told waits for longer than any test."""
    for module in (submission, async_engine):
        monkeypatch.setattr(module, "HEALTH_SECONDS", 1000.0)


class Failure(Exception):
    pass


def full() -> JaxRuntimeError:
    return JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")


def raising(stage, error):
    """Arms a core: the stage raises at step AT."""

    def arm(core, gate):
        def hook(what, step_id):
            if (what, step_id) == (stage, AT):
                gate.wait()
                raise error()

        core.runner.hook = hook

    return arm


def in_schedule(core, gate):
    correct = core.scheduler.schedule

    def schedule():
        if core.scheduler.stats.num_steps == AT:
            gate.wait()
            raise Failure("schedule")
        return correct()

    core.scheduler.schedule = schedule


def broken_result(**fields):
    """A step whose result the scheduler can't believe."""

    def arm(core, gate):
        correct = core.runner.fetch

        def fetch(step):
            result = correct(step)
            if result.step_id == AT:
                gate.wait()
                result = dataclasses.replace(result, **{k: change(getattr(result, k)) for k, change in fields.items()})
            return result

        core.runner.fetch = fetch

    return arm


def in_a_sink(core, gate):
    """A caller's sink raises, which it promised not to."""
    count = iter(range(10**6))

    def sink(event):
        if event.finish_reason is None and next(count) == 4:
            gate.wait()
            raise Failure("sink")

    choice = make_choice(prompt_len=3, max_tokens=40)
    choice.choice_id = next(core.choice_ids)
    core.submit([choice], sink)


def drafting(core, gate, token_ids):
    """A drafter on the core's thread proposes garbage for the choice that decodes first."""

    def hook(what, step_id):
        if (what, step_id) == ("fetch", AT):
            gate.wait()
            core.scheduler.set_drafts(core.scheduler.state.decoding[0], token_ids)

    core.runner.hook = hook


def a_drafter_that_raises(core, gate):
    def draft(scheduler):
        gate.wait()
        raise Failure("drafter")

    def hook(what, step_id):
        if (what, step_id) == ("dispatch", AT):
            threading.Thread(target=lambda: pytest.raises(EngineDeadError, core.call, draft), daemon=True).start()

    core.runner.hook = hook


def killed_from_outside(core, gate):
    """SystemExit out of nowhere, as an embedding program may send it."""

    def hook(what, step_id):
        if (what, step_id) == ("dispatch", AT):
            gate.wait()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(core._thread.ident), ctypes.py_object(SystemExit))

    core.runner.hook = hook


def vanished(core, gate):
    """The thread ends without a word: not even the handler of last resort has run."""

    def hook(what, step_id):
        if (what, step_id) == ("dispatch", AT):
            gate.wait()
            core._die = lambda error: setattr(core, "_die", EngineCore._die.__get__(core))  # this once
            raise Failure("the stack is gone")

    core.runner.hook = hook


FAULTS = {  # name: (how, what the error says)
    "schedule": (in_schedule, "schedule"),
    "dispatch": (raising("dispatch", lambda: Failure("dispatch")), "dispatch"),
    "fetch": (raising("fetch", lambda: Failure("fetch")), "fetch"),
    "commit: another step's result": (broken_result(step_id=lambda step_id: 99), "step 99"),
    "commit: too many tokens": (broken_result(num_emitted=lambda n: n + 1), "2 tokens from 0 drafts"),
    "commit: no token": (broken_result(num_emitted=lambda n: n * 0), "0 tokens from 0 drafts"),
    "commit: more drafts than asked for": (broken_result(num_drafted=lambda n: n + 9), "9 drafts of at most 0"),
    "commit: a row is missing": (broken_result(num_emitted=lambda n: n[:-1]), "broadcast"),
    "commit: an id that doesn't exist": (broken_result(token_ids=lambda ids: ids - 100), "emitted token id -"),
    "sink": (in_a_sink, "sink"),
    "no memory for a step": (raising("dispatch", full), "RESOURCE_EXHAUSTED"),
    "no memory, told late": (raising("fetch", full), "RESOURCE_EXHAUSTED"),
    "draft ids past the vocabulary": (lambda core, gate: drafting(core, gate, [97]), "draft token id is 97"),
    "negative draft ids": (lambda core, gate: drafting(core, gate, [3, -1]), "draft token id is -1"),
    "drafter": (a_drafter_that_raises, "drafter"),
    "killed thread": (killed_from_outside, ""),
    "vanished thread": (vanished, "the core's thread is gone"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("nobody_asks")
def test_row_46_every_caller_hears_of_a_death_at_once(fault):
    arm, says = FAULTS[fault]
    drafts = {"drafting": "host", "max_drafts": 4, "vocab_size": 97} if "draft ids" in fault else {}
    core, gate = crowded_core(**drafts), Gate()
    crowd = hold(core)
    arm(core, gate)
    callers = Callers(core)
    with callers.llm as llm:
        callers.start()
        until(lambda: len(core.callers) >= NUM_CHOICES)
        crowd.go.set()
        assert gate.reached.wait(20)
        callers.start_call()
        until(lambda: core._calls)
        gate.go.set()
        callers.join()
        assert [len(callers.ended[kind]) for kind in KINDS] == [3, 10, 70, 1]
        for outcome in callers.outcomes():
            assert isinstance(outcome, EngineDeadError) and says in str(outcome)
            assert outcome.__cause__ is core._error
        assert_dead(llm, says)
        assert not core.callers and not core._calls
    until(lambda: not core._thread.is_alive())


def assert_dead(llm, says):
    """Whoever comes now is refused, by every door."""

    async def from_asyncio():
        engine = AsyncEngine.from_engine(llm.engine)
        engine._finalizer.detach()
        return [output async for output in engine.generate([1], LONG)]

    for call in (
        llm.engine.core.check_health,
        lambda: llm.generate([[1]], LONG, use_tqdm=False),
        lambda: llm.stream([1], LONG),
        lambda: asyncio.run(from_asyncio()),
        llm.reset_prefix_cache,
    ):
        with pytest.raises(EngineDeadError) as dead:
            call()
        assert says in str(dead.value)


def test_row_46_is_seen_where_an_engine_dies_silently(monkeypatch):
    """The detector fires: a core that tells nobody leaves callers behind."""
    monkeypatch.setattr(EngineCore, "_die", lambda self, error: None)
    core, gate = crowded_core(), Gate()
    raising("dispatch", lambda: Failure("dispatch"))(core, gate)
    callers = Callers(core)
    callers.start()
    assert gate.reached.wait(20)
    gate.go.set()
    with pytest.raises(AssertionError, match="somebody still waits"):
        callers.join(seconds=1.5)
    monkeypatch.undo()
    core._die(Failure("told after all"))
    callers.join()


@pytest.mark.parametrize("stage", ["dispatch", "fetch"])
@pytest.mark.usefixtures("nobody_asks")
def test_row_46_a_hung_step_is_noticed_and_closing_does_not_wait_for_it(stage):
    hang = Gate()

    def hook(what, step_id):
        if (what, step_id) == (stage, AT):
            hang.wait()

    core = crowded_core(FakeRunner(hook))
    callers = Callers(core)
    with callers.llm as llm:
        callers.start()
        assert hang.reached.wait(20)
        until(lambda: len(core.callers) >= NUM_CHOICES)
        callers.start_call()
        until(lambda: core._calls)
        core._patience.seconds = 0.2
        callers.join()
        assert all(isinstance(outcome, EngineDeadError) for outcome in callers.outcomes())
        assert_dead(llm, "watchdog_seconds")
        core._patience.seconds = 1000.0  # what closing would wait for a step that still may come
    assert core._thread.is_alive(), "closing waited for the step"
    hang.go.set()
    until(lambda: not core._thread.is_alive())


def test_row_47_a_long_prefill_is_not_taken_for_a_hang(monkeypatch):
    """Nothing comes out for several times the watchdog's patience; but steps return, and that's what counts."""
    monkeypatch.setattr(core_module, "time", clock := Clock())
    core = make_core(
        FakeRunner(lambda what, step_id: watchdog.after(0.01)), watchdog_seconds=0.04, max_model_len=4000,
        max_num_batched_tokens=50, num_blocks=1000,
    )  # fmt: skip
    watchdog = Watchdog(core, clock)
    sink, choice = Sink(), make_choice(prompt_len=1000, max_tokens=1)
    core.start()
    began = clock.now
    core.submit([choice], sink)
    sink.wait([choice])
    assert clock.now - began > 9 * 0.04
    assert sink.reason(choice) == "length"
    core.check_health()
    core.shutdown()


def test_row_47_is_seen_where_only_tokens_are_a_sign_of_life(monkeypatch):
    """sglang's health check: a token within so many seconds, or a restart."""
    frozen = property(lambda self: self.__dict__["born"], lambda self, value: self.__dict__.setdefault("born", value))
    monkeypatch.setattr(EngineCore, "heartbeat", frozen, raising=False)
    runner = FakeRunner(lambda what, step_id: time.sleep(0.02))
    core, sink = make_core(runner, watchdog_seconds=0.4, max_model_len=4000, num_blocks=1000), Sink()
    choice = make_choice(prompt_len=5, max_tokens=3900)  # more than two minutes
    core.submit([choice], sink)
    core.start()
    sink.wait([choice])
    assert sink.reason(choice) == "error"
    core.shutdown()
    until(lambda: not core._thread.is_alive())


# ---- where the engine goes on ----


def test_callers_that_leave_take_their_requests_with_them():
    """Aborts, closed streams, cancelled tasks, Ctrl-C, wall clocks, 200 at once: the engine goes on without a leak."""
    core = crowded_core(FakeRunner(lambda what, step_id: time.sleep(0.0005)), max_model_len=512, num_blocks=1000)
    callers = Callers(core, max_model_len=512)
    with callers.llm as llm:
        callers.start(SamplingParams(max_tokens=12, ignore_eos=True))
        for turn in range(8):
            stream = llm.stream([1, 2, turn], ENDLESS)
            next(stream)
            stream.close()
            with pytest.raises(KeyboardInterrupt):
                interrupted(llm)
        late = llm.generate([[5]] * 5, LONG.with_changes(max_seconds=0.02), use_tqdm=False)
        assert {output.outputs[0].finish_reason for output in late} <= {"timeout", "length"}
        asyncio.run(cancelled(llm))
        callers.join(40)
        assert not any(isinstance(outcome, BaseException) for outcome in callers.outcomes())
        until(lambda: not core.stats()["num_running"] and not core.stats()["num_waiting"])
        until(lambda: not core.callers)
        core.check_health()
        assert core.call(lambda scheduler: scheduler.check_invariants()) is None
        assert core.call(lambda scheduler: scheduler.pool.num_available) == 1000
        assert core.stats()["num_finished"]["abort"] > 30


def interrupted(llm):
    requests = llm._admit(llm._check([*map(_prompt, range(5))], ENDLESS, None))
    with Submission(llm.engine.core, llm._codec, requests) as submission:
        submission.submit()
        next(submission.updates())
        raise KeyboardInterrupt


def _prompt(number):
    from jaxserve.engine.prompts import ParsedPrompt

    return ParsedPrompt(None, (number + 1, 3))


async def cancelled(llm):
    engine = AsyncEngine.from_engine(llm.engine)
    engine._finalizer.detach()

    async def one():
        return [output async for output in engine.generate([9, 9], LONG)]

    tasks = [asyncio.create_task(one()) for _ in range(30)]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_two_fronts_of_one_engine_do_not_take_each_others_numbers():
    """Each counted its choices from 0; a number in use killed the engine."""
    core, sink = make_core(), Sink()
    callers = Callers(core)
    with callers.llm as llm:
        first, second = llm._builder, AsyncEngine.from_engine(llm.engine)
        second._finalizer.detach()
        admitted = [b.admit(b.check(_prompt(i), LONG)) for i, b in enumerate([first, second._builder] * 3)]
        assert len({choice.choice_id for request in admitted for choice in request.choices}) == 6
        twice = make_choice()
        core.submit([twice], sink)
        sink.wait([twice])
        for wrong in ([twice], [again := make_choice(), again]):
            with pytest.raises(ValueError, match="choice_id"):
                core.submit(wrong, sink)
        core.check_health()


# ---- a real device ----


@pytest.mark.parametrize("stage", ["dispatch", "fetch"])
def test_no_memory_on_a_real_engine(engine, cases, monkeypatch, stage):
    """In mid-flight the device has no memory left: everybody is told, and the device serves the next engine."""
    with serve(engine, run_ahead=2) as llm:
        core = llm.engine.core

        def fail(plan, result=None):
            if plan.step_id == AT:
                raise full()
            return result

        setattr(core.runner, {"dispatch": "before", "fetch": "fetched"}[stage], fail)
        stream = llm.stream({"prompt_token_ids": cases[0].prompt}, GREEDY)
        with pytest.raises(EngineDeadError, match="RESOURCE_EXHAUSTED") as dead:
            generate(llm, [case.prompt for case in cases] * 20)
        assert isinstance(dead.value.__cause__, JaxRuntimeError)
        with pytest.raises(EngineDeadError, match="RESOURCE_EXHAUSTED"):
            list(stream)
    with serve(engine) as llm:
        assert ids(llm, cases) == [case.answer for case in cases]
        idle(llm)


def test_a_result_of_garbage_is_not_passed_on(engine, cases):
    """A device that answers with ids that don't exist: dead, rather than wrong."""

    def spoil(plan, result):
        token_ids = np.array(result.token_ids)
        token_ids[0, 0] = -7 if plan.step_id == AT else token_ids[0, 0]
        return dataclasses.replace(result, token_ids=token_ids)

    with serve(engine) as llm:
        llm.engine.core.runner.fetched = spoil
        with pytest.raises(EngineDeadError, match="-7") as dead:
            ids(llm, cases)
        assert isinstance(dead.value.__cause__, SchedulerInvariantError)


def test_leaving_the_with_block_by_an_error_cleans_up():
    def hook(what, step_id):
        if step_id == AT:  # nobody is done before the error
            until(lambda: core._stopping)

    core = crowded_core(FakeRunner(hook))
    callers = Callers(core)
    with pytest.raises(Failure), callers.llm:
        callers.start()
        until(lambda: len(core.callers) > 100)
        raise Failure("the caller's own")
    callers.join()
    assert {type(outcome) for outcome in callers.outcomes()} == {EngineDeadError}
    assert {str(outcome).partition(";")[0] for outcome in callers.outcomes()} == {"the engine was shut down"}
    assert not core._thread.is_alive()
    with pytest.raises(EngineDeadError, match="shut down"):
        LLM.generate(callers.llm, [[1]], LONG, use_tqdm=False)
