"""Rows 1 to 9 of the catalogue: lengths, limits and what may be written, on a real engine that drafts."""

from collections import Counter

import numpy as np
import pytest
from serving import BLOCK, CONTEXT, GREEDY, K, generate, idle, ids, serve
from test_planted_bugs import (
    count_first_clamp_after,
    row03_in_flight_is_not_counted,
    row09_append_takes_one_block_at_most,
)

from jaxserve import EngineDeadError, InvalidRequestError


def fill(llm, cases, limit):
    """Every case runs into the context limit; returns how many tokens were drafted."""
    work = [(case, min(limit - len(case.prompt), len(case.answer))) for case in cases if len(case.prompt) < limit]
    assert any(len(case.prompt) + room == limit for case, room in work)
    params = [GREEDY.with_changes(max_tokens=room) for _, room in work]
    outputs = generate(llm, [case.prompt for case, _ in work], params)
    assert [o.outputs[0].token_ids for o in outputs] == [case.answer[:room] for case, room in work]
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
    return idle(llm)["num_drafted_tokens"]


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize("limit", [17, 20, 31, 32, 33, 36])
def test_row_01_drafts_meet_the_context_limit(engine, cases, limit, run_ahead):
    """vLLM #16151: every answer fills the context to its last token, with drafts pending."""
    with serve(engine, max_model_len=limit, run_ahead=run_ahead) as llm:
        assert fill(llm, cases, limit) > 0


@pytest.mark.parametrize("limit", [20, 31, 32])
def test_row_01_kills_an_engine_that_counts_first_and_clamps_after(engine, cases, monkeypatch, limit):
    """The same test sees the bug: with vLLM 0.8.2's allocator, that engine dies of that assertion, or answers wrong."""
    count_first_clamp_after(monkeypatch)
    with (
        serve(engine, max_model_len=limit, run_ahead=0, check=False) as llm,
        pytest.raises((EngineDeadError, AssertionError)) as death,
    ):
        for _ in range(3):
            fill(llm, cases, limit)
    if limit == 32:
        assert "num_new_blocks > 0" in str(death.value), "the line of the log in #16151"


def test_row_01_kills_an_engine_that_grants_what_fits(engine, cases, monkeypatch):
    """Row 9's form of the same thought: "needs a block" answered by one block. The invariants see it at once."""
    row09_append_takes_one_block_at_most(monkeypatch)
    with serve(engine) as llm, pytest.raises(EngineDeadError, match="planned past the table"):
        ids(llm, cases)


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_row_02_preempted_just_before_the_limit(engine, cases, run_ahead):
    """A resumed choice gets the width of a running one: preempted at every length in the last K + 2 positions."""
    limit = 32
    for back in range(K + 2):
        with serve(engine, max_model_len=limit, run_ahead=run_ahead) as llm:
            scheduler = llm.engine.core.scheduler

            def preempt(plan, scheduler=scheduler, back=back):
                for choice in list(scheduler.state.decoding):
                    if not choice.num_preemptions and choice.tokens_len >= limit - 1 - back:
                        scheduler.state.preempt(choice)

            llm.engine.core.runner.dispatched = preempt
            fill(llm, cases, limit)
            assert llm.engine.core.stats()["num_preemptions"] > 2


@pytest.mark.parametrize("run_ahead", [1, 3])
def test_row_03_what_is_in_flight_counts_in_the_cap(engine, cases, run_ahead):
    """The lengths that the device sees, at every step: within the context, and covered by blocks."""
    limit = 33
    with serve(engine, max_model_len=limit, run_ahead=run_ahead) as llm:
        runner = llm.engine.core.runner

        def look(plan):
            slots = runner.slots
            for choice, slot, width in zip(plan.choices, plan.slots, plan.widths, strict=True):
                assert width >= 1
                if choice.slot == slot:
                    assert slots.computed_len[slot] <= choice.computed_len + choice.in_flight_len <= limit - 1
                    assert slots.tokens_len[slot] <= min(limit, choice.prompt_len + choice.max_output_len)
                    assert slots.computed_len[slot] <= len(choice.block_ids) * BLOCK

        runner.dispatched = look
        fill(llm, cases, limit)


def test_row_03_is_seen_where_in_flight_does_not_count(engine, cases, monkeypatch):
    row03_in_flight_is_not_counted(monkeypatch)
    with serve(engine, max_model_len=33, run_ahead=3) as llm, pytest.raises(EngineDeadError, match="planned past the"):
        fill(llm, cases, 33)


@pytest.mark.parametrize("prompt_len", [CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_row_04_05_a_prompt_as_long_as_the_context(engine, prompt_len):
    """At L-1 there is one token to say; from L on the request is refused and leaves nothing; the engine serves on."""
    with serve(engine) as llm:
        prompt = [97, 98] * CONTEXT
        if prompt_len < CONTEXT:
            (output,) = generate(llm, [prompt[:prompt_len]], GREEDY.with_changes(max_tokens=None))
            assert len(output.outputs[0].token_ids) == CONTEXT - prompt_len
            assert output.outputs[0].finish_reason == "length"
        else:
            before = llm.engine.core.stats()
            for params in (GREEDY, GREEDY.with_changes(max_tokens=1), None):
                with pytest.raises(InvalidRequestError, match=f"prompt has {prompt_len} tokens; allowed: 1..63"):
                    generate(llm, [[97], prompt[:prompt_len]], params)
            assert llm.engine.core.stats() == before
            assert not llm.engine.core.callers and not llm.engine.core.scheduler.choices
        assert len(generate(llm, [[97]])[0].outputs[0].token_ids) == GREEDY.max_tokens
        idle(llm)


@pytest.mark.parametrize("prompt_len", [1, 30, CONTEXT - K, CONTEXT - 2, CONTEXT - 1])
def test_row_06_the_default_of_max_tokens_is_net_of_drafts(engine, prompt_len):
    with serve(engine) as llm:
        (output,) = generate(llm, [([97, 98, 99] * 30)[:prompt_len]], GREEDY.with_changes(max_tokens=None))
        assert len(output.outputs[0].token_ids) == CONTEXT - prompt_len


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_row_07_asked_for_n_tokens_and_gets_n(engine, cases, run_ahead):
    """All n from 1 on, for every prompt; also where prompt + n is the whole context."""
    with serve(engine, run_ahead=run_ahead) as llm:
        for num_tokens in range(1, 12):
            params = GREEDY.with_changes(max_tokens=num_tokens)
            assert ids(llm, cases, params) == [case.answer[:num_tokens] for case in cases]
    for case in cases:
        with serve(engine, max_model_len=len(case.prompt) + 9, run_ahead=run_ahead) as llm:
            assert ids(llm, [case], GREEDY.with_changes(max_tokens=9)) == [case.answer[:9]]


def poison(llm, value):
    """Fills the whole KV pool, so that whoever reads what wasn't written for it says so."""
    import jax

    real = llm.engine.core.runner.real
    real._kv = jax.tree.map(
        lambda pool: jax.device_put(np.full(pool.shape, value, pool.dtype), pool.sharding), real._kv
    )


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_row_08_09_drafts_ahead_of_the_host_at_block_boundaries(engine, cases, run_ahead):
    """Steps run up to run_ahead * (K + 1) tokens ahead of what the host knows, over every offset in a block.

    K + 1 tokens may begin two blocks at once.
    """
    new_blocks = []
    with serve(engine, run_ahead=run_ahead, enable_prefix_caching=False) as llm:
        poison(llm, 1e4)
        llm.engine.core.runner.before = lambda plan: new_blocks.extend(Counter(plan.table_updates[:, 0]).values())
        prompts = [case.prompt for case in cases]
        assert {(len(prompt) + i) % BLOCK for prompt in prompts for i in range(BLOCK)} == set(range(BLOCK))
        assert ids(llm, cases) == [case.answer for case in cases]
        assert idle(llm)["num_accepted_tokens"] > 0
    assert max(new_blocks) == 2


def test_row_08_is_seen_where_the_device_misses_a_table_entry(engine, cases):
    """A table that isn't updated in time: what the device then reads and writes belongs to somebody else."""
    with serve(engine, enable_prefix_caching=False) as llm:
        poison(llm, 1e4)
        llm.engine.core.runner.before = lambda plan: plan.table_updates.fill(0)
        assert ids(llm, cases) != [case.answer for case in cases]
    with serve(engine, enable_prefix_caching=False) as llm:
        assert ids(llm, cases) == [case.answer for case in cases], "the bug outlived its test"
