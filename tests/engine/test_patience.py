"""The watchdog's judgement, with a clock of its own."""

from __future__ import annotations

import pytest

from jaxserve.engine.patience import Patience


def test_a_loop_that_moves_is_never_taken_for_a_hang():
    """Though each heartbeat that is seen is a minute old."""
    patience = Patience(60.0)
    for beat in range(0, 1000, 60):
        assert not any(patience.is_over(heartbeat=float(beat), now=float(beat + second)) for second in range(61))


@pytest.mark.parametrize("heartbeat", [0.0, 5.0])
def test_a_heartbeat_that_was_watched_for_too_long_hangs(heartbeat):
    patience = Patience(60.0)
    looks = [patience.is_over(heartbeat, now=heartbeat + second) for second in range(70)]
    assert looks == [False] * 61 + [True] * 9


def test_a_process_that_was_stopped_is_forgiven():
    """After Ctrl-Z and fg the heartbeat is as old as can be; the step gets the time that was left to it before."""
    patience = Patience(60.0)
    assert not any(patience.is_over(heartbeat=0.0, now=float(second)) for second in range(31))
    assert not any(patience.is_over(heartbeat=0.0, now=1000.0 + second) for second in range(29))
    assert not patience.is_over(heartbeat=0.0, now=2000.0)  # stopped once more
    assert patience.is_over(heartbeat=0.0, now=2001.0)


def test_stops_dont_add_up_while_the_loop_moves():
    patience = Patience(60.0)
    for times in range(1000):
        assert not patience.is_over(heartbeat=float(times // 10), now=1000.0 * times)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 300.0])
def test_looks_are_close_together(seconds):
    """So that a hang is found soon after its time is up, and a stop costs little of it."""
    patience = Patience(seconds)
    assert 0 < patience.period <= min(1.0, seconds / 4)
