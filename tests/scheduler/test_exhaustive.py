"""Every move from every distinct state of small schedulers: block sizes 1, 2, 4, K 0..4, max_model_len 4..20.

By default most of them run to the end, and the longest up to a bound; the slow ones run those to the end, and more
settings. ``soak.py`` goes on from there.
"""

import pytest
from scheduler_explore import Setting, Tally, boundary_settings, explore


def sweep(settings: list[Setting], max_states: int) -> Tally:
    tally = Tally()
    for setting in settings:
        tally.add(explore(setting, max_states))
    return tally


NO_BOUND = 10**9


@pytest.mark.parametrize("max_states", [250, pytest.param(NO_BOUND, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_every_accept_pattern_at_the_context_limit(block_size, max_states):
    """Of 91 settings 74 end within the bound."""
    settings = boundary_settings(range(4, 21, 4), range(5), (block_size,), (0,))
    tally = sweep(settings, max_states)
    assert len(settings) == 91 and tally.num_truncated == (17 if max_states == 250 else 0)
    assert tally.num_states > (7_700 if max_states == 250 else 19_500)


@pytest.mark.parametrize(
    ("run_ahead", "max_states"), [(1, NO_BOUND), (3, 300), pytest.param(3, NO_BOUND, marks=pytest.mark.slow)]
)
def test_every_accept_pattern_under_run_ahead(run_ahead, max_states):
    settings = [
        Setting(block_size, num_drafts, max_model_len, run_ahead, (max_model_len - 8,))
        for block_size, num_drafts, max_model_len in [(1, 4, 12), (2, 2, 11), (2, 4, 12), (4, 3, 14)]
    ]
    tally = sweep(settings, max_states)
    assert tally.num_truncated == (4 if max_states == 300 else 0)
    assert tally.num_states > 1000


@pytest.mark.parametrize(
    "setting",
    [
        Setting(1, 2, 6, 1, (2, 3)),  # the smallest pool: two choices fight for every block
        Setting(2, 1, 6, 1, (3, 3)),  # a shared prefix under eviction
        Setting(2, 2, 7, 0, (2, 3), spare_blocks=1),
        Setting(2, 1, 6, 1, (3, 3), max_num_batched_tokens=2),  # chunked prefill, one token beside a decode
        Setting(2, 2, 6, 1, (2, 2), drafting="host"),
    ],
)
def test_two_choices_with_aborts_and_preemptions(setting):
    tally = explore(setting, 500)
    assert tally.num_states > 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_everything(block_size):
    """939 settings each, bounded by 500 states a setting, which about a quarter of them reach."""
    settings = boundary_settings(range(4, 21), range(5), (block_size,), (0, 1, 2))
    assert len(settings) == 939
    tally = sweep(settings, 500)
    assert tally.num_schedules > 100_000
