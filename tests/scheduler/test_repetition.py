"""Loop detection against its definition, and its place among the stop reasons."""

from array import array

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scheduler_world import HashModel, World, loops_by_definition

from jaxserve.sampling_params import RepetitionDetection, SamplingParams
from jaxserve.scheduler import SchedulerConfig
from jaxserve.scheduler.repetition import LoopFinder

TOKENS = st.sampled_from([0, 1, 256, 1 << 16])  # as bytes, one is found across two others


@given(
    st.lists(TOKENS, max_size=12),
    st.lists(TOKENS, min_size=1, max_size=5),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(2, 4),
)
@example([], [0, 1], 40, 17, 3, 4)  # more tokens must recur than are searched for
@example([1] * 10, [0], 31, 16, 4, 2)
@example([], [1 << 16, 0, 256] * 6 + [1], 2, 1, 30, 2)
def test_same_as_definition(head, pattern, times, smallest, more, count):
    rule = RepetitionDetection(min_pattern_size=smallest, max_pattern_size=smallest + more, min_count=count)
    output = head + pattern * times
    found = LoopFinder(rule).pattern_len(array("i", output), len(output))
    assert bool(found) == loops_by_definition(output, rule)
    if found:
        assert output[-found * count :] == output[-found:] * count


@given(
    st.lists(TOKENS, min_size=1, max_size=9),
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(2, 6),
)
@example([0], 60, 8, 1, 20, 3)
@example([0], 120, 62, 20, 20, 3)  # all of it recurs at every distance, as far as the odd token
@example([0, 1], 120, 0, 9, 30, 3)
def test_what_is_almost_a_loop(pattern, length, odd, smallest, more, count):
    """One token of a periodic text is another: patterns are compared far before they differ."""
    rule = RepetitionDetection(min_pattern_size=smallest, max_pattern_size=smallest + more, min_count=count)
    output = [pattern[i % len(pattern)] for i in range(length)]
    if odd < length:
        output[length - 1 - odd] = 77
    sizes = range(smallest, smallest + more + 1)
    loops = (p for p in sizes if p * count <= length and output[-p * count :] == output[-p:] * count)
    assert LoopFinder(rule).pattern_len(array("i", output), length) == next(loops, 0)


def world_with(repetition, **settings):
    config = SchedulerConfig(
        max_num_seqs=1,
        max_model_len=200,
        max_num_batched_tokens=64,
        block_size=4,
        num_blocks=64,
        max_drafts=4,
        run_ahead=1,
        repetition=repetition,
    )
    world = World(config, HashModel(loop=3))
    world.add([1, 2, 3], SamplingParams(max_tokens=100, **settings))
    world.drain(lambda most: (most, most))
    return world


def test_stop_ends_at_the_first_look_that_sees_it():
    world = world_with("stop")
    choice = world.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("repetition", "repetition_detected")
    assert len(choice.output_token_ids) == 32  # 8 copies of 3 tokens are 24: the look at 16 was too early


def test_warn_counts_once_and_goes_on():
    world = world_with("warn")
    assert world.choices[0].finish_reason == "length"
    assert world.scheduler.stats.num_repetition_warnings == 1


def test_off_doesnt_look():
    world = world_with("off")
    assert world.choices[0].finish_reason == "length"
    assert world.scheduler.stats.num_repetition_warnings == 0


@pytest.mark.parametrize("repetition", ["off", "warn", "stop"])
def test_a_request_that_asks_is_stopped_in_any_mode(repetition):
    rule = RepetitionDetection(max_pattern_size=4, min_count=4)
    world = world_with(repetition, repetition_detection=rule)
    assert world.choices[0].finish_reason == "repetition"
    assert len(world.choices[0].output_token_ids) == 16


def test_min_tokens_hold_it_back():
    world = world_with("stop", min_tokens=50)
    assert len(world.choices[0].output_token_ids) == 64
