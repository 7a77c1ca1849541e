"""The watchdog's judgement, with a clock of its own."""

from __future__ import annotations

from jaxserve.engine.patience import Patience


def test_a_loop_that_moves_is_never_suspected():
    patience = Patience(60.0)
    for beat in range(0, 1000, 60):
        assert not patience.is_over(heartbeat=float(beat), now=beat + 60.0)


def test_a_process_that_was_stopped_is_forgiven():
    """After Ctrl-Z and fg the heartbeat is old once; then it moves."""
    patience = Patience(60.0)
    assert not patience.is_over(heartbeat=0.0, now=100.0)
    assert not patience.is_over(heartbeat=100.5, now=101.0)
    assert not patience.is_over(heartbeat=100.5, now=500.0)  # stopped again: what an earlier look saw doesn't count
    assert not patience.is_over(heartbeat=500.5, now=501.0)


def test_a_heartbeat_that_two_looks_find_too_old_hangs():
    patience = Patience(60.0)
    assert not patience.is_over(heartbeat=5.0, now=65.0)
    assert not patience.is_over(heartbeat=5.0, now=65.1)
    assert patience.is_over(heartbeat=5.0, now=66.1)
    assert patience.is_over(heartbeat=5.0, now=67.1)


def test_the_suspected_heartbeat_may_be_zero():
    patience = Patience(1.0)
    assert not patience.is_over(heartbeat=0.0, now=2.0)
    assert patience.is_over(heartbeat=0.0, now=3.0)
