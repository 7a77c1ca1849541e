"""Ctrl-C, at whatever moment it comes: what was asked for is aborted, and the engine goes on."""

import itertools
import signal
import sys
import threading

import pytest
from core_world import Sink, make_choice, make_core, until, when_waiting
from fakes import FakeCore, fake_engine

from jaxserve import LLM


def test_ctrl_c_leaves_the_core_unlocked():
    """Wherever a function begins, which is where Python looks for signals. The loop needs the lock in each turn."""
    num_interrupted = 0
    for number in itertools.count(1):
        core, left = make_core(), iter(range(number))

        def interrupt(frame, event, argument, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        before = sys.gettrace()
        try:
            sys.settrace(interrupt)
            core.submit([choice := make_choice()], Sink())
            core.finish(choice.choice_id, "abort")
            core.check_health()
            break
        except KeyboardInterrupt:
            num_interrupted += 1
        finally:
            sys.settrace(before)
        other = threading.Thread(target=core.check_health, daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive()
    assert num_interrupted > 10


@pytest.mark.parametrize("streaming", [False, True])
def test_ctrl_c_aborts_the_requests_and_leaves_the_engine_usable(streaming):
    core = FakeCore(lambda choice: [], step_seconds=0.001, pauses=True)
    with LLM.from_engine(fake_engine(core)) as llm:
        with pytest.raises(KeyboardInterrupt):
            ctrl_c = when_waiting(lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
            if streaming:
                list(llm.stream("x"))
            else:
                llm.generate(["x", "y"], use_tqdm=False)
        ctrl_c.join()
        until(lambda: core.num_running == 0)
        assert [reason for reason, _, _ in core.ended.values()] == ["abort"] * (1 if streaming else 2)
        core.pauses = False
        assert llm.generate("y", use_tqdm=False)[0].finished


@pytest.mark.parametrize("streaming", [False, True])
def test_ctrl_c_just_after_the_core_has_a_request_aborts_it(streaming):
    core = FakeCore(lambda choice: [], step_seconds=0.001, pauses=True)
    submit = core.submit

    def interrupted(*args, **kwargs):
        submit(*args, **kwargs)
        raise KeyboardInterrupt

    core.submit = interrupted
    with LLM.from_engine(fake_engine(core)) as llm:
        with pytest.raises(KeyboardInterrupt) as held:  # as an interactive Python holds the last error
            llm.stream("x") if streaming else llm.generate("x", use_tqdm=False)
        until(lambda: core.num_running == 0)
        assert [reason for reason, _, _ in core.ended.values()] == ["abort"]
        del held
